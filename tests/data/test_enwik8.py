"""enwik8 is fetched once, verified, and never damaged."""

import concurrent.futures
import contextlib
import dataclasses
import errno
import http.server
import os
import sys
import threading
import types
import urllib.request

import numpy as np
import pytest

from data import CorpusError, enwik8
from tests.data.samples import CONTENT, ZIP, sha256, zipped


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
  monkeypatch.setenv("no_proxy", "*")


class Server(http.server.ThreadingHTTPServer):
  """Serves one body; remembers the Range headers and what it sent."""

  def __init__(self, body):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.body, self.ranges, self.sent = body, [], []
    self.break_off_at = []  # for each request in turn, after how many bytes
    self.statuses = []  # for each request in turn, the status to send
    self.honours_range = True
    self.redirect = None

  @property
  def url(self):
    return f"http://127.0.0.1:{self.server_port}/tiny.zip"


class _Handler(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    server = self.server
    wanted = self.headers.get("Range")
    server.ranges.append(wanted)
    if server.statuses and (status := server.statuses.pop(0)) != 200:
      self.send_error(status)
      return
    if server.redirect:
      self.send_response(302)
      self.send_header("Location", server.redirect)
      self.end_headers()
      return
    start = 0
    if wanted and server.honours_range:
      start = int(wanted.removeprefix("bytes=").rstrip("-"))
      if start >= len(server.body):
        self.send_error(416)
        return
    body = server.body[start:]
    self.send_response(206 if start else 200)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    if server.break_off_at:
      body = body[: server.break_off_at.pop(0)]
    server.sent.append(len(body))
    self.wfile.write(body)

  def log_message(self, *_):
    pass


@contextlib.contextmanager
def serve(body):
  with Server(body) as server:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
      yield server
    finally:
      server.shutdown()
      thread.join()


def source(url, body=ZIP, **changes):
  return dataclasses.replace(
    enwik8.Source(
      name="tiny",
      url=url,
      zip_bytes=len(body),
      zip_sha256=sha256(body),
      sha256=sha256(CONTENT),
      sizes=(45_000, 2_500, 2_500),
    ),
    **changes,
  )


def load(folder, wanted, tries=3):
  return enwik8.load(folder, source=wanted, pauses_seconds=(0,) * (tries - 1))


def refused(folder, wanted, match, tries=3):
  """Checks that loading fails in one sentence and leaves no partial file."""
  with pytest.raises(CorpusError, match=match) as error:
    load(folder, wanted, tries)
  assert "\n" not in str(error.value)
  assert not (folder / "tiny").exists()
  return str(error.value)


def test_fetch_verify_split_and_never_again(tmp_path):
  with serve(ZIP) as server:
    wanted = source(server.url)
    corpus = load(tmp_path, wanted)
    assert corpus.sha256 == sha256(CONTENT)
    joined = np.concatenate([corpus.train, corpus.valid, corpus.test])
    assert joined.tobytes() == CONTENT
    assert [len(x) for x in (corpus.train, corpus.valid, corpus.test)] == [
      45_000,
      2_500,
      2_500,
    ]
    load(tmp_path, wanted)
    assert len(server.ranges) == 1
  assert {p.name for p in tmp_path.iterdir()} == {
    "tiny",
    "tiny.zip",
    "tiny.lock",
  }


def test_a_broken_download_goes_on_where_it_stopped(tmp_path):
  with serve(ZIP) as server:
    server.break_off_at = [20_000]
    load(tmp_path, source(server.url))
    assert server.ranges == [None, "bytes=20000-"]
    assert server.sent == [20_000, len(ZIP) - 20_000]


def test_a_part_of_an_earlier_run_is_resumed(tmp_path):
  (tmp_path / "tiny.zip.part").write_bytes(ZIP[:1000])
  with serve(ZIP) as server:
    load(tmp_path, source(server.url))
    assert server.ranges == ["bytes=1000-"]


def test_a_server_without_ranges_sends_all_again(tmp_path):
  (tmp_path / "tiny.zip.part").write_bytes(b"x" * 1000)
  with serve(ZIP) as server:
    server.honours_range = False
    load(tmp_path, source(server.url))
    assert server.sent == [len(ZIP)]


def test_a_part_that_is_too_long_is_begun_again(tmp_path):
  (tmp_path / "tiny.zip.part").write_bytes(ZIP + b"more")
  with serve(ZIP) as server:
    load(tmp_path, source(server.url))
    assert server.ranges == [f"bytes={len(ZIP) + 4}-", None]


def test_a_failing_server_is_asked_again(tmp_path):
  with serve(ZIP) as server:
    server.statuses = [500, 503, 200]
    load(tmp_path, source(server.url))
    assert len(server.ranges) == 3


def test_a_missing_file_is_not(tmp_path):
  with serve(ZIP) as server:
    server.statuses = [404] * 9
    message = refused(tmp_path, source(server.url), "HTTP status 404")
    assert len(server.ranges) == 1
  assert f"put tiny.zip or tiny into {tmp_path}" in message


def test_other_bytes_are_refused_and_the_next_try_is_fresh(tmp_path):
  other = ZIP[:-1] + b"!"
  with serve(other) as server:
    refused(tmp_path, source(server.url), sha256(other))
  assert not list(tmp_path.glob("*.zip*"))


def test_a_short_body_is_refused(tmp_path):
  with serve(ZIP[:1000]) as server:
    refused(tmp_path, source(server.url), "cannot be fetched")


def test_a_long_body_is_cut_off(tmp_path):
  with serve(ZIP + b"x") as server:
    refused(tmp_path, source(server.url), f"more than {len(ZIP):,} bytes")
  assert not list(tmp_path.glob("*.zip*"))


@pytest.mark.parametrize(
  ("members", "match"),
  [
    ({"tiny": CONTENT, "other": b"x"}, "expected the one member tiny"),
    ({"other": CONTENT}, "expected the one member tiny"),
    ({"tiny": CONTENT + b"x"}, "of 50,000 bytes"),
    ({"tiny": CONTENT[::-1]}, "unpacks to other bytes"),
  ],
)
def test_a_zip_of_something_else_is_refused_and_left(tmp_path, members, match):
  body = zipped(**members)
  (tmp_path / "tiny.zip").write_bytes(body)
  refused(tmp_path, source("https://127.0.0.1:1/", body), match)
  assert (tmp_path / "tiny.zip").read_bytes() == body


def test_a_damaged_zip_of_ones_own_is_refused_and_left(tmp_path):
  (tmp_path / "tiny.zip").write_bytes(ZIP[:-1])
  refused(tmp_path, source("https://127.0.0.1:1/"), "tiny.zip has the sha256")
  assert (tmp_path / "tiny.zip").read_bytes() == ZIP[:-1]


def test_a_raw_file_of_ones_own_serves_if_it_is_right(tmp_path):
  wanted = source("https://127.0.0.1:1/")
  (tmp_path / "tiny").write_bytes(CONTENT)
  assert load(tmp_path, wanted).name == "tiny"
  (tmp_path / "tiny").write_bytes(CONTENT[:-1])
  with pytest.raises(CorpusError, match="expected " + sha256(CONTENT)):
    load(tmp_path, wanted)
  assert (tmp_path / "tiny").read_bytes() == CONTENT[:-1]


def test_offline_is_one_sentence_that_says_where_to_put_the_file(tmp_path):
  message = refused(
    tmp_path, source("https://127.0.0.1:1/"), "cannot be fetched"
  )
  assert f"put tiny.zip or tiny into {tmp_path} yourself" in message


@pytest.mark.parametrize(
  "url", ["http://example.invalid/tiny.zip", "file://localhost/etc/hostname"]
)
def test_other_machines_are_asked_by_https_alone(tmp_path, monkeypatch, url):
  asked = []
  monkeypatch.setattr(
    urllib.request.OpenerDirector, "open", lambda *a, **k: asked.append(a)
  )
  refused(tmp_path, source(url), "expected https; put tiny.zip or tiny into")
  assert not asked


def test_nor_is_a_redirect_to_plain_http_followed(tmp_path):
  with serve(ZIP) as server:
    server.redirect = "http://example.invalid/tiny.zip"
    refused(tmp_path, source(server.url), "redirects to .* is not https")
    assert len(server.ranges) == 1


def test_two_runs_at_once_fetch_and_unpack_once(tmp_path, monkeypatch):
  unpacked, unpack = [], enwik8._unpack
  monkeypatch.setattr(
    enwik8, "_unpack", lambda *a: unpacked.append(a) or unpack(*a)
  )
  with serve(ZIP) as server:
    wanted = source(server.url)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      corpora = list(pool.map(lambda _: load(tmp_path, wanted), range(4)))
    assert len(server.ranges) == len(unpacked) == 1
  assert {corpus.sha256 for corpus in corpora} == {sha256(CONTENT)}


def test_the_lock_of_windows_is_waited_for(tmp_path, monkeypatch):
  """A double of msvcrt gives up, as the real one does after ten seconds."""
  answers = [OSError(errno.EDEADLK, "deadlock"), None]
  msvcrt = types.ModuleType("msvcrt")
  msvcrt.LK_LOCK = 1

  def locking(descriptor, mode, count):
    assert (mode, count) == (msvcrt.LK_LOCK, 1)
    if answer := answers.pop(0):
      raise answer

  msvcrt.locking = locking
  monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)
  monkeypatch.delattr(os, "lockf")
  (tmp_path / "tiny.zip").write_bytes(ZIP)
  wanted = source("https://127.0.0.1:1/")
  load(tmp_path, wanted)
  assert not answers
  (tmp_path / "tiny").unlink()
  answers.append(PermissionError(errno.EACCES, "Permission denied"))
  refused(tmp_path, wanted, "Permission denied")


