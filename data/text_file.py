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
  if not path.is_file():
    raise CorpusError(f"data.path={path} is no file; give a file of text")
  try:
    with path.open("rb") as file:
      start = file.read(6)
    if start.startswith(b"\x1f\x8b"):
      with gzip.open(path) as stream:
        return split(path.name, _read(stream, path, cap_bytes))
    if start == b"\xfd7zXZ\x00":
      with lzma.open(path) as stream:
        return split(path.name, _read(stream, path, cap_bytes))
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
      return split(path.name, _read_zip(path, cap_bytes))
    if not start:
      raise CorpusError(f"data.path={path} is empty; give a file of text")
    return split(path.name, np.memmap(path, np.uint8, mode="r"))
  except (
    OSError,
    EOFError,
    RuntimeError,  # an encrypted member
    NotImplementedError,  # a compression that zipfile does not have
    lzma.LZMAError,
    zlib.error,
    zipfile.BadZipFile,
  ) as error:
    reason = str(error).splitlines()[0].rstrip(".")
    raise CorpusError(
      f"data.path={path} cannot be read ({reason}); give a whole file that may "
      "be read"
    ) from error


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
  return bytes(content)
