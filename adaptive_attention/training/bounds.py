"""What each setting may be; those of model and optimizer check themselves.

A condition is (name of the setting, whether its value is right, what was
expected). Settings are given as name -> value, those of sections with a dot.
"""

import pathlib
import re
from collections.abc import Iterator, Mapping

from adaptive_attention.training.targets import TARGETS

# The least that each number may be; all must be finite.
_LEAST = {
  "seed": 0,
  "steps": 1,
  "batch_size": 1,
  "accumulation_steps": 1,
  "log_every_steps": 1,
  "eval_every_steps": 1,
  "eval_tokens": 0,
  "eval_batch_size": 1,
  "sample_every_steps": 0,
  "checkpoint_every_steps": 1,
  "keep_checkpoints": 1,
  "cpu_devices": 0,
  "process_count": 0,
  "process_index": -1,
  "heartbeat_seconds": 1,
  "stop_seconds": 1,
  "bench.repeats": 1,
  "bench.context": 0,
  "data.bytes_per_token": 0,
}
# The most that a number may be, where it is not 31 bits.
_MOST = {"seed": 2**32 - 1}  # jax.random.key takes 32
_CHOICES = {
  "bench.compare": ("", "torch"),
  "data.corpus": ("enwik8", "python_source"),
  "target": ("", *TARGETS),
}

# The settings by which several processes find each other.
PROCESSES = ("coordinator_address", "process_count", "process_index")

_Conditions = Iterator[tuple[str, bool, str]]


def of(flat: Mapping) -> _Conditions:
  """Yields the conditions on all settings."""
  yield from _numbers(flat)
  for name, allowed in _CHOICES.items():
    yield name, flat[name] in allowed, f"one of {allowed}"
  yield from _processes(flat)
  yield from _data(flat)
  yield from _trained(flat)


def _numbers(flat) -> _Conditions:
  """Yields the bounds of each number."""
  for name, value in flat.items():
    if isinstance(value, float):
      yield name, abs(value) < 1e38, "a finite number, as a float32 holds it"
    elif isinstance(value, int) and not name.startswith("model."):
      most = _MOST.get(name, 2**31 - 1)
      yield name, value <= most, f"at most {most}"
  for name, least in _LEAST.items():
    yield name, flat[name] >= least, f"at least {least}"
  T = flat["model.context_tokens"]
  yield (
    "batch_size",
    flat["batch_size"] * T < 2**31,
    f"at most {(2**31 - 1) // max(T, 1)} sequences of "
    f"model.context_tokens={T}, as tokens are counted by 32-bit integers",
  )


def _processes(flat) -> _Conditions:
  """Yields the conditions on the settings of several processes."""
  for name, none in zip(PROCESSES, ("", 0, -1)):
    yield (
      name,
      flat["distributed"] or flat[name] == none,
      f"{none!r} without distributed=True",
    )
  address = flat["coordinator_address"]
  yield (
    "coordinator_address",
    not address or address.rpartition(":")[2].isdecimal(),
    "HOST:PORT",
  )
  count = flat["process_count"]
  yield (
    "process_index",
    not count or flat["process_index"] < count,
    f"less than process_count={count}",
  )


def _data(flat) -> _Conditions:
  """Yields the conditions that follow from what the data are."""
  yield (
    "eval_tokens",
    flat["eval_tokens"] != 1,
    "at least 2, as the first is not predicted, or 0 for all",
  )
  path = flat["data.path"]
  if holds_tokens(path):
    return
  yield (
    "model.vocab_size",
    flat["model.vocab_size"] >= 256,
    "at least 256, as the data are bytes",
  )
  yield (
    "data.bytes_per_token",
    not flat["data.bytes_per_token"],
    f"0, as the data are bytes (data.path={path!r}), not tokens",
  )


def _trained(flat) -> _Conditions:
  """Yields the conditions on which parameters are trained."""
  chosen = flat["train_only"]
  yield (
    "train_only",
    chosen != "masks" or flat["model.attention"] != "dense",
    "'' for all parameters, as model.attention='dense' has no masks",
  )
  yield (
    "train_only",
    _is_expression(chosen),
    "'' for all parameters, masks, or a regular expression of their paths",
  )


def holds_tokens(path: str) -> bool:
  """Returns whether `data.path` is one of tokens, not text.

  It is so if it is a folder, or an .npy.
  """
  return path.endswith(".npy") or (bool(path) and pathlib.Path(path).is_dir())


def _is_expression(text) -> bool:
  try:
    re.compile(text)
  except (re.error, RecursionError, OverflowError):
    return False
  return True
