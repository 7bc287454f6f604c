"""Bits per token of a split, each token of which is predicted once.

Where the data are bytes, these are bits per character: see `units`.
"""

import dataclasses
import lzma
import math
import re
import time

import numpy as np

from adaptive_attention.attention import decode
from adaptive_attention.config import ModelConfig
from adaptive_attention.errors import Error, SettingsError
from adaptive_attention.mask_parameters import mask_params
from adaptive_attention.model import Transformer
from adaptive_attention.segment_memory import tokens_before
from adaptive_attention.state import Stateless
from adaptive_attention.training import (
  batches,
  parallel,
  steps,
)


class EvaluationError(Error):
  """A split cannot be evaluated."""


_CHUNK_TOKENS = 1024  # of the standard error: neighbours are not independent
_NOT_PREDICTED = -1.0  # no loss is negative


@dataclasses.dataclass(frozen=True)
class Result:
  """The result on a split: totals over counts.

  Attributes:
    bits: total nats / tokens / ln 2.
    stderr: its standard error, from the spread over chunks of 1024 tokens.
    tokens: how many tokens were predicted.
    tokens_per_second: how many were predicted per second.
  """

  bits: float
  stderr: float
  tokens: int
  tokens_per_second: float

  @property
  def loss(self) -> float:
    """Nats per token."""
    return self.bits * math.log(2)


def default_protocol(config: ModelConfig) -> str:
  """Returns "memory" for a model that has one, else "window"."""
  return "memory" if config.memory_tokens else "window"


def check_protocol(protocol: str, config: ModelConfig):
  """Checks that a protocol is known and fits the model.

  Raises:
    SettingsError: it is not "window", "memory" or "stride:N", the stride is not
      in 1..context, or the model has no memory.
  """
  match re.fullmatch(r"window|memory|stride:(\d+)", protocol):
    case None:
      raise SettingsError(
        f"--protocol={protocol} is unknown; expected window, stride:N or memory"
      )
    case found if found[1] is not None:
      if not 1 <= int(found[1]) <= config.context_tokens:
        raise SettingsError(
          f"--protocol={protocol} is not possible; expected a stride from 1 to "
          f"the context of {config.context_tokens} tokens"
        )
  if protocol == "memory" and not config.memory_tokens:
    raise SettingsError(
      "--protocol=memory needs a model that was trained with "
      "model.memory_tokens; choose window or stride:N"
    )


def memory_of(protocol: str, config: ModelConfig) -> int:
  """Returns how many tokens before its own row a prediction may attend to."""
  return config.memory_tokens if protocol == "memory" else 0


