"""Bits per character of a split, every byte of it predicted exactly once."""

import collections
import dataclasses
import lzma
import math
import pathlib
import re
import time

import numpy as np

from adaptive_attention import (
  accounting,
  batches,
  checkpoint,
  logbook,
  parallel,
  steps,
)
from adaptive_attention.model import ModelConfig, mask_params
from adaptive_attention.settings import SettingsError


class EvaluationError(Exception):
  """A split that cannot be evaluated."""


_BLOCK_BYTES = 1024  # of the standard error: neighbours are not independent


@dataclasses.dataclass(frozen=True)
class Result:
  """Of a split: totals over counts.

  Attributes:
    bits_per_char: total nats / bytes / ln 2.
    stderr: its standard error, from the spread over blocks of 1024 bytes.
    bytes: how many were predicted.
    tokens_per_second: of predictions.
  """

  bits_per_char: float
  stderr: float
  bytes: int
  tokens_per_second: float

  @property
  def loss(self) -> float:
    """Nats per byte."""
    return self.bits_per_char * math.log(2)


def stride_tokens(protocol: str, context_tokens: int) -> int:
  """How far apart windows start: "window" (disjoint) or "stride:N".

  Raises:
    SettingsError: another protocol, or a stride that is not in 1..context.
  """
  match re.fullmatch(r"window|stride:(\d+)", protocol):
    case None:
      raise SettingsError(
        f"--protocol={protocol} is unknown; expected window or stride:N"
      )
    case found if found[1] is None:
      return context_tokens
    case found:
      stride = int(found[1])
  if not 1 <= stride <= context_tokens:
    raise SettingsError(
      f"--protocol={protocol} is not possible; expected a stride from 1 to "
      f"the context of {context_tokens} tokens"
    )
  return stride


class Evaluator:
  """Predicts splits with one compiled step.

  Args:
    config: the model's.
    batch_size: windows at a time on the devices of this process, rounded up
      to a multiple of them; the result does not depend on it.
  """

  def __init__(self, config: ModelConfig, batch_size: int):
    self._config = config
    N = parallel.local_device_count()
    self._batch_size = -(-batch_size // N) * N
    self._step = steps.make_eval_step(config)

  def __call__(self, params, data, protocol="window", warm=False) -> Result:
    """Evaluates `params`, replicated, on all bytes of `data`.

    Args:
      warm: compile before the clock starts.
    """
    T = self._config.context_tokens
    windows = batches.windows(len(data), T, stride_tokens(protocol, T))
    if warm:
      self._predict(params, data, windows, 0)
    start = time.perf_counter()
    share = parallel.process_share(-(-len(windows) // self._batch_size))
    nats_WT = parallel.gather(
      np.concatenate(
        [
          self._predict(params, data, windows, i * self._batch_size)
          for i in share
        ]
      )
    )
    seconds = time.perf_counter() - start
    nats = np.concatenate(
      [
        row[first:last]
        for row, first, last in zip(
          nats_WT, windows.scored_from, windows.scored_to, strict=False
        )
      ]
    ).astype(np.float64)
    assert len(nats) == len(data) - 1
    if not np.isfinite(nats).all():
      raise EvaluationError(
        f"{np.sum(~np.isfinite(nats)):,} of {len(nats):,} bytes have a loss "
        "that is not finite; choose an older checkpoint with --step=N"
      )
    return Result(
      bits_per_char=nats.mean() / math.log(2),
      stderr=_standard_error(nats) / math.log(2),
      bytes=len(nats),
      tokens_per_second=len(nats) / seconds,
    )

  def _predict(self, params, data, windows, first):
    tokens = windows.rows(data, first, self._batch_size)
    N = parallel.local_device_count()
    nats_NBT = self._step(params, tokens.reshape(N, -1, tokens.shape[1]))
    return np.asarray(nats_NBT).reshape(self._batch_size, -1)


def _standard_error(nats: np.ndarray) -> float:
  """Of the mean, in nats: bytes within a block are not taken as independent."""
  if len(nats) == 1:
    return 0.0  # nothing can be said; 0 keeps the record valid JSON
  block = min(_BLOCK_BYTES, -(-len(nats) // 2))
  starts = np.arange(0, len(nats), block)
  counts = np.diff(np.append(starts, len(nats)))
  residuals = np.add.reduceat(nats, starts) - nats.mean() * counts
  scale = len(starts) / (len(starts) - 1)
  return math.sqrt(scale * np.sum(residuals**2)) / len(nats)


def order0_entropy(data) -> float:
  """Bits per character of a coder that knows the frequency of each byte."""
  counts = np.bincount(np.asarray(data), minlength=256)
  shares = counts[counts > 0] / len(data)
  return float(-np.sum(shares * np.log2(shares)))


def lzma_bits_per_char(data) -> float:
  """Bits per character of the same bytes, compressed alone by lzma."""
  compressed = lzma.compress(np.asarray(data).tobytes())
  return 8 * len(compressed) / len(data)


def run(config, workdir, corpus, *, step, split, protocol):
  """Evaluates a checkpoint and writes eval_SPLIT.json.

  Args:
    config: the checkpoint's settings.
    workdir: the run's folder.
    corpus: the data, with splits `valid` and `test`.
    step: the checkpoint.
    split: "valid" or "test".
    protocol: "window" or "stride:N".
  """
  model_config = ModelConfig(**config.model)
  stride_tokens(protocol, model_config.context_tokens)
  with checkpoint.Checkpoints(workdir) as checkpoints:
    params, _ = checkpoints.restore_params(step)
  params = parallel.replicate(params)
  evaluator = Evaluator(model_config, config.eval_batch_size)
  result = evaluator(params, getattr(corpus, split), protocol, warm=True)
  macs = accounting.attention_macs_per_token(
    mask_params(params, model_config),
    model_config,
    model_config.context_tokens,
  )
  record = collections.OrderedDict(
    step=step,
    split=split,
    protocol=protocol,
    **dataclasses.asdict(result),
    attention_macs_per_token=macs,
    data={"name": corpus.name, "sha256": corpus.sha256},
  )
  if parallel.is_primary():
    logbook.write_json(pathlib.Path(workdir) / f"eval_{split}.json", record)
  logbook.say(
    f"step {step}  {split} of {corpus.name}, {protocol}: "
    f"{result.bits_per_char:.4f} +- {result.stderr:.4f} bits per character, "
    f"{result.bytes:,} bytes, {result.tokens_per_second:,.0f} tokens/s"
  )
  logbook.say(f"attention: {accounting.macs_text(macs)}")
