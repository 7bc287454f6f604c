"""Which tokens are read when: pure functions, so that nothing needs saving."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from adaptive_attention.training import parallel


class Batch(NamedTuple):
  """The input of a step; each leaf has the devices' axis N in front.

  Attributes:
    tokens: (A, B, T + 1) int32; A accumulation steps of B sequences each.
    stop: int32, whether a signal came in.
    restart: bool, whether the streams start again with this segment.
  """

  tokens: jax.Array
  stop: jax.Array
  restart: jax.Array


def per_device(batch_size: int, accumulation_steps: int = 1) -> int:
  """Returns how many sequences of a batch, or of a part of it, a device has."""
  return batch_size // parallel.device_count() // accumulation_steps


def shapes(
  batch_size: int, accumulation_steps: int, context_tokens: int
) -> Batch:
  """Returns the shapes of a step's input on the devices of this process."""
  N, A = parallel.local_device_count(), accumulation_steps
  B = per_device(batch_size, A)
  return Batch(
    jax.ShapeDtypeStruct((N, A, B, context_tokens + 1), np.int32),
    jax.ShapeDtypeStruct((N,), np.int32),
    jax.ShapeDtypeStruct((N,), np.bool_),
  )


@dataclasses.dataclass(frozen=True)
class Batches:
  """The batches of a run, each a function of its step alone.

  Attributes:
    data: the train split. Each device has a shard of it to itself.
    seed: the number that all draws follow from.
    batch_size: sequences per step, over all devices and accumulation steps.
    accumulation_steps: into how many parts the sequences of a device are cut.
    context_tokens: T, the length of a sequence.
    streams: whether each sequence goes on where it ended at the step before, as
      a memory needs it; otherwise each is drawn at random.
  """

  data: np.ndarray
  seed: int
  batch_size: int
  accumulation_steps: int
  context_tokens: int
  streams: bool

  @property
  def per_device(self) -> int:
    """Returns how many sequences a device reads side by side."""
    return per_device(self.batch_size)

  @property
  def shapes(self) -> Batch:
    """Returns the shapes of a step's input on the devices of this process."""
    return shapes(self.batch_size, self.accumulation_steps, self.context_tokens)

  def at(self, step: int, stop: bool = False) -> Batch:
    """Returns the input of `step` for this process; the first step is 0.

    Args:
      stop: whether this process is asked to end; all processes learn it.
    """
    B, T = self.per_device, self.context_tokens
    N, count = parallel.local_device_count(), parallel.device_count()
    draw = stream_batch if self.streams else train_batch
    tokens_NBT = np.stack(
      [
        draw(
          shard(self.data, i, count),
          seed=self.seed,
          step=step,
          shard_index=i,
          batch_size=B,
          context_tokens=T,
        )
        for i in parallel.local_shards()
      ]
    )
    length = len(self.data) // count
    restart = self.streams and step % segments(length, B, T) == 0
    return Batch(
      tokens_NBT.reshape(self.shapes.tokens.shape),
      np.full(N, stop, np.int32),
      np.full(N, restart),
    )


def shard(data, index: int, count: int):
  """Returns the index-th of `count` contiguous parts, all of one length."""
  length = len(data) // count
  return data[index * length : (index + 1) * length]


def train_batch(data, *, seed, step, shard_index, batch_size, context_tokens):
  """Returns (B, T + 1) int32: random parts of a shard.

  Inputs are the first T tokens of a row, targets the last T. `data` is the
  shard's own; the draw differs between shards even where their tokens do not.
  It depends on the arguments alone.
  """
  generator = np.random.default_rng((seed, step, shard_index))
  starts_B = generator.integers(
    0, len(data) - context_tokens, size=batch_size, dtype=np.int64
  )
  return _rows(data, starts_B, context_tokens)


def segments(length: int, batch_size: int, context_tokens: int) -> int:
  """Returns how many segments of T tokens each of B streams has in a shard."""
  return (length - 1) // (batch_size * context_tokens)


