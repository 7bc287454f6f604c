"""Files of tokens: their widths, splits and digests, and what is refused."""

import hashlib
import json
import os

import numpy as np
import pytest

from data import CorpusError, digests, tokens

VOCABULARY = 50_257
TRAIN, VALID, TEST = (
  np.random.default_rng(i).integers(0, VOCABULARY, size)
  for i, size in enumerate((1_001, 101, 77))
)


@pytest.fixture
def cache(tmp_path):
  return tmp_path / "cache"


def folder(path, dtype, **splits):
  path.mkdir(exist_ok=True)
  for name, split in splits.items():
    split.astype(dtype).tofile(path / f"{name}.bin")
  return path


def load(path, cache, vocab_size=VOCABULARY, **options):
  return tokens.load(path, vocab_size, cache, **options)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_a_folder_of_nanogpt(tmp_path, cache, dtype):
  path = folder(tmp_path / "owt", dtype, train=TRAIN, val=VALID)
  corpus = load(path, cache, bytes_per_token=4.2)
  np.testing.assert_array_equal(corpus.train, TRAIN)
  np.testing.assert_array_equal(corpus.valid, VALID)
  assert (len(corpus.test), corpus.train.dtype) == (0, np.dtype(dtype))
  assert corpus.largest == max(TRAIN.max(), VALID.max())
  assert (corpus.name, corpus.unit) == ("owt", "token")
  assert corpus.bytes_per_token == 4.2
  assert (
    isinstance(corpus.train, np.memmap) and not corpus.train.flags.writeable
  )
  # A test.bin is the test split, and another file is another corpus.
  folder(path, dtype, test=TEST)
  with_test = load(path, cache)
  np.testing.assert_array_equal(with_test.test, TEST)
  assert with_test.sha256 != corpus.sha256
  folder(path, dtype, test=TEST[::-1])
  assert load(path, cache).sha256 != with_test.sha256


def test_a_vocabulary_beyond_16_bits(tmp_path, cache):
  train = TRAIN + 70_000
  path = folder(tmp_path / "wide", "<u4", train=train, val=VALID)
  for vocab_size in (130_000, 50_000):  # the smaller is refused later
    np.testing.assert_array_equal(load(path, cache, vocab_size).train, train)


def test_bytes_in_32_bits(tmp_path, cache):
  path = folder(tmp_path / "bytes", "<u4", train=TRAIN % 256, val=VALID % 256)
  np.testing.assert_array_equal(load(path, cache, 256).train, TRAIN % 256)


def test_few_tokens_of_16_bits_are_not_taken_for_32(tmp_path, cache):
  train, val = TRAIN % 4, VALID[:100] % 4
  path = folder(tmp_path / "dna", "<u2", train=train[:1000], val=val)
  np.testing.assert_array_equal(load(path, cache, 4).train, train[:1000])


@pytest.mark.parametrize("dtype", ["u1", "<i2", ">u4", "i8", "u8"])
def test_an_array_of_any_integers(tmp_path, cache, dtype):
  whole = np.concatenate([TRAIN, VALID]) % 120
  path = tmp_path / "tokens.npy"
  np.save(path, whole.astype(dtype))
  corpus = load(path, cache)
  splits = corpus.train, corpus.valid, corpus.test
  np.testing.assert_array_equal(np.concatenate(splits), whole)
  assert [len(s) for s in splits] == [len(whole) - 2 * 55, 55, 55]
  assert corpus.largest == whole.max()
  assert corpus.sha256 == hashlib.sha256(whole.astype(dtype)).hexdigest()


def refused(path, cache, message, vocab_size=VOCABULARY):
  with pytest.raises(CorpusError, match=message) as error:
    load(path, cache, vocab_size)
  assert "\n" not in str(error.value)


