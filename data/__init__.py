"""Sources of data: each module has a `load` that returns a Corpus."""

import dataclasses
import hashlib
import pathlib

import numpy as np

_LEAST_BYTES = 100  # with fewer the smaller splits are almost empty
_HASHED_AT_ONCE = 1 << 24


class CorpusError(Exception):
  """Data cannot be read or fetched; the message is one sentence.

  It is told like an `adaptive_attention.errors.Error`, and is none, as the data
  know nothing of the package.
  """

  exit_code = 1


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Bytes or tokens in three splits, as read-only arrays of integers.

  Attributes:
    name: the name under which results are reported.
    sha256: the digest of what is in the splits.
    train, valid, test: the splits; `test` may be empty where tokens are read.
    largest: a number that no token exceeds.
    bytes_per_token: how many bytes of text a token stands for, on average; None
      if that is not known.
    unit: what an element of a split is: "byte" or "token".
  """

  name: str
  sha256: str
  train: np.ndarray
  valid: np.ndarray
  test: np.ndarray
  largest: int = 255
  bytes_per_token: float | None = 1.0
  unit: str = "byte"

  def __post_init__(self):
    # Of arrays that are mapped into memory numpy knows the file.
    parts = (self.train, self.valid, self.test)
    names = {getattr(part, "filename", None) for part in parts} - {None}
    object.__setattr__(self, "_files", {n: _identity(n) for n in names})

  def check_unchanged(self):
    """Checks that no file was written to that is read as needed.

    A file that was replaced by another one is still read as it was.

    Raises:
      CorpusError: naming the file.
    """
    for name, (file, *seen) in self._files.items():
      try:
        found, *now = _identity(name)
      except OSError:  # it was removed, or its disk is gone
        continue
      if found == file and now != seen:
        raise CorpusError(
          f"{name} was written to while it was read, so nothing is known of "
          "what was learned from it; give the file as it was, and the same "
          "command again"
        )


def _identity(name):
  """Returns (which file it is, its bytes, the time of its last change)."""
  stat = pathlib.Path(name).stat()
  return (stat.st_dev, stat.st_ino), stat.st_size, stat.st_mtime_ns


def split(name: str, content, sizes=None, sha256=None) -> Corpus:
  """Cuts bytes into train, valid and test, in this order.

  Args:
    name: the name of the corpus.
    content: bytes, or a uint8 array.
    sizes: the numbers of bytes of train, valid and test, which must add up to
      all; None for 5 per cent each of valid and test.
    sha256: the digest of the content, if it is known already.

  Raises:
    CorpusError: there are too few bytes, the sizes do not add up, or a split is
      empty.
  """
  if isinstance(content, bytes):
    content = np.frombuffer(content, np.uint8)
  content = content.view()
  content.flags.writeable = False
  total = len(content)
  if sizes is None:
    sizes = sizes_of(total)
  if total < _LEAST_BYTES:
    raise CorpusError(
      f"{name} has {total} bytes; expected at least {_LEAST_BYTES} for "
      "three splits; give a longer text"
    )
  if sum(sizes) != total:
    raise CorpusError(
      f"{name} has {total:,} bytes; expected {sum(sizes):,}, the sum of "
      "its splits; give the complete file"
    )
  if min(sizes) < 1:
    raise CorpusError(
      f"{name} is split into {tuple(sizes)} bytes; expected at least one in "
      "each split; give other sizes"
    )
  train, valid, test = np.split(content, np.cumsum(sizes)[:-1])
  return Corpus(name, sha256 or sha256_of(content), train, valid, test)


def sizes_of(total: int) -> tuple[int, int, int]:
  """Returns the sizes of train, valid and test, 90, 5 and 5 per cent."""
  small = total * 5 // 100
  return total - 2 * small, small, small


def sha256_of(content: np.ndarray) -> str:
  """Returns the hex digest of an array's bytes, read in pieces."""
  digest = hashlib.sha256()
  for start in range(0, len(content), _HASHED_AT_ONCE):
    digest.update(
      np.ascontiguousarray(content[start : start + _HASHED_AT_ONCE])
    )
  return digest.hexdigest()
