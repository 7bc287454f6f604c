"""Bits per token of a split, each token of which is predicted once.

Where the data are bytes, these are bits per character: see `units`.
"""

import dataclasses
import lzma
import math
import time

import jax
import numpy as np

from adaptive_attention.errors import Error
from adaptive_attention.mask_parameters import mask_params
from adaptive_attention.model import Transformer
from adaptive_attention.segment_memory import (
  Groups,
  holds,
  memory_groups,
  reaches,
  tokens_before,
)
from adaptive_attention.state import Stateless
from adaptive_attention.training import (
  batches,
  parallel,
  protocols,
  room,
  steps,
)


class EvaluationError(Error):
  """A split cannot be evaluated."""


_CHUNK_TOKENS = 1024  # of the standard error
_NOT_PREDICTED = -1.0  # no loss is negative


@dataclasses.dataclass(frozen=True)
class Result:
  """The result on a split: totals over counts.

  Attributes:
    bits: total nats / tokens / ln 2.
    stderr: its standard error; see `standard_error`.
    tokens: how many tokens were predicted.
    tokens_per_second: how many were predicted per second.
    chunk_bits: the total bits of each chunk; see `paired`.
  """

  bits: float
  stderr: float
  tokens: int
  tokens_per_second: float
  chunk_bits: np.ndarray

  @property
  def loss(self) -> float:
    """Nats per token."""
    return self.bits * math.log(2)