def test_what_is_refused(tmp_path, cache):
  path = tmp_path / "empty"
  path.mkdir()
  refused(path, cache, r"train\.bin: No such file .*give complete files")
  folder(path, "<u2", train=TRAIN)
  refused(path, cache, r"val\.bin: No such file")
  (path / "val.bin").write_bytes(b"")
  refused(path, cache, r"val\.bin has 0 bytes; expected at least two tokens")
  (path / "val.bin").write_bytes(b"abcde")
  refused(path, cache, "has 5 bytes; .*no part of one")
  folder(path, "<u4", train=TRAIN)
  folder(path, "<u2", val=VALID)
  refused(path, cache, r"32 bits in train\.bin and none in val\.bin")
  (path / "val.bin").unlink()
  (path / "val.bin").mkdir()
  refused(path, cache, "data.path=.* cannot be read")

  array = tmp_path / "a.npy"
  for wrong, message in (
    (TRAIN * 1.0, r"float64 of the shape \(1001,\); expected one axis"),
    (TRAIN[:1000].reshape(10, 100), r"int64 of the shape \(10, 100\)"),
    (TRAIN[:99], "has 99 tokens; expected at least 100"),
    (TRAIN[:0], "has 0 tokens"),
    (TRAIN - 60_000, r"holds the number -\d+; expected tokens, from 0 on"),
    (np.array([None] * 200), "not an array of numbers"),
  ):
    np.save(array, wrong, allow_pickle=True)
    refused(array, cache, message)
  for content in (b"", b"no array", b"\x93NUMPY"):
    array.write_bytes(content)
    refused(array, cache, "not an array of numbers")
  refused(tmp_path / "none.npy", cache, "No such file")
  with array.open("wb") as file:
    np.savez(file, a=TRAIN)
  refused(array, cache, "not an array of numbers")
  cut = tmp_path / "cut.npy"
  np.save(cut, TRAIN)
  os.truncate(cut, cut.stat().st_size - 3)
  refused(cut, cache, "not an array of numbers")


def count_reads(monkeypatch):
  read, reads = digests._read, []

  def counted(content, dtypes):
    reads.append(len(content))
    return read(content, dtypes)

  monkeypatch.setattr(digests, "_read", counted)
  return reads


def test_a_file_is_read_once(tmp_path, cache, monkeypatch):
  path = folder(tmp_path / "owt", "<u2", train=TRAIN, val=VALID)
  reads = count_reads(monkeypatch)
  first = load(path, cache)
  assert len(reads) == 2
  again = load(path, cache)
  assert len(reads) == 2
  assert (again.sha256, again.largest) == (first.sha256, first.largest)
  # A file that has changed is read again, also if its size has not.
  folder(path, "<u2", val=VALID[::-1])
  os.utime(path / "val.bin", ns=(1, 1))
  assert load(path, cache).sha256 != first.sha256
  assert len(reads) == 3


@pytest.mark.parametrize("content", ["", "{", "[]", "5", '{"PATH": 5}'])
def test_a_damaged_file_of_digests_is_written_anew(tmp_path, cache, content):
  path = folder(tmp_path / "owt", "<u2", train=TRAIN, val=VALID)
  expected = load(path, cache)
  kept = cache / "digests.json"
  kept.write_text(content.replace("PATH", str(path / "train.bin")))
  assert load(path, cache).sha256 == expected.sha256
  assert len(json.loads(kept.read_text())) == 2
  assert [p.name for p in cache.iterdir()] == ["digests.json"]


def test_digests_that_cannot_be_kept_are_said(tmp_path):
  path = folder(tmp_path / "owt", "<u2", train=TRAIN, val=VALID)
  in_the_way, said = tmp_path / "file", []
  in_the_way.write_text("")
  load(path, in_the_way, log=said.append)
  assert len(said) == 1 and "read for their sha256 each time" in said[0]


def test_bounds_are_those_of_all_pieces(tmp_path, cache, monkeypatch):
  monkeypatch.setattr(digests, "_READ_AT_ONCE", 64)
  path = folder(tmp_path / "owt", "<u2", train=TRAIN, val=VALID)
  corpus = load(path, cache)
  assert corpus.largest == max(TRAIN.max(), VALID.max())
  of_files = "".join(
    hashlib.sha256((path / name).read_bytes()).hexdigest()
    for name in ("train.bin", "val.bin")
  )
  assert corpus.sha256 == hashlib.sha256(of_files.encode()).hexdigest()
