"""What a config may say, checked before any device is touched.

Each error is one sentence that names the field. Types and unknown names are
held by the locked ConfigDict itself.
"""

import math

from adaptive_attention.model import ModelConfig


class SettingsError(ValueError):
  """A flag or setting that is wrong, or two that do not fit."""


# Of each number the least it may be; all must be finite.
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
  "bench.repeats": 1,
  "optimizer.learning_rate": 0,
  "optimizer.min_learning_rate": 0,
  "optimizer.warmup_steps": 0,
  "optimizer.beta1": 0,
  "optimizer.beta2": 0,
  "optimizer.weight_decay": 0,
  "optimizer.clip_norm": 0,
  "optimizer.mask_lr_multiplier": 0,
}


def _require(condition, name, value, expected):
  if not condition:
    raise SettingsError(
      f"config.{name}={value!r} is not possible; expected {expected}"
    )


def check(config):
  """Everything that can be said of the settings alone.

  Raises:
    SettingsError: naming the field, its value and what was expected.
  """
  flat = _flatten(config)
  for name, value in flat.items():
    if isinstance(value, float):
      _require(math.isfinite(value), name, value, "a finite number")
  for name, least in _LEAST.items():
    _require(flat[name] >= least, name, flat[name], f"at least {least}")
  for name in ("optimizer.beta1", "optimizer.beta2"):
    _require(flat[name] < 1, name, flat[name], "less than 1")
  _require(
    flat["optimizer.min_learning_rate"] <= flat["optimizer.learning_rate"],
    "optimizer.min_learning_rate",
    flat["optimizer.min_learning_rate"],
    f"at most optimizer.learning_rate={flat['optimizer.learning_rate']}",
  )
  _require(
    flat["optimizer.clip_norm"] > 0,
    "optimizer.clip_norm",
    flat["optimizer.clip_norm"],
    "more than 0",
  )
  check_devices(config, max(config.cpu_devices, 1))
  _require(
    not config.process_count or config.process_index < config.process_count,
    "process_index",
    config.process_index,
    f"less than process_count={config.process_count}",
  )
  try:
    ModelConfig(**config.model)
  except ValueError as error:
    raise SettingsError(f"config.{error}") from error
  _require(
    config.model.vocab_size >= 256,
    "model.vocab_size",
    config.model.vocab_size,
    "at least 256, as the data are bytes",
  )
  _require(
    config.bench.compare in ("", "torch"),
    "bench.compare",
    config.bench.compare,
    "torch, or nothing",
  )
  for name, allowed in (
    ("optimizer.name", ("adamw", "adagrad")),
    ("optimizer.clip", ("global", "tensor")),
  ):
    _require(flat[name] in allowed, name, flat[name], f"one of {allowed}")
  corpora = ("enwik8", "python_source")
  _require(
    config.data.corpus in corpora,
    "data.corpus",
    config.data.corpus,
    f"one of {corpora}, or data.path=FILE",
  )


def check_devices(config, devices: int):
  """That the batch can be dealt out evenly to the devices.

  Raises:
    SettingsError: naming the batch, the devices and the accumulation steps.
  """
  parts = devices * config.accumulation_steps
  _require(
    config.batch_size % parts == 0,
    "batch_size",
    config.batch_size,
    f"a multiple of {devices} device(s) times "
    f"accumulation_steps={config.accumulation_steps}",
  )


def check_data(config, corpus, devices: int):
  """That every shard holds a window, or a segment of each of its streams.

  Raises:
    SettingsError: naming the context, the bytes and the split.
  """
  T = config.model.context_tokens
  shard = len(corpus.train) // devices
  for split, length in (
    ("each device's part of the train split", shard),
    ("the validation split", len(corpus.valid)),
    ("the test split", len(corpus.test)),
  ):
    _require(
      length > max(T, 2),
      "model.context_tokens",
      T,
      f"less than the {length} bytes of {split} of {corpus.name}",
    )
  streams = config.batch_size // devices
  _require(
    not config.model.memory_tokens or streams * T < shard,
    "batch_size",
    config.batch_size,
    f"streams of at least one segment of {T} tokens, that is at most "
    f"{(shard - 1) // T} on each of {devices} device(s), as with "
    f"model.memory_tokens={config.model.memory_tokens} they share the {shard} "
    f"bytes of a device's part of the train split of {corpus.name}",
  )


# Of the model's settings those that leave the function it computes as it is.
_FREE = (
  "span_init",
  "span_coef",
  "dropout",
  "dtype",
  "remat",
  "implementation",
)


def fixes_the_model(name: str) -> bool:
  """Whether a setting must stay what a checkpoint was trained with."""
  return name.startswith("model.") and name.split(".")[1] not in _FREE


def changes(old, new) -> dict[str, tuple]:
  """Name -> (old value, new value) of the settings that differ."""
  old, new = _flatten(old), _flatten(new)
  return {
    name: (old.get(name), value)
    for name, value in new.items()
    if old.get(name) != value
  }


def _flatten(config, prefix=""):
  flat = {}
  for name, value in config.items():
    if hasattr(value, "items"):
      flat |= _flatten(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = value
  return flat
