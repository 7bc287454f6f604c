"""Which bytes are read when: pure functions, so that nothing is to be saved."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from adaptive_attention.training import parallel


class Batch(NamedTuple):
  """What the devices take at a step, each leaf with their axis N in front.

  Attributes:
    tokens: (A, B, T + 1) uint8; A accumulation steps of B sequences each.
    stop: int32, whether a signal came in.
    restart: bool, whether the streams start anew with this segment.
  """

  tokens: jax.Array
  stop: jax.Array
  restart: jax.Array


def per_device(batch_size: int) -> int:
  """Returns how many sequences a device reads side by side in training."""
  return batch_size // parallel.device_count()


def shapes(
  batch_size: int, accumulation_steps: int, context_tokens: int
) -> Batch:
  """Returns the shapes of what this process' devices take at a step."""
  N, A = parallel.local_device_count(), accumulation_steps
  B = per_device(batch_size) // A
  return Batch(
    jax.ShapeDtypeStruct((N, A, B, context_tokens + 1), np.uint8),
    jax.ShapeDtypeStruct((N,), np.int32),
    jax.ShapeDtypeStruct((N,), np.bool_),
  )


@dataclasses.dataclass(frozen=True)
class Batches:
  """The batches of a run, each a function of its step alone.

  Attributes:
    data: the train split. Each device has a shard of it to itself.
    seed: what the draws follow from.
    batch_size: sequences a step, over all devices and accumulation steps.
    accumulation_steps: into how many parts those of a device are cut.
    context_tokens: T, the length of a sequence.
    streams: whether each sequence goes on where it ended at the step before, as
      a memory needs it, rather than being a random window.
  """

  data: np.ndarray
  seed: int
  batch_size: int
  accumulation_steps: int
  context_tokens: int
  streams: bool

  @property
  def per_device(self) -> int:
    """How many sequences a device reads side by side."""
    return per_device(self.batch_size)

  @property
  def shapes(self) -> Batch:
    """The shapes of what this process' devices take at a step."""
    return shapes(self.batch_size, self.accumulation_steps, self.context_tokens)

  def at(self, step: int, stop: bool = False) -> Batch:
    """Returns what this process' devices take at `step`, the first being 0.

    Args:
      stop: whether this process is asked to end, for all to know.
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
  """Returns (B, T + 1) uint8, random windows.

  Inputs are the first T bytes of a row, targets the last T. `data` is the
  shard's own; the draw differs between shards even where their bytes do not.
  What is returned is a pure function of the arguments.
  """
  generator = np.random.default_rng((seed, step, shard_index))
  starts_B = generator.integers(
    0, len(data) - context_tokens, size=batch_size, dtype=np.int64
  )
  return np.asarray(data)[starts_B[:, None] + np.arange(context_tokens + 1)]


def segments(length: int, batch_size: int, context_tokens: int) -> int:
  """Counts the segments of T tokens of each of B streams through a shard."""
  return (length - 1) // (batch_size * context_tokens)


def stream_batch(data, *, seed, step, shard_index, batch_size, context_tokens):
  """Returns (B, T + 1) uint8, the next segment of each of B streams.

  The streams lie end to end; each goes on at a step where it ended at the one
  before, until all reach their ends together. Then they start anew, from a
  first byte that is drawn for each pass out of those that would be left over.
  A pure function of its arguments, with those of `train_batch`.
  """
  T, B = context_tokens, batch_size
  count = segments(len(data), B, T)
  epoch, segment = divmod(step, count)
  spare = len(data) - 1 - B * T * count
  generator = np.random.default_rng((seed, epoch, shard_index))
  first = generator.integers(0, spare, endpoint=True)
  starts_B = first + T * (count * np.arange(B, dtype=np.int64) + segment)
  return np.asarray(data)[starts_B[:, None] + np.arange(T + 1)]


@dataclasses.dataclass(frozen=True)
class Reading:
  """How a split is cut up for evaluation: batches of rows of T + 1 bytes.

  Row r of batch g holds the bytes from starts[g, r] on and predicts the byte
  after each of its first T; of these predictions those from scored_from to
  scored_to count. Each byte of the split but the first counts in exactly one.
  """

  starts: np.ndarray
  scored_from: np.ndarray
  scored_to: np.ndarray
  context_tokens: int

  def part(self, batches=slice(None), rows=slice(None)):
    """Returns some of the batches, and some of the rows of each."""
    arrays = self.starts, self.scored_from, self.scored_to
    return Reading(*(x[batches, rows] for x in arrays), self.context_tokens)

  def __len__(self):
    return len(self.starts)

  def tokens(self, data, batch: int):
    """Returns (R, T + 1) uint8, zeros beyond the split."""
    starts_R = self.starts[batch]
    tokens = np.zeros((len(starts_R), self.context_tokens + 1), np.uint8)
    for row, start in enumerate(starts_R):
      part = data[start : start + self.context_tokens + 1]
      tokens[row, : len(part)] = part
    return tokens

  def scored(self, batch: int):
    """Yields (row, slice of its predictions, slice of all the split's)."""
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


def windows(
  length: int, context_tokens: int, stride_tokens: int, rows: int
) -> Reading:
  """Returns windows that start every `stride_tokens` of `length` bytes.

  With stride = context they are disjoint. With a shorter stride each window
  but the first counts only its last `stride_tokens` predictions, which have
  seen at least context - stride earlier bytes.
  """
  predictions = length - 1
  beyond_first = max(0, predictions - context_tokens)
  count = 1 + -(-beyond_first // stride_tokens)
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
  """Reads a split of `length` bytes once, in so many streams side by side.

  Batch g holds the g-th segment of each stream. All streams but the first begin
  `warm_tokens`, in whole segments, before what they count, so that what a byte
  has before it does not depend on their number. A split that is no longer than
  that is counted by the first stream alone.
  """
  T = context_tokens
  count = -(-(length - 1) // T)
  warm = min(-(-warm_tokens // T), count)
  # The first stream has nothing before it: while the others warm up it counts,
  # so that all have read as much at any time.
  each = warm + -(-(count - warm) // rows)
  segment_G1 = np.arange(each)[:, None]
  row_R = np.arange(rows)
  starts_GR = T * (row_R * (each - warm) + segment_G1)
  counts_GR = (segment_G1 >= warm) | (row_R == 0)
  scored_to_GR = np.where(counts_GR, np.clip(length - 1 - starts_GR, 0, T), 0)
  return Reading(starts_GR, np.zeros_like(starts_GR), scored_to_GR, T)
