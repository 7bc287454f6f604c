"""Files of text of each kind can be read; other files are refused."""

import bz2
import contextlib
import gzip
import io
import lzma
import pickle
import sqlite3
import tarfile
import zipfile

import numpy as np
import pytest

from data import CorpusError, text_file
from tests.data.samples import CONTENT, ZIP, sha256, zipped


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
  """Returns a zip with other bytes at offsets into its list of members."""
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
    (None, "does not exist"),
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
    (ENDLESS, "cannot be read .*(EOFError|Overlapped)"),  # since 3.12.2
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
  """Returns a tar without the magic number that later forms have."""
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


def test_a_folder_is_not_a_file(tmp_path):
  with pytest.raises(CorpusError, match="is not a file"):
    text_file.load(tmp_path)
