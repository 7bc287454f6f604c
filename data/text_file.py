"""Any local file as a corpus: raw, .gz, .xz, or a .zip with one member."""

import gzip
import lzma
import pathlib
import zipfile
import zlib

import numpy as np

from data import Corpus, CorpusError, split

CAP_BYTES = 4 << 30  # of unpacked text, which is held in memory
_READ_AT_ONCE = 1 << 20


def load(path, cap_bytes: int = CAP_BYTES) -> Corpus:
  """Splits a file 90/5/5 per cent.

  The kind is told by the first bytes, not by the name. A raw file stays on the
  disk and is read as it is needed.

  Raises:
    CorpusError: no such file, a damaged archive, several members, too few
      bytes, or more than `cap_bytes` unpacked.
  """
  path = pathlib.Path(path)
  try:
    content = _content(path, cap_bytes)
  except (
    OSError,
    EOFError,
    RuntimeError,  # an encrypted member, an unknown compression
    lzma.LZMAError,
    zlib.error,
    zipfile.BadZipFile,
    # What zipfile lets through of a damaged directory.
    LookupError,
    ValueError,
  ) as error:
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    raise CorpusError(
      f"data.path={path} cannot be read ({reason}); give a whole file that may "
      "be read"
    ) from error
  return split(path.name, content)


def _content(path, cap_bytes):
  if not path.is_file():
    raise CorpusError(f"data.path={path} is no file; give a file of text")
  with path.open("rb") as file:
    start = file.read(6)
  if start.startswith(b"\x1f\x8b"):
    with gzip.open(path) as stream:
      return _read(stream, path, cap_bytes)
  if start == b"\xfd7zXZ\x00":
    with lzma.open(path) as stream:
      return _read(stream, path, cap_bytes)
  if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
    return _read_zip(path, cap_bytes)
  if not start:
    raise CorpusError(f"data.path={path} is empty; give a file of text")
  return np.memmap(path, np.uint8, mode="r")


def _read_zip(path, cap_bytes):
  with zipfile.ZipFile(path) as archive:
    members = [info for info in archive.infolist() if not info.is_dir()]
    if len(members) != 1:
      raise CorpusError(
        f"data.path={path} holds {len(members)} members; expected one file; "
        "unpack it and give the file that is meant"
      )
    with archive.open(members[0]) as stream:
      return _read(stream, path, cap_bytes)


def _read(stream, path, cap_bytes):
  content = bytearray()
  while piece := stream.read(_READ_AT_ONCE):
    content += piece
    if len(content) > cap_bytes:
      raise CorpusError(
        f"data.path={path} unpacks to more than {cap_bytes:,} bytes, the most "
        "that is held in memory; unpack it and give the raw file"
      )
  return np.frombuffer(content, np.uint8)  # not copied: it may be gigabytes