class Evaluator:
  """Predicts splits with one compiled step.

  Args:
    model: the model to evaluate.
    batch_size: windows or streams at a time on the devices of this process,
      rounded up to a multiple of their number; the result does not depend on
      it.
  """

  def __init__(self, model: Transformer, batch_size: int):
    self._config = model.config
    N = parallel.local_device_count()
    self._batch_size = -(-batch_size // N) * N
    self._step = steps.make_eval_step(model)
    self._compiled = set()  # (with a memory, rows) that are compiled

  def __call__(self, params, data, protocol: str | None = None) -> Result:
    """Evaluates `params`, replicated, on all tokens of `data`.

    All compiling is done before the clock starts.

    Args:
      protocol: one that `check_protocol` accepts; None for the model's own.
        "window": disjoint windows. "stride:N": windows that start every N
        tokens, of whose predictions the last N count. "memory": the split is
        read like one stream with its memory, cut into several. Each but the
        first is warmed with the tokens before it that its predictions depend
        on: through L layers up to L memories, or less far where the reaches are
        short. These tokens cost as much as those that count. There are fewer
        streams than `batch_size` if they would cost more than twice as much as
        one stream.

    Raises:
      SettingsError: as `check_protocol`.
      EvaluationError: no token of the split is predicted, or losses are not
        finite.
    """
    if protocol is None:
      protocol = default_protocol(self._config)
    check_protocol(protocol, self._config)
    if len(data) < 2:
      raise EvaluationError(
        f"a split of {len(data)} token(s) is too short; expected at least 2, "
        "as the first is not predicted; give a longer one"
      )
    reading = self._reading(params, len(data), protocol)
    shape = (protocol == "memory", reading.starts.shape[1])
    if shape not in self._compiled:
      self._predict(params, data, reading.part(slice(1)), protocol)
      self._compiled.add(shape)
    start = time.perf_counter()
    nats = self._predict(params, data, reading, protocol)
    nats = parallel.gather(nats[None]).max(axis=0).astype(np.float64)
    seconds = time.perf_counter() - start
    assert (nats != _NOT_PREDICTED).all()
    if not np.isfinite(nats).all():
      raise EvaluationError(
        f"{np.sum(~np.isfinite(nats)):,} of {len(nats):,} tokens have a loss "
        "that is not finite; choose an older checkpoint with --step=N"
      )
    return Result(
      bits=nats.mean() / math.log(2),
      stderr=_standard_error(nats) / math.log(2),
      tokens=len(nats),
      tokens_per_second=len(nats) / seconds,
    )

  def _reading(self, params, length, protocol) -> batches.Reading:
    """Returns the share of this process."""
    T, R = self._config.context_tokens, self._batch_size
    if protocol == "memory":
      streams = self._streams(params, length)
      mine = parallel.process_share(streams.starts.shape[1])
      return streams.part(rows=slice(mine.start, mine.stop))
    stride = T if protocol == "window" else int(protocol.split(":")[1])
    windows = batches.windows(length, T, stride, R)
    mine = parallel.process_share(len(windows))
    return windows.part(slice(mine.start, mine.stop))

  def _streams(self, params, length) -> batches.Reading:
    """Returns as many streams as cost at most twice as much as one."""
    config = self._config
    T, M = config.context_tokens, config.memory_tokens
    warm_tokens = tokens_before(
      [decode.reach(mask, T + M).max() for mask in mask_params(params, config)],
      *(M, T),
    )
    N = parallel.local_device_count()
    per_device = self._batch_size // N
    while True:
      rows = parallel.process_count() * N * per_device
      streams = batches.streams(length, T, warm_tokens, rows)
      if per_device == 1 or streams.starts.size * T <= 2 * length:
        return streams
      per_device //= 2

  def _predict(self, params, data, reading, protocol):
    """Returns (len(data) - 1,) nats in float32, for the tokens of a reading."""
    N, T = parallel.local_device_count(), self._config.context_tokens
    nats = np.full(len(data) - 1, _NOT_PREDICTED, np.float32)
    memory = Stateless(self._config.n_layer)
    if protocol == "memory":
      first_NB = reading.starts[0].astype(np.uint32).reshape(N, -1)
      memory = steps.start_memory(self._config, first_NB.shape[1])
      memory = memory.replace(first_position=parallel.deal(first_NB))
    for batch in range(len(reading)):
      tokens = reading.tokens(data, batch).reshape(N, -1, T + 1)
      memory, nats_NBT = self._step(params, memory, tokens)
      nats_RT = np.asarray(nats_NBT).reshape(-1, T)
      for row, found, of_all in reading.scored(batch):
        nats[of_all] = nats_RT[row, found]
    return nats


def _standard_error(nats: np.ndarray) -> float:
  """Returns the standard error of the mean, in nats, from sums of chunks."""
  if len(nats) == 1:
    return 0.0  # it is unknown; 0 keeps the record valid JSON
  chunk = min(_CHUNK_TOKENS, -(-len(nats) // 2))
  starts = np.arange(0, len(nats), chunk)
  counts = np.diff(np.append(starts, len(nats)))
  residuals = np.add.reduceat(nats, starts) - nats.mean() * counts
  scale = len(starts) / (len(starts) - 1)
  return math.sqrt(scale * np.sum(residuals**2)) / len(nats)


def order0_entropy(data) -> float:
  """Returns the bits per token of a coder that knows each token's share."""
  counts = np.bincount(np.asarray(data))
  shares = counts[counts > 0] / len(data)
  return float(-np.sum(shares * np.log2(shares)))


def lzma_bits_per_char(data) -> float:
  """Returns the bits per character of the same bytes, compressed by lzma."""
  compressed = lzma.compress(np.asarray(data).tobytes())
  return 8 * len(compressed) / len(data)
