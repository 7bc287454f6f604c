"""Where the bytes come from, and what happens when they do not."""

import bz2
import concurrent.futures
import contextlib
import dataclasses
import errno
import gzip
import hashlib
import http.server
import io
import lzma
import os
import pickle
import sqlite3
import sys
import sysconfig
import tarfile
import threading
import types
import urllib.request
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import CorpusError, enwik8, python_source, split, text_file

CONTENT = np.random.default_rng(0).integers(0, 256, 50_000, np.uint8).tobytes()


def sha256(content):
  return hashlib.sha256(content).hexdigest()


def zipped(**members):
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
    for name, content in members.items():
      archive.writestr(name, content)
  return file.getvalue()


ZIP = zipped(tiny=CONTENT)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
  monkeypatch.setenv("no_proxy", "*")


class Server(http.server.ThreadingHTTPServer):
  """Serves one body; remembers the Range headers and what it sent."""

  def __init__(self, body):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.body, self.ranges, self.sent = body, [], []
    self.break_off_at = []  # of each request in turn
    self.statuses = []  # likewise, other than 200
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
  """The load fails in one sentence and leaves nothing half made."""
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


def test_a_part_of_an_earlier_run_is_gone_on_with(tmp_path):
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


def test_a_short_body_is_told(tmp_path):
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
def test_only_https_is_spoken_to_strangers(tmp_path, monkeypatch, url):
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
  """By a double of msvcrt, which gives up after ten seconds."""
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


def test_progress_is_told_in_lines(tmp_path):
  lines = []
  with serve(ZIP) as server:
    server.statuses = [500, 200]
    wanted = source(server.url)
    enwik8.load(tmp_path, source=wanted, log=lines.append, pauses_seconds=(0,))
  assert "HTTP status 500" in lines[0]
  assert f"{len(ZIP):,} of {len(ZIP):,} bytes" in lines[-1]
  assert len(lines) <= 11


def test_a_folder_that_cannot_be_used_is_told(tmp_path):
  (tmp_path / "file").write_bytes(b"good")
  refused_folder = r"cannot be used .*data\.cache_dir"
  with pytest.raises(CorpusError, match=refused_folder):
    load(tmp_path / "file", source("https://127.0.0.1:1/"))
  assert (tmp_path / "file").read_bytes() == b"good"
  (tmp_path / "tiny.zip.part").mkdir()  # so that it cannot be written
  with serve(ZIP) as server:
    refused(tmp_path, source(server.url), refused_folder)
    assert len(server.ranges) == 1


def test_a_good_raw_file_needs_no_lock_and_no_zip(tmp_path):
  (tmp_path / "tiny").write_bytes(CONTENT)
  (tmp_path / "tiny.zip").write_bytes(b"bad")
  load(tmp_path, source("https://127.0.0.1:1/"))
  assert {p.name for p in tmp_path.iterdir()} == {"tiny", "tiny.zip"}


def test_the_real_source_is_whole():
  assert enwik8.ENWIK8.bytes == 100_000_000
  assert enwik8.ENWIK8.url.startswith("https://")


def test_python_source_is_the_same_twice_and_bounded():
  first, second = python_source.load(), python_source.load()
  assert first.sha256 == second.sha256
  total = len(first.train) + len(first.valid) + len(first.test)
  assert 1_000_000 < total <= python_source.CAP_BYTES
  # Python, and not the tables of characters.
  assert first.train.tobytes().count(b"def ") > 5_000


