"""enwik8: the first 100 MB of the English Wikipedia of 3 March 2006."""

import dataclasses
import errno
import hashlib
import http.client
import os
import pathlib
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib

import numpy as np

from data import Corpus, CorpusError, sha256_of, split

_PIECE_BYTES = 1 << 20
_TIMEOUT_SECONDS = 30
_PAUSES_SECONDS = (1, 5, 20)  # before the second, third and fourth try


@dataclasses.dataclass(frozen=True)
class Source:
  """A zipped corpus: its address, and the content that it must have."""

  name: str
  url: str
  zip_bytes: int
  zip_sha256: str
  sha256: str
  sizes: tuple[int, int, int]

  @property
  def bytes(self) -> int:
    return sum(self.sizes)


ENWIK8 = Source(
  name="enwik8",
  url="https://mattmahoney.net/dc/enwik8.zip",
  zip_bytes=36_445_475,
  zip_sha256="547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
  sha256="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
  sizes=(90_000_000, 5_000_000, 5_000_000),
)


def load(
  cache_dir, *, source=ENWIK8, log=None, pauses_seconds=_PAUSES_SECONDS
) -> Corpus:
  """Returns the corpus in `cache_dir`, verified; fetches it first if absent.

  Args:
    cache_dir: a folder, made if absent; it may hold `enwik8` or `enwik8.zip`.
    source: the corpus to fetch.
    log: a function that takes lines of progress.
    pauses_seconds: how long to wait before each further try.

  Raises:
    CorpusError: the corpus cannot be fetched, the folder cannot be used, or a
      file in it has not the content expected. Files that exist are not changed.
  """
  folder = pathlib.Path(cache_dir)
  raw = folder / source.name
  try:
    if not raw.exists():
      folder.mkdir(parents=True, exist_ok=True)
      # Two runs that start together fetch once.
      with (
        _ONE_THREAD,
        (folder / f"{source.name}.lock").open("w") as file,
      ):
        _hold(file.fileno())
        if not raw.exists():
          _make(source, raw, log or (lambda line: None), pauses_seconds)
    content = np.memmap(raw, np.uint8, mode="r") if raw.stat().st_size else b""
  except OSError as error:
    raise CorpusError(
      f"{folder} cannot be used ({error}); expected a folder that may be "
      "written to, with room; give another with --config.data.cache_dir"
    ) from error
  digest = sha256_of(content)
  if digest != source.sha256:
    raise CorpusError(
      f"{raw} has the sha256 {digest}; expected {source.sha256}; remove it, "
      "and it is made again"
    )
  return split(source.name, content, source.sizes, digest)


_ONE_THREAD = threading.Lock()  # a file lock does not exclude threads


def _hold(descriptor):
  """Waits for the lock of a file, which ends with the process that holds it."""
  if hasattr(os, "lockf"):
    os.lockf(descriptor, os.F_LOCK, 0)
    return
  import msvcrt  # on Windows

  while True:
    try:
      return msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)
    except OSError as error:
      if error.errno != errno.EDEADLK:  # raised after ten seconds
        raise


def _make(source, raw, log, pauses_seconds):
  """Makes the raw file from its zip, which is fetched first if absent."""
  zipped = raw.with_name(raw.name + ".zip")
  if not zipped.exists():
    _fetch(source, zipped, log, pauses_seconds)
  digest = _file_sha256(zipped)
  if digest != source.zip_sha256:
    raise CorpusError(
      f"{zipped} has the sha256 {digest}; expected {source.zip_sha256}; remove "
      "it, and it is fetched again"
    )
  _unpack(source, zipped, raw)


def _is_safe(url):
  """Tells whether a URL is https, or of a server on this machine."""
  parts = urllib.parse.urlsplit(url)
  return parts.scheme == "https" or (
    parts.scheme == "http"
    and parts.hostname in ("127.0.0.1", "::1", "localhost")
  )


class _Redirects(urllib.request.HTTPRedirectHandler):
  def redirect_request(self, req, fp, code, msg, headers, newurl):
    if not _is_safe(newurl):
      msg = f"it redirects to {newurl}, which is not https"
      raise urllib.error.HTTPError(req.full_url, code, msg, headers, fp)
    return super().redirect_request(req, fp, code, msg, headers, newurl)