def stream_batch(data, *, seed, step, shard_index, batch_size, context_tokens):
  """Returns (B, T + 1) int32: the next segment of each of B streams.

  The streams lie end to end in the shard; each goes on at a step where it ended
  at the one before, until all reach their ends together. Then they start again,
  from a first token that is drawn for each pass out of those that would be left
  over. The arguments are those of `train_batch`; the result depends on them
  alone.
  """
  T, B = context_tokens, batch_size
  count = segments(len(data), B, T)
  epoch, segment = divmod(step, count)
  spare = len(data) - 1 - B * T * count
  generator = np.random.default_rng((seed, epoch, shard_index))
  first = generator.integers(0, spare, endpoint=True)
  starts_B = first + T * (count * np.arange(B, dtype=np.int64) + segment)
  return _rows(data, starts_B, T)


def _rows(data, starts_B, context_tokens):
  """Returns the T + 1 tokens from each start on, whatever dtype stores them."""
  index_BT = starts_B[:, None] + np.arange(context_tokens + 1)
  return np.asarray(data)[index_BT].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Reading:
  """A split cut up for evaluation: batches of rows of T + 1 tokens.

  Row r of batch g holds the tokens from starts[g, r] on and predicts the one
  after each of its first T; of these predictions those from scored_from to
  scored_to count. Each token of the split but the first counts in exactly one.
  """

  starts: np.ndarray
  scored_from: np.ndarray
  scored_to: np.ndarray
  context_tokens: int

  def part(self, batches=slice(None), rows=slice(None)):
    """Returns the reading of some batches, and of some rows of each."""
    arrays = self.starts, self.scored_from, self.scored_to
    return Reading(*(x[batches, rows] for x in arrays), self.context_tokens)

  def __len__(self):
    return len(self.starts)

  def tokens(self, data, batch: int):
    """Returns (R, T + 1) int32, zeros beyond the split."""
    starts_R = self.starts[batch]
    tokens = np.zeros((len(starts_R), self.context_tokens + 1), np.int32)
    for row, start in enumerate(starts_R):
      part = data[start : start + self.context_tokens + 1]
      tokens[row, : len(part)] = part
    return tokens

  def scored(self, batch: int):
    """Yields (row, slice of its predictions, slice of the split's) to count."""
    for row, (start, first, last) in enumerate(
      zip(
        self.starts[batch],
        self.scored_from[batch],
        self.scored_to[batch],
        strict=True,
      )
    ):
      if first < last:
        yield row, slice(first, last), slice(start + first, start + last)


def window_count(length: int, context_tokens: int, stride_tokens: int) -> int:
  """Returns how many windows `windows` cuts a split into."""
  beyond_first = max(0, length - 1 - context_tokens)
  return 1 + -(-beyond_first // stride_tokens)


def windows(
  length: int, context_tokens: int, stride_tokens: int, rows: int
) -> Reading:
  """Cuts a split of `length` tokens into windows, one every `stride_tokens`.

  With stride = context they are disjoint. With a shorter stride each window
  but the first counts only its last `stride_tokens` predictions, each of which
  has at least context - stride earlier tokens before it.
  """
  predictions = length - 1
  count = window_count(length, context_tokens, stride_tokens)
  starts = np.arange(-(-count // rows) * rows) * stride_tokens
  scored_from = np.full(len(starts), context_tokens - stride_tokens)
  scored_from[0] = 0
  scored_to = np.clip(predictions - starts, 0, context_tokens)
  scored_to[count:] = 0
  return Reading(
    *(x.reshape(-1, rows) for x in (starts, scored_from, scored_to)),
    context_tokens,
  )


def streams(
  length: int, context_tokens: int, warm_tokens: int, rows: int
) -> Reading:
  """Cuts a split of `length` tokens into `rows` streams, read side by side.

  Batch g holds the g-th segment of each stream. All streams but the first begin
  `warm_tokens`, rounded up to segments, before the tokens that they count. So
  the tokens before a prediction do not depend on the number of streams. A
  split that is no longer than these tokens is counted by the first stream.
  """
  T = context_tokens
  count = -(-(length - 1) // T)
  warm = min(-(-warm_tokens // T), count)
  # The first stream has nothing before it. It counts while the others warm up,
  # so that all have read the same number of tokens at any time.
  each = warm + -(-(count - warm) // rows)
  segment_G1 = np.arange(each)[:, None]
  row_R = np.arange(rows)
  starts_GR = T * (row_R * (each - warm) + segment_G1)
  counts_GR = (segment_G1 >= warm) | (row_R == 0)
  scored_to_GR = np.where(counts_GR, np.clip(length - 1 - starts_GR, 0, T), 0)
  return Reading(starts_GR, np.zeros_like(starts_GR), scored_to_GR, T)