def test_python_source_takes_the_library_and_no_more(tmp_path, monkeypatch):
  monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
  with pytest.raises(CorpusError, match=r"no \.py files.*data\.path") as error:
    python_source.load()
  assert "\n" not in str(error.value)
  for name in (
    "b.py",
    "a/test/c.py",
    "a/tests/c.py",
    "a/idle_test/c.py",
    "a/d.py",
    "a/test_d.py",
    "a.txt",
    "site-packages/e.py",
    "encodings/f.py",
    "config-3/g.py",
    "_sysconfigdata_x.py",
    "sitecustomize.py",
  ):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(f"# {name}".ljust(99))
  wanted = b"".join(
    f"# {n}".ljust(99).encode() + b"\n" for n in ("a/d.py", "b.py")
  )
  assert python_source.load().sha256 == sha256(wanted)
  monkeypatch.setattr(python_source, "CAP_BYTES", 150)
  assert python_source.load().sha256 == sha256(wanted[:150])
  (tmp_path / "a/d.py").unlink()
  (tmp_path / "a/d.py").symlink_to("gone")
  with pytest.raises(CorpusError, match="cannot be read"):
    python_source.load()


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("raw.txt", CONTENT),
    ("a.gz", gzip.compress(CONTENT)),
    ("a.bz2", bz2.compress(CONTENT)),
    ("a.bz2", bz2.compress(CONTENT[:9]) + bz2.compress(CONTENT[9:], 1)),
    ("a.xz", lzma.compress(CONTENT)),
    ("a.lzma", lzma.compress(CONTENT, lzma.FORMAT_ALONE)),
    ("a.zip", zipped(inside=CONTENT)),
    ("misnamed.txt", gzip.compress(CONTENT)),
  ],
)
def test_text_files_of_each_kind(tmp_path, name, content):
  (tmp_path / name).write_bytes(content)
  corpus = text_file.load(tmp_path / name)
  assert corpus.name == name
  assert corpus.sha256 == sha256(CONTENT)
  assert [len(x) for x in (corpus.train, corpus.valid, corpus.test)] == [
    45_000,
    2_500,
    2_500,
  ]
  with pytest.raises(ValueError, match="read-only"):
    corpus.train[0] = 0


def damaged(changes):
  """A stored zip with other bytes at offsets into its list of members."""
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w") as archive:
    archive.writestr("tiny", CONTENT)
  body = bytearray(file.getvalue())
  start = body.index(b"PK\x01\x02")
  for offset, value in changes.items():
    body[start + offset : start + offset + len(value)] = value
  return bytes(body)


ENCRYPTED = damaged({8: b"\x01"})
ENDLESS = damaged({20: b"\xff\xff\xff\x7f" * 2})  # both of its sizes
MISNAMED = damaged({8: b"\x00\x08", 46: b"\xff"})  # no utf-8, but said to be
NAMELESS = damaged({46: bytes(1)})


@pytest.mark.parametrize(
  ("content", "match"),
  [
    (None, "is no file"),
    (b"", "is empty"),
    (b"short", "at least 100"),
    (gzip.compress(CONTENT)[:-9], "cannot be read"),
    (gzip.compress(CONTENT)[:100] + b"?" * 100, "cannot be read"),
    (gzip.compress(CONTENT)[:-8] + bytes(8), "cannot be read .*CRC"),
    (gzip.compress(CONTENT)[:10] + b"\xff" * 99, "cannot be read .*block type"),
    (lzma.compress(CONTENT)[:-9], "cannot be read"),
    (bz2.compress(CONTENT)[:-9], "cannot be read"),
    (bz2.compress(CONTENT)[:99] + b"?" * 99, "cannot be read"),
    (bz2.compress(CONTENT * 3), "more than 100,000 bytes"),
    (lzma.compress(CONTENT)[:9] + b"\xff" * 99, "cannot be read .*orrupt"),
    (ZIP[:-30], "cannot be read"),
    (zipped(a=CONTENT, b=b"x"), "holds 2 members"),
    (zipped(), "holds 0 members"),
    (ENCRYPTED, "encrypted"),
    (ENDLESS, "EOFError"),
    (MISNAMED, "cannot be read .*codec"),
    (NAMELESS, "cannot be read"),
    (gzip.compress(CONTENT * 3), "more than 100,000 bytes"),
    (zipped(a=CONTENT * 3), "more than 100,000 bytes"),
  ],
)
def test_text_files_that_cannot_serve(tmp_path, content, match):
  path = tmp_path / "text"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(CorpusError, match=match) as error:
    text_file.load(path, cap_bytes=100_000)
  assert "\n" not in str(error.value)
  assert "text" in str(error.value)


def tarred(form):
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w", format=form) as archive:
    info = tarfile.TarInfo("caf\xe9/book.txt")
    info.size = len(CONTENT)
    archive.addfile(info, io.BytesIO(CONTENT))
  return file.getvalue()


def oldest_tar():
  """Without the magic number that later forms have."""
  head = bytearray(tarred(tarfile.USTAR_FORMAT)[:512])
  head[257:] = bytes(512 - 257)
  head[148:156] = b" " * 8
  head[148:156] = b"%06o\x00 " % sum(head)
  return bytes(head) + CONTENT


def numpy_file(save, *arrays):
  file = io.BytesIO()
  save(file, *arrays)
  return file.getvalue()


def database():
  with contextlib.closing(sqlite3.connect(":memory:")) as base:
    base.execute("create table texts (text)")
    return base.serialize()