def _fetch(source, target, log, pauses_seconds):
  """Downloads to `target`, and goes on after the part that a try has left."""
  by_hand = f"put {target.name} or {source.name} into {target.parent} yourself"
  if not _is_safe(source.url):
    raise CorpusError(f"{source.url} is not fetched; expected https; {by_hand}")
  part = target.with_name(target.name + ".part")
  for pause in (*pauses_seconds, None):
    try:
      _fetch_once(source, part, log)
      break
    except urllib.error.HTTPError as error:
      if error.code == 416:  # the part is as long as the file, or longer
        part.unlink(missing_ok=True)
      reason = f"HTTP status {error.code}, {error.msg}"
      final = error.code < 500 and error.code not in (408, 416, 429)
    except (OSError, http.client.HTTPException) as error:
      if getattr(error, "filename", None) or (
        getattr(error, "errno", None) == errno.ENOSPC
      ):
        raise  # an error of the disk; the server cannot help
      reason = str(getattr(error, "reason", error)) or type(error).__name__
      reason, final = " ".join(reason.split()), False
    if final or pause is None:
      raise CorpusError(f"{source.url} cannot be fetched ({reason}); {by_hand}")
    log(f"{source.url}: {reason}; trying again in {pause} s")
    time.sleep(pause)
  size, digest = part.stat().st_size, _file_sha256(part)
  if (size, digest) != (source.zip_bytes, source.zip_sha256):
    part.unlink()
    raise CorpusError(
      f"{source.url} gave {size:,} bytes with the sha256 {digest}; expected "
      f"{source.zip_bytes:,} with {source.zip_sha256}; {by_hand}"
    )
  part.replace(target)


def _fetch_once(source, part, log):
  """Downloads the bytes that `part` lacks.

  Raises:
    ConnectionError: the download broke off.
  """
  have = part.stat().st_size if part.exists() else 0
  if have == source.zip_bytes:
    return
  request = urllib.request.Request(source.url)
  if have:
    request.add_header("Range", f"bytes={have}-")
  opener = urllib.request.build_opener(_Redirects)
  with opener.open(request, timeout=_TIMEOUT_SECONDS) as response:
    if response.status != 206:  # the server sends all of it again
      have = 0
    tenths = have * 10 // source.zip_bytes
    with part.open("ab" if have else "wb") as file:
      while piece := response.read(_PIECE_BYTES):
        have += len(piece)
        if have > source.zip_bytes:
          file.close()
          part.unlink()
          raise CorpusError(
            f"{source.url} gave more than {source.zip_bytes:,} bytes, the size "
            f"of the file; put {source.name} into {part.parent} yourself"
          )
        file.write(piece)
        if have * 10 // source.zip_bytes > tenths:
          tenths = have * 10 // source.zip_bytes
          log(f"{source.url}: {have:,} of {source.zip_bytes:,} bytes")
  if have < source.zip_bytes:
    raise ConnectionError(f"it broke off after {have:,} bytes")


def _file_sha256(path):
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _unpack(source, zipped, raw):
  """Unpacks the one member of the zip, completely or not at all."""
  part = raw.with_name(raw.name + ".part")
  try:
    with zipfile.ZipFile(zipped) as archive:
      infos = archive.infolist()
      found = [(info.filename, info.file_size) for info in infos]
      if found != [(source.name, source.bytes)]:
        raise CorpusError(
          f"{zipped} holds {found[:3]}; expected the one member "
          f"{source.name} of {source.bytes:,} bytes; remove it, and it is "
          "fetched again"
        )
      digest, size = hashlib.sha256(), 0
      with archive.open(infos[0]) as member, part.open("wb") as file:
        while piece := member.read(_PIECE_BYTES):
          size += len(piece)
          if size > source.bytes:
            break
          digest.update(piece)
          file.write(piece)
    if digest.hexdigest() != source.sha256:
      raise CorpusError(
        f"{zipped} unpacks to other bytes (sha256 {digest.hexdigest()}; "
        f"expected {source.sha256}); remove it, and it is fetched again"
      )
    part.replace(raw)
  except (EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
    raise CorpusError(
      f"{zipped} cannot be unpacked ({error}); remove it, and it is fetched "
      "again"
    ) from error
  finally:
    part.unlink(missing_ok=True)
