"""Which bytes are read when: pure functions, so that nothing is to be saved."""

import dataclasses

import numpy as np


def shard(data, index: int, count: int):
  """The index-th of `count` contiguous parts, all of one length."""
  length = len(data) // count
  return data[index * length : (index + 1) * length]


def train_batch(data, *, seed, step, shard_index, batch_size, context_tokens):
  """(B, T + 1) uint8: random windows, a pure function of its arguments.

  Inputs are the first T bytes of a row, targets the last T. `data` is the
  shard's own; the draw differs between shards even where their bytes do not.
  """
  generator = np.random.default_rng((seed, step, shard_index))
  starts_B = generator.integers(
    0, len(data) - context_tokens, size=batch_size, dtype=np.int64
  )
  return np.asarray(data)[starts_B[:, None] + np.arange(context_tokens + 1)]


@dataclasses.dataclass(frozen=True)
class Windows:
  """How a split is cut up for evaluation.

  Window i reads the bytes from starts[i] on, T at most, and predicts the byte
  after each; of its predictions those from scored_from[i] to scored_to[i]
  count. Each byte of the split but the first counts in exactly one window.
  """

  starts: np.ndarray
  scored_from: np.ndarray
  scored_to: np.ndarray
  context_tokens: int

  def __len__(self):
    return len(self.starts)

  def rows(self, data, first: int, count: int):
    """(count, T + 1) uint8: the windows from `first` on, zeros beyond."""
    tokens = np.zeros((count, self.context_tokens + 1), np.uint8)
    for row, start in enumerate(self.starts[first : first + count]):
      part = data[start : start + self.context_tokens + 1]
      tokens[row, : len(part)] = part
    return tokens


def windows(length: int, context_tokens: int, stride_tokens: int) -> Windows:
  """Windows that start every `stride_tokens` of a split of `length` bytes.

  With stride = context they are disjoint. With a shorter stride each window
  but the first counts only its last `stride_tokens` predictions, which have
  seen at least context - stride earlier bytes.
  """
  predictions = length - 1
  beyond_first = max(0, predictions - context_tokens)
  count = 1 + -(-beyond_first // stride_tokens)
  starts = np.arange(count) * stride_tokens
  scored_from = np.full(count, context_tokens - stride_tokens)
  scored_from[0] = 0
  scored_to = np.minimum(context_tokens, predictions - starts)
  return Windows(starts, scored_from, scored_to, context_tokens)
