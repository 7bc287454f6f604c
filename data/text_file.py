"""Any local file as a corpus: raw, .gz, .bz2, .xz, or a .zip of one member."""

import bz2
import gzip
import lzma
import pathlib
import tarfile
import zipfile
import zlib

import numpy as np

from data import Corpus, CorpusError, split

CAP_BYTES = 4 << 30  # of unpacked text, which is held in memory
_READ_AT_ONCE = 1 << 20
_GZIP = b"\x1f\x8b"
_XZ = (b"\xfd7zXZ\x00", b"]\x00\x00")  # the latter is without a container
_BZIP2 = tuple(  # the first block follows, or the end of the file
  b"BZh%d" % level + block
  for level in range(1, 10)
  for block in (b"1AY&SY", b"\x17rE8P\x90")
)
_ZIP = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
# The first bytes of files that hold text or numbers in a form of their own. All
# other bytes are accepted, as a model may be meant to learn them.
_CONTAINERS = {
  "a gzip file": _GZIP,
  "an xz file": _XZ,
  "a bzip2 file": _BZIP2,
  "a zip file": _ZIP,
  "a Zstandard file": b"\x28\xb5\x2f\xfd",
  "an LZ4 file": (b"\x04\x22\x4d\x18", b"\x02\x21\x4c\x18"),
  # Frames that LZ4 and Zstandard skip.
  "a compressed file": tuple(bytes([i, 42, 77, 24]) for i in range(80, 96)),
  "an lzip file": b"LZIP\x01",
  "an lzop file": b"\x89LZO\x00\r\n\x1a\n",
  "a file of compress": (b"\x1f\x9d", b"\x1f\xa0"),
  "a Snappy file": b"\xff\x06\x00\x00sNaPpY",
  "a 7z archive": b"7z\xbc\xaf\x27\x1c",
  "a RAR archive": b"Rar!\x1a\x07",
  "an ar archive": b"!<arch>\n",
  "a cabinet": b"MSCF\x00\x00\x00\x00",
  "an RPM package": b"\xed\xab\xee\xdb",
  "a Parquet file": b"PAR1",
  "an Arrow file": b"ARROW1\x00\x00",
  "an Avro file": b"Obj\x01",
  "an SQLite database": b"SQLite format 3\x00",
  "an HDF5 file": b"\x89HDF\r\n\x1a\n",
  "an array of numpy": b"\x93NUMPY",
  "a PDF": b"%PDF-",
  "a document of Office": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
}
# A text may begin with these bytes, so the last bytes decide too.
_CONTAINERS_WITH_ENDS = {
  "a Feather file": (b"FEA1", b"FEA1"),
  "an ORC file": (b"ORC", tuple(b"ORC%c" % length for length in range(256))),
  "a pickle": (tuple(bytes([0x80, i]) for i in range(2, 6)), b"."),
}


def load(path, cap_bytes: int = CAP_BYTES) -> Corpus:
  """Splits a file 90/5/5 per cent.

  Its first bytes decide how it is read, not its name. A raw file stays on the
  disk and is read as needed.

  Raises:
    CorpusError: the file does not exist, is damaged, is an archive of several
      members, is of a format that holds no plain text, has too few bytes, or
      unpacks to more than `cap_bytes`.
  """
  path = pathlib.Path(path)
  try:
    content = _content(path, cap_bytes)
    kind = _container(content)
  except (
    OSError,
    EOFError,
    RuntimeError,  # an encrypted member, an unknown compression
    lzma.LZMAError,
    zlib.error,
    zipfile.BadZipFile,
    # zipfile raises these for a damaged list of members.
    LookupError,
    ValueError,
  ) as error:
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    raise CorpusError(
      f"data.path={path} cannot be read ({reason}); give a complete file that "
      "may be read"
    ) from error
  if kind:
    raise CorpusError(
      f"data.path={path} holds {kind}, whose bytes are not plain text; unpack "
      "it and give the file of text in it"
    )
  return split(path.name, content)


def _container(content):
  """Returns the name of the format if it is not plain text, or None."""
  start, end = content[:512].tobytes(), content[-4:].tobytes()
  for kind, first in _CONTAINERS.items():
    if start.startswith(first):
      return kind
  for kind, (first, last) in _CONTAINERS_WITH_ENDS.items():
    if start.startswith(first) and end.endswith(last):
      return kind
  try:  # the first header of a tar archive has a checksum
    tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
  except tarfile.HeaderError:
    return None
  return "a tar archive"


def _content(path, cap_bytes):
  """Returns the bytes of a file, unpacked."""
  if not path.is_file():
    wrong = "is not a file" if path.exists() else "does not exist"
    raise CorpusError(f"data.path={path} {wrong}; give a file of text")
  with path.open("rb") as file:
    start = file.read(10)
  for first, opener in (
    (_GZIP, gzip.open),
    (_BZIP2, bz2.open),
    (_XZ, lzma.open),
  ):
    if start.startswith(first):
      with opener(path) as stream:
        return _read(stream, path, cap_bytes)
  if start.startswith(_ZIP):
    return _read_zip(path, cap_bytes)
  if not start:
    raise CorpusError(f"data.path={path} is empty; give a file of text")
  return np.memmap(path, np.uint8, mode="r")


def _read_zip(path, cap_bytes):
  with zipfile.ZipFile(path) as archive:
    members = [info for info in archive.infolist() if not info.is_dir()]
    if len(members) != 1:
      raise CorpusError(
        f"data.path={path} holds {len(members)} members; expected one; "
        "unpack it and give one file"
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