def test_progress_comes_in_lines(tmp_path):
  lines = []
  with serve(ZIP) as server:
    server.statuses = [500, 200]
    wanted = source(server.url)
    enwik8.load(tmp_path, source=wanted, log=lines.append, pauses_seconds=(0,))
  assert "HTTP status 500" in lines[0]
  assert f"{len(ZIP):,} of {len(ZIP):,} bytes" in lines[-1]
  assert len(lines) <= 11


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
  (tmp_path / "file").write_bytes(b"good")
  refused_folder = r"cannot be used .*data\.cache_dir"
  with pytest.raises(CorpusError, match=refused_folder):
    load(tmp_path / "file", source("https://127.0.0.1:1/"))
  assert (tmp_path / "file").read_bytes() == b"good"
  (tmp_path / "tiny.zip.part").mkdir()  # then the file cannot be written
  with serve(ZIP) as server:
    refused(tmp_path, source(server.url), refused_folder)
    assert len(server.ranges) == 1


def test_a_good_raw_file_needs_no_lock_and_no_zip(tmp_path):
  (tmp_path / "tiny").write_bytes(CONTENT)
  (tmp_path / "tiny.zip").write_bytes(b"bad")
  load(tmp_path, source("https://127.0.0.1:1/"))
  assert {p.name for p in tmp_path.iterdir()} == {"tiny", "tiny.zip"}


def test_the_real_source_is_complete():
  assert enwik8.ENWIK8.bytes == 100_000_000
  assert enwik8.ENWIK8.url.startswith("https://")