class Evaluator:
  """Predicts splits with a compiled step.

  Args:
    model: the model to evaluate.
    batch_size: windows or streams at a time on the devices of this process,
      rounded up to a multiple of their number; the result does not depend on
      it.
  """

  def __init__(self, model: Transformer, batch_size: int):
    self._model, self._config = model, model.config
    N = parallel.local_device_count()
    self._batch_size = -(-batch_size // N) * N
    self._step = steps.make_eval_step(model)
    self._compiled = {}  # the program for each number of rows
    self._groups = None  # of a memory, which they are compiled for

  def __call__(
    self,
    params,
    data,
    protocol: str | None = None,
    groups: tuple[Groups, ...] | None = None,
  ) -> Result:
    """Evaluates `params`, replicated, on all tokens of `data`.

    The arguments and errors are those of `losses`.
    """
    nats, seconds = self.losses(params, data, protocol, groups)
    chunk_bits = chunk_sums(nats) / math.log(2)
    return Result(
      bits=nats.mean() / math.log(2),
      stderr=standard_error(chunk_bits, len(nats)),
      tokens=len(nats),
      tokens_per_second=len(nats) / seconds,
      chunk_bits=chunk_bits,
    )

  def losses(
    self,
    params,
    data,
    protocol: str | None = None,
    groups: tuple[Groups, ...] | None = None,
  ) -> tuple[np.ndarray, float]:
    """Returns (nats of each token but the first, in float64; seconds).

    All compiling is done before the clock starts.

    Args:
      params: the parameters, replicated.
      data: the tokens.
      protocol: one that `protocols.check` accepts; None for the model's own.
        There are fewer streams than `batch_size` if warming them would more
        than double the cost.
      groups: of the heads of a memory, for which a program may be compiled
        already. By default, or if some head reaches further, they are those of
        what the heads reach.

    Raises:
      SettingsError: as `protocols.check`.
      EvaluationError: no token is predicted, or losses are not finite.
      RoomError: a batch takes more memory than one process has.
    """
    if protocol is None:
      protocol = protocols.default(self._config)
    protocols.check(protocol, self._config)
    if len(data) < 2:
      raise EvaluationError(
        f"a split of {len(data)} token(s) is too short; expected at least 2, "
        "as the first is not predicted; give a longer one"
      )
    reading = self._reading(params, len(data), protocol)
    self._compile_for(params, protocol, groups)
    if (rows := reading.starts.shape[1]) not in self._compiled:
      self._compiled[rows] = self._program(params, reading)
      self._predict(params, data, reading.part(slice(1)))
    start = time.perf_counter()
    nats = self._predict(params, data, reading)
    nats = parallel.gather(nats[None]).max(axis=0).astype(np.float64)
    seconds = time.perf_counter() - start
    assert (nats != _NOT_PREDICTED).all()
    if not np.isfinite(nats).all():
      raise EvaluationError(
        f"{np.sum(~np.isfinite(nats)):,} of {len(nats):,} tokens have a loss "
        "that is not finite; choose an older checkpoint with --step=N"
      )
    return nats, seconds

  def _compile_for(self, params, protocol, groups):
    """Makes the step anew if a memory of other groups is needed."""
    config = self._config
    if not protocols.reads_streams(protocol):
      groups = None
    else:
      layers = mask_params(params, config)
      if groups is None or not holds(groups, layers, config):
        groups = memory_groups(layers, config, config.context_tokens)
    if groups != self._groups:
      self._groups, self._compiled = groups, {}
      parallel.drop_programs()
      self._step = steps.make_eval_step(self._model)

  def _reading(self, params, length, protocol) -> batches.Reading:
    """Returns the share of this process."""
    T, R = self._config.context_tokens, self._batch_size
    if protocols.reads_streams(protocol):
      streams = self._streams(params, length)
      mine = parallel.process_share(streams.starts.shape[1])
      return streams.part(rows=slice(mine.start, mine.stop))
    stride = T if protocol == "window" else int(protocol.split(":")[1])
    # No more rows than there are windows: the others would be computed too.
    N = parallel.local_device_count()
    share = N * parallel.process_count()
    needed = -(-batches.window_count(length, T, stride) // share) * N
    windows = batches.windows(length, T, stride, min(R, needed))
    mine = parallel.process_share(len(windows))
    return windows.part(slice(mine.start, mine.stop))

  def _streams(self, params, length) -> batches.Reading:
    """Cuts a split into streams that read at most twice its length together."""
    config = self._config
    T, M = config.context_tokens, config.memory_tokens
    reach_LG = reaches(mask_params(params, config), config, T)
    warm_tokens = tokens_before([max(reach_G) for reach_G in reach_LG], M, T)
    N = parallel.local_device_count()
    per_device = self._batch_size // N
    while True:
      rows = parallel.process_count() * N * per_device
      streams = batches.streams(length, T, warm_tokens, rows)
      if per_device == 1 or streams.starts.size * T <= 2 * length:
        return streams
      per_device //= 2

  def _program(self, params, reading):
    """Compiles the step for the rows of a reading, if there is room for it."""
    N, T = parallel.local_device_count(), self._config.context_tokens
    memory = jax.eval_shape(lambda: self._memory(reading))
    rows = reading.starts.shape[1] // N
    tokens = jax.ShapeDtypeStruct((N, rows, T + 1), np.int32)
    step, sizes = parallel.compile_step(self._step, params, memory, tokens)
    if sizes:
      fewer = "read fewer sequences at a time (--config.eval_batch_size)"
      room.check(sizes["total"], "a step of evaluation", fewer)
    return step

  def _memory(self, reading):
    """Makes the memory of the streams that are read, if there is one."""
    if not self._groups:
      return Stateless(self._config.n_layer)
    N = parallel.local_device_count()
    first_NB = reading.starts[0].astype(np.uint32).reshape(N, -1)
    memory = steps.start_memory(self._config, first_NB.shape[1], self._groups)
    return memory.replace(first_position=parallel.deal(first_NB))

  def _predict(self, params, data, reading):
    """Returns (len(data) - 1,) nats in float32, for the tokens of a reading."""
    N, T = parallel.local_device_count(), self._config.context_tokens
    nats = np.full(len(data) - 1, _NOT_PREDICTED, np.float32)
    step, memory = (
      self._compiled[reading.starts.shape[1]],
      self._memory(reading),
    )
    for batch in range(len(reading)):
      tokens = reading.tokens(data, batch).reshape(N, -1, T + 1)
      memory, nats_NBT = step(params, memory, tokens)
      nats_RT = np.asarray(nats_NBT).reshape(-1, T)
      for row, found, of_all in reading.scored(batch):
        nats[of_all] = nats_RT[row, found]
    return nats


def _chunk_starts(count: int) -> np.ndarray:
  """Returns where the chunks begin of so many tokens; two or more, if any."""
  return np.arange(0, count, min(_CHUNK_TOKENS, -(-count // 2)))


def chunk_sums(losses: np.ndarray) -> np.ndarray:
  """Returns the total of each chunk of the tokens' losses."""
  return np.add.reduceat(losses, _chunk_starts(len(losses)))


def standard_error(sums: np.ndarray, count: int) -> float:
  """Returns the standard error of the mean of `count` losses.

  Neighbouring chunks are of one article and alike, so that n chunks tell less
  than n independent ones. With r, what the chunks have more than the mean, the
  variance of their sum is taken to be

    n / (n - k) sum_ij max(0, 1 - |i - j| / k) r_i r_j,  k = floor(n^(1/3)),

  which grows with what chunks less than k apart have in common (Newey and West,
  1987), or that of k = 1, independent chunks, if it is larger.

  Args:
    sums: their `chunk_sums`, or what two of these differ by.
  """
  if count == 1:
    return 0.0  # it is unknown; 0 keeps the record valid JSON
  counts = np.diff(np.append(_chunk_starts(count), count))
  residuals = sums - np.sum(sums) / count * counts
  n = len(sums)

  def variance(k):
    # Squares of the sums of k neighbours hold each pair k - |i - j| times.
    neighbours = np.convolve(residuals, np.ones(k))
    return n / (n - k) * np.sum(neighbours**2) / k

  return math.sqrt(max(variance(1), variance(int(math.cbrt(n))))) / count


def order0_entropy(data) -> float:
  """Returns the entropy of the tokens' frequencies, in bits per token."""
  counts = np.bincount(np.asarray(data))
  shares = counts[counts > 0] / len(data)
  return float(-np.sum(shares * np.log2(shares)))


def lzma_bits_per_char(data) -> float:
  """Returns the bits per character of the same bytes, compressed by lzma."""
  compressed = lzma.compress(np.asarray(data).tobytes())
  return 8 * len(compressed) / len(data)
