"""Tokens of a tokenizer: train.bin and val.bin of nanoGPT, or an .npy.

They stay on the disk and are read as needed. A file is read whole once, for its
sha256 and the bounds of its tokens; data/digests.py keeps them.
"""

import hashlib
import pathlib

import numpy as np

from data import Corpus, CorpusError, sizes_of
from data.digests import Digests

# What a .bin may hold. nanoGPT writes 16 bits a token; a vocabulary of more
# than 65,536 needs 32.
_NARROW, _WIDE = np.dtype("<u2"), np.dtype("<u4")
_LEAST_TOKENS = 100  # of an .npy, which is split


def load(
  path, vocab_size: int, cache_dir, *, bytes_per_token=None, log=None
) -> Corpus:
  """Returns the tokens of a folder or of an .npy.

  A folder holds `train.bin`, `val.bin` and perhaps `test.bin`: unsigned numbers
  of 16 or 32 bits without a header, the lowest byte first; which of them, their
  bytes tell. An .npy holds one axis of integers of any width, and is split
  90/5/5 per cent.

  Args:
    path: the folder, or the .npy.
    vocab_size: the size of the model's vocabulary.
    cache_dir: where digests and bounds are kept.
    bytes_per_token: how many bytes of text a token stands for on average; None
      if that is not known.
    log: a function that takes lines.

  Raises:
    CorpusError: a file is missing, cannot be read or holds something else, or
      there are too few tokens or one below 0.
  """
  path = pathlib.Path(path)
  try:
    with Digests(cache_dir, log) as digests:
      read = _folder if path.is_dir() else _array
      splits, sha256, bounds = read(path, vocab_size, digests)
  except OSError as error:
    raise CorpusError(
      f"data.path={path} cannot be read ({error.filename or path}: "
      f"{error.strerror or error}); give complete files that may be read"
    ) from error
  least = min(bound[0] for bound in bounds)
  largest = max(bound[1] for bound in bounds)
  if least < 0:
    raise CorpusError(
      f"data.path={path} holds the number {least}; expected tokens, from 0 on; "
      "give the numbers of a tokenizer"
    )
  return Corpus(
    path.name,
    sha256,
    *splits,
    largest=largest,
    bytes_per_token=bytes_per_token,
    unit="token",
  )


def _folder(path, vocab_size, digests):
  """Returns (train, valid, test), the digest, and the bounds of each file."""
  found = {}
  for name in ("train.bin", "val.bin", "test.bin"):
    if name != "test.bin" or (path / name).exists():
      content = _content(path / name)
      found[name] = content, digests.of(path / name, content, _NARROW, _WIDE)
  wide = {n: _is_wide(*found[n], vocab_size) for n in found}
  if wide["train.bin"] and not all(wide.values()):
    raise CorpusError(
      f"data.path={path} holds tokens of 32 bits in train.bin and none in "
      f"{min(wide, key=wide.get)}; write all files with one dtype"
    )
  dtype = _WIDE if wide["train.bin"] else _NARROW
  splits = [content.view(dtype) for content, _ in found.values()]
  if len(splits) < 3:
    splits.append(np.zeros(0, dtype))
  joined = "".join(digest.sha256 for _, digest in found.values())
  bounds = [digest.bounds[dtype.str] for _, digest in found.values()]
  return splits, hashlib.sha256(joined.encode()).hexdigest(), bounds


def _is_wide(content, digest, vocab_size):
  """Returns whether a .bin holds numbers of 32 bits, not of 16.

  It does if they all are tokens of the vocabulary: of pairs of 16 bits each
  second one were 0. It also does, for a larger vocabulary than the given, if
  their highest bytes are 0, unless all numbers of 16 bits are less than 256.
  """
  if len(content) % _WIDE.itemsize:
    return False
  narrow, wide = (digest.bounds[dtype.str][1] for dtype in (_NARROW, _WIDE))
  return wide < vocab_size or (wide < 1 << 24 and narrow >= 256)


def _content(path):
  """Returns the bytes of a .bin, memory-mapped."""
  size = path.stat().st_size
  if size < 2 * _NARROW.itemsize or size % _NARROW.itemsize:
    raise CorpusError(
      f"{path} has {size} bytes; expected at least two tokens of 16 or 32 bits "
      "and no part of one; write it again"
    )
  return np.memmap(path, np.uint8, mode="r")


def _array(path, vocab_size, digests):
  """Returns (train, valid, test), the digest, and the bounds, of an .npy."""
  del vocab_size  # an .npy says itself how wide its integers are
  try:
    tokens = np.lib.format.open_memmap(path, mode="r")
  except OSError:
    raise
  except Exception as error:  # of numpy, and of the parsers that it calls
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    raise CorpusError(
      f"data.path={path} is not an array of numbers ({reason}); save one with "
      "numpy.save"
    ) from error
  if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
    raise CorpusError(
      f"data.path={path} holds {tokens.dtype} of the shape {tokens.shape}; "
      "expected one axis of integers; save the tokens end to end"
    )
  if len(tokens) < _LEAST_TOKENS:
    raise CorpusError(
      f"data.path={path} has {len(tokens)} tokens; expected at least "
      f"{_LEAST_TOKENS} for three splits; give more"
    )
  digest = digests.of(path, tokens.view(np.uint8), tokens.dtype)
  splits = np.split(tokens, np.cumsum(sizes_of(len(tokens)))[:-1])
  return splits, digest.sha256, [digest.bounds[tokens.dtype.str]]
