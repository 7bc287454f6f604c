"""Where the bytes come from: each module has a `load` that returns a Corpus."""

import dataclasses
import hashlib

import numpy as np

_LEAST_BYTES = 100  # below this the smaller splits would hold next to nothing
_HASHED_AT_ONCE = 1 << 24


class CorpusError(Exception):
  """Data that cannot be had, told in one sentence."""


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A text in its three splits, as read-only uint8 arrays.

  Attributes:
    name: what results on it are named after.
    sha256: of train, valid and test, one after the other.
  """

  name: str
  sha256: str
  train: np.ndarray
  valid: np.ndarray
  test: np.ndarray


def split(name: str, content, sizes=None, sha256=None) -> Corpus:
  """Cuts bytes into train, valid and test, in this order.

  Args:
    name: of the corpus.
    content: bytes, or a uint8 array.
    sizes: bytes of train, valid and test, which add up to all; without them
      valid and test are 5 per cent each.
    sha256: of the content, if it is known already.

  Raises:
    CorpusError: too few bytes, sizes that do not add up, or an empty split.
  """
  if isinstance(content, bytes):
    content = np.frombuffer(content, np.uint8)
  content = content.view()
  content.flags.writeable = False
  total = len(content)
  if sizes is None:
    small = total * 5 // 100
    sizes = (total - 2 * small, small, small)
  if total < _LEAST_BYTES:
    raise CorpusError(
      f"{name} has {total} bytes; expected at least {_LEAST_BYTES}, for three "
      "splits; give a longer text"
    )
  if sum(sizes) != total:
    raise CorpusError(
      f"{name} has {total:,} bytes; expected {sum(sizes):,}, its splits "
      "together; give the whole file"
    )
  if min(sizes) < 1:
    raise CorpusError(
      f"{name} is to be split into {tuple(sizes)} bytes; expected at least one "
      "in each; give other sizes"
    )
  train, valid, test = np.split(content, np.cumsum(sizes)[:-1])
  return Corpus(name, sha256 or sha256_of(content), train, valid, test)


def sha256_of(content: np.ndarray) -> str:
  """The hex digest of an array's bytes, read piece by piece."""
  digest = hashlib.sha256()
  for start in range(0, len(content), _HASHED_AT_ONCE):
    digest.update(
      np.ascontiguousarray(content[start : start + _HASHED_AT_ONCE])
    )
  return digest.hexdigest()