TAR = tarred(tarfile.PAX_FORMAT)
ARRAY = np.arange(100)
ENCLOSED = [
  ("a Zstandard file", b"\x28\xb5\x2f\xfd" + CONTENT),
  ("an LZ4 file", b"\x04\x22\x4d\x18" + CONTENT),
  ("a compressed file", b"\x50\x2a\x4d\x18" + CONTENT),
  ("a 7z archive", b"7z\xbc\xaf\x27\x1c" + CONTENT),
  ("a RAR archive", b"Rar!\x1a\x07\x01\x00" + CONTENT),
  ("a file of compress", b"\x1f\x9d" + CONTENT),
  ("a Parquet file", b"PAR1" + CONTENT + b"PAR1"),
  ("an ORC file", b"ORC" + CONTENT + b"ORC\x19"),
  ("an Arrow file", b"ARROW1\x00\x00" + CONTENT + b"ARROW1"),
  ("a Feather file", b"FEA1" + CONTENT + b"FEA1"),
  ("an HDF5 file", b"\x89HDF\r\n\x1a\n" + CONTENT),
  ("a PDF", b"%PDF-1.7\n" + CONTENT),
  ("an SQLite database", database()),
  ("an array of numpy", numpy_file(np.save, ARRAY)),
  ("an array of numpy", numpy_file(np.savez, ARRAY)),
  ("a pickle", pickle.dumps(CONTENT)),
  ("a tar archive", TAR),
  ("a tar archive", tarred(tarfile.GNU_FORMAT)),
  ("a tar archive", oldest_tar()),
  ("a tar archive", gzip.compress(TAR)),
  ("a tar archive", bz2.compress(TAR)),
  ("a tar archive", lzma.compress(TAR)),
  ("a tar archive", zipped(a=TAR)),
  ("a gzip file", bz2.compress(gzip.compress(CONTENT))),
  ("a bzip2 file", zipped(a=bz2.compress(CONTENT))),
  ("an xz file", gzip.compress(lzma.compress(CONTENT))),
  ("a zip file", gzip.compress(ZIP)),
]


@pytest.mark.parametrize(("kind", "content"), ENCLOSED)
def test_what_encloses_a_text_is_not_taken_for_it(tmp_path, kind, content):
  path = tmp_path / "book.txt"
  path.write_bytes(content)
  with pytest.raises(CorpusError, match=f"book.txt holds {kind}, ") as error:
    text_file.load(path)
  assert "unpack it" in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "start",
  [
    b"BZh9 is how",
    b"ORCs",
    b"FEA1",
    b"LZIP",
    b"PDF-",
    b"Rar!",
    b"7z",
    b"MSCF",
    b"SQLite 3",
    b"\xff\xfeU",
    b"\x7fELF",
  ],
)
def test_other_bytes_are_learned_as_they_are(tmp_path, start):
  content = start + b" a text begins." * 99
  (tmp_path / "text").write_bytes(content)
  assert text_file.load(tmp_path / "text").sha256 == sha256(content)


def test_a_folder_is_no_text(tmp_path):
  with pytest.raises(CorpusError, match="is no file"):
    text_file.load(tmp_path)


@given(st.integers(100, 5_000))
def test_the_splits_are_the_content(total):
  content = np.arange(total, dtype=np.uint32).view(np.uint8)[:total]
  corpus = split("x", content)
  joined = np.concatenate([corpus.train, corpus.valid, corpus.test])
  np.testing.assert_array_equal(joined, content)
  assert len(corpus.valid) == len(corpus.test) == total * 5 // 100
  assert corpus.sha256 == sha256(content.tobytes())


@given(st.integers(1, 500), st.integers(1, 500), st.integers(98, 500))
def test_explicit_sizes_are_kept(train, valid, test):
  sizes = train, valid, test
  content = bytes(i % 251 for i in range(sum(sizes)))
  corpus = split("x", content, sizes)
  parts = corpus.train, corpus.valid, corpus.test
  assert tuple(map(len, parts)) == sizes
  assert b"".join(part.tobytes() for part in parts) == content


@pytest.mark.parametrize(
  ("sizes", "match"),
  [
    ((50_000, 1, 0), "expected 50,001"),
    ((60_000, -10_000, 0), "at least one"),
    ((49_999, 1, 0), "at least one"),
  ],
)
def test_sizes_must_add_up_and_leave_none_empty(sizes, match):
  with pytest.raises(CorpusError, match=match) as error:
    split("x", CONTENT, sizes)
  assert "\n" not in str(error.value)
