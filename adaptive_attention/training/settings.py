"""What a config may say, checked before any device is touched.

Each error is one sentence that names the field. Types and unknown names are
held by the locked ConfigDict itself.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping

from ml_collections import ConfigDict

from adaptive_attention import config as configs
from adaptive_attention.config import ModelConfig, fixes_the_model
from adaptive_attention.errors import SettingsError

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


# Of some the most: what jax.random.key tells apart, and what int32 counts.
_MOST = {"seed": 2**32 - 1, "steps": 2**31 - 1}

# What several processes need to know of each other.
_PROCESSES = ("coordinator_address", "process_count", "process_index")
# Of the machine that a command runs on, not of the run.
MACHINE = ("cpu_devices", "distributed", *_PROCESSES)


def _require(condition, name, value, expected):
  if not condition:
    raise SettingsError(
      f"config.{name}={value!r} is not possible; expected {expected}"
    )


def check(config, names: Collection[str] | None = None):
  """Everything that can be said of the settings alone.

  Args:
    config: all of them.
    names: those to look at, if not all: what flags change of a checkpoint's
      settings, which were right for the version that made it.

  Raises:
    SettingsError: naming the field, its value and what was expected.
  """
  flat = _flatten(config)
  for name, condition, expected in _conditions(config, flat):
    if names is None or name in names:
      _require(condition, name, flat[name], expected)
  model_config(config.model)


def _conditions(config, flat):
  """(name, whether its value will do, what was expected) of each setting."""
  for name, value in flat.items():
    if isinstance(value, float):
      yield name, math.isfinite(value), "a finite number"
  for name, least in _LEAST.items():
    yield name, flat[name] >= least, f"at least {least}"
  for name, most in _MOST.items():
    yield name, flat[name] <= most, f"at most {most}"
  yield (
    "eval_tokens",
    flat["eval_tokens"] != 1,
    "at least 2, as the first byte is not predicted, or 0 for all",
  )
  for name in ("optimizer.beta1", "optimizer.beta2"):
    yield name, flat[name] < 1, "less than 1"
  most = flat["optimizer.learning_rate"]
  yield (
    "optimizer.min_learning_rate",
    flat["optimizer.min_learning_rate"] <= most,
    f"at most optimizer.learning_rate={most}",
  )
  yield "optimizer.clip_norm", flat["optimizer.clip_norm"] > 0, "more than 0"
  for name, none in zip(_PROCESSES, ("", 0, -1)):
    yield (
      name,
      config.distributed or flat[name] == none,
      f"{none!r} without distributed=True",
    )
  yield (
    "coordinator_address",
    not config.coordinator_address
    or config.coordinator_address.rpartition(":")[2].isdecimal(),
    "HOST:PORT",
  )
  yield (
    "process_index",
    not config.process_count or config.process_index < config.process_count,
    f"less than process_count={config.process_count}",
  )
  yield (
    "model.vocab_size",
    config.model.vocab_size >= 256,
    "at least 256, as the data are bytes",
  )
  choices = {
    "bench.compare": ("", "torch"),
    "optimizer.name": ("adamw", "adagrad"),
    "optimizer.clip": ("global", "tensor"),
    "data.corpus": ("enwik8", "python_source"),
  }
  for name, allowed in choices.items():
    yield name, flat[name] in allowed, f"one of {allowed}"


def model_config(model: Mapping) -> ModelConfig:
  """`config.model_config`, refused as a setting is."""
  try:
    return configs.model_config(model)
  except (TypeError, ValueError) as error:
    raise SettingsError(f"config.{error}") from error


def warmup_note(config) -> str | None:
  """What a warmup does to a run that it outlasts; None if it does not."""
  steps, warmup = config.steps, config.optimizer.warmup_steps
  if warmup < steps:
    return None
  return (
    f"optimizer.warmup_steps={warmup} lasts to the end of steps={steps}: the "
    f"last step is made at {(steps - 1) / warmup:.2g} of the learning rate"
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


def check_resumed(saved: Mapping, config, step: int) -> dict[str, tuple]:
  """That a run may go on with `config`; what it changes, as of `changes`.

  Args:
    saved: the settings of the checkpoint of `step`.

  Raises:
    SettingsError: naming the setting that does not fit.
  """
  saved = dict(saved, model=dataclasses.asdict(model_config(saved["model"])))
  changed = {
    name: (old, new)
    for name, (old, new) in changes(saved, config).items()
    if old is not None  # of a version before there was this setting
  }
  for name, (old, new) in changed.items():
    if name == "init_from" and new:
      raise SettingsError(
        f"config.init_from={new!r} means nothing to a run that goes on from "
        f"step {step}; leave it out, or give another --workdir"
      )
    # The optimizer's state is that of its kind.
    if fixes_the_model(name) or name == "optimizer.name":
      raise SettingsError(
        f"config.{name}={new!r} does not fit the checkpoint of step {step}, "
        f"which was trained with {old!r}; leave it so, or give another "
        "--workdir"
      )
  return changed


def restore(config: ConfigDict, saved: Mapping) -> dict:
  """Sets every setting in `config` to a checkpoint's, whatever it was.

  What the checkpoint lacks, as its version did not have it, stays; what this
  version does not know is returned, unless it is the model's.

  Args:
    config: the defaults, with their references.
    saved: the settings of a checkpoint, read from JSON.

  Raises:
    SettingsError: a value of another type, or an unknown setting of the model.
  """
  known, values = _flatten(config), _flatten(saved)
  model_config(saved["model"])
  for name in known.keys() & values.keys():
    value = values[name]
    if isinstance(known[name], tuple):  # JSON has only lists
      value = tuple(value)
    try:
      config.update_from_flattened_dict({name: value})
    except (TypeError, ValueError) as error:
      raise SettingsError(
        f"the checkpoint's config.{name}={value!r} is not possible; expected "
        f"{type(known[name]).__name__}; use the version that it was made with"
      ) from error
  return {name: values[name] for name in values.keys() - known.keys()}


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
