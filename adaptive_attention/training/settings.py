"""Settings: how they are checked, and the objects they are taken apart into.

All settings are checked before any device is used; each error is one sentence
that names the field. The locked ConfigDict itself refuses wrong types and
unknown names; below the modes no other file uses it.
"""

import contextlib
import copy
import dataclasses
import pathlib
from collections.abc import Collection, Mapping

from ml_collections import ConfigDict

from adaptive_attention import accounting
from adaptive_attention import config as configs
from adaptive_attention.config import ModelConfig, OptimizerConfig
from adaptive_attention.errors import SettingsError
from adaptive_attention.training import bounds
from adaptive_attention.training.training_config import Every, TrainingConfig

_JOINING = ("distributed", *bounds.PROCESSES, "heartbeat_seconds")
# The settings of the machine that a command runs on, not of the run.
MACHINE = ("cpu_devices", *_JOINING, "stop_seconds")
_OF_FILES = ("data.path", "data.cache_dir", "init_from")  # as they lie there


def _require(condition, name, value, expected):
  if not condition:
    raise SettingsError(
      f"config.{name}={value!r} is not possible; expected {expected}"
    )


@dataclasses.dataclass(frozen=True)
class Checked:
  """Settings that were checked, and what two sections of them are made into.

  Attributes:
    given: all settings.
    model: those of the model.
    optimizer: those of the optimizer; None for a checkpoint's of which no flag
      changes one, as its version may have had other bounds.
  """

  given: ConfigDict
  model: ModelConfig
  optimizer: OptimizerConfig | None


def check(config: ConfigDict, names: Collection[str] | None = None) -> Checked:
  """Checks what can be checked without the data and the devices.

  Args:
    config: all settings.
    names: the settings to check, None for all. Of a checkpoint's settings only
      those that flags change are checked; the others suited its version.

  Returns:
    The settings with the objects that they are made into, once for all.

  Raises:
    SettingsError: naming the field, its value and what was expected.
  """
  flat = flatten(config)
  for name, condition, expected in bounds.of(flat):
    if names is None or name in names:
      _require(condition, name, flat[name], expected)
  optimizer = None
  if names is None or any(name.startswith("optimizer.") for name in names):
    optimizer = optimizer_config(config.optimizer)
  return Checked(config, model_config(config.model), optimizer)


def model_config(model: Mapping) -> ModelConfig:
  """Calls `config.model_config`; its errors become a SettingsError."""
  with _as_settings():
    return configs.model_config(model)


def optimizer_config(optimizer: Mapping) -> OptimizerConfig:
  """Makes the optimizer's settings; an error becomes a SettingsError."""
  with _as_settings():
    return OptimizerConfig(**optimizer)


@contextlib.contextmanager
def _as_settings():
  """Turns an error about a field into one about the setting that it comes from.

  Raises:
    SettingsError: in place of TypeError and ValueError.
  """
  try:
    yield
  except (TypeError, ValueError) as error:
    raise SettingsError(f"config.{error}") from error


def training_config(checked: Checked) -> TrainingConfig:
  """Takes the settings of a training run apart.

  Raises:
    SettingsError: a setting of the optimizer is wrong.
  """
  config = checked.given
  return TrainingConfig(
    model=checked.model,
    optimizer=checked.optimizer or optimizer_config(config.optimizer),
    steps=config.steps,
    every=Every(
      last=config.steps,
      record=config.log_every_steps,
      save=config.checkpoint_every_steps,
      evaluate=config.eval_every_steps,
      sample=config.sample_every_steps,
    ),
    seed=config.seed,
    batch_size=config.batch_size,
    accumulation_steps=config.accumulation_steps,
    eval_tokens=config.eval_tokens or None,
    eval_batch_size=config.eval_batch_size,
    keep_checkpoints=config.keep_checkpoints,
    init_from=config.init_from,
    train_only=config.train_only,
    stop_seconds=config.stop_seconds,
    copies=tuple(n for n in ("tensorboard", "wandb") if config[n]),
    record=config.to_dict(),
  )


def with_model(config: TrainingConfig, **changes) -> TrainingConfig:
  """Returns the settings of a training run with others of the model.

  Raises:
    SettingsError: such a model is not possible.
  """
  with _as_settings():
    model = dataclasses.replace(config.model, **changes)
  return dataclasses.replace(config, model=model)


def joining(config: ConfigDict) -> dict:
  """Returns the settings that `processes.join` takes."""
  return {name: config[name] for name in _JOINING}


def shared(config: ConfigDict) -> dict:
  """Returns the settings, by name, that several processes must have alike."""
  return {
    f"config.{name}": value
    for name, value in flatten(config).items()
    if name not in (*MACHINE, *_OF_FILES)
  }


def without_folders(saved: Mapping) -> dict:
  """Returns saved settings without the folders of the machine they come from.

  Of an absolute path the last part is left.
  """
  found = copy.deepcopy(dict(saved))
  for section in (found, found["data"]):
    for name, value in section.items():
      if isinstance(value, str) and pathlib.PurePath(value).is_absolute():
        section[name] = pathlib.PurePath(value).name
  return found


def warmup_note(config) -> str | None:
  """Returns a note on a warmup that lasts for the entire run, or None."""
  steps, warmup = config.steps, config.optimizer.warmup_steps
  if warmup < steps:
    return None
  return (
    f"optimizer.warmup_steps={warmup} lasts to the end of steps={steps}: the "
    f"last step is made at {(steps - 1) / warmup:.2g} of the learning rate"
  )


def check_devices(config, devices: int):
  """Checks that the batch can be dealt out evenly to the devices.

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


def check_attention(model: ModelConfig):
  """Checks that the implementation of attention serves the model here.

  Raises:
    SettingsError: naming what it needs.
  """
  try:
    accounting.attention_choice(model)
  except NotImplementedError as error:
    raise SettingsError(f"config.model.{error}") from error


def check_vocabulary(config, corpus):
  """Checks that the model knows each token of the data.

  Raises:
    SettingsError: naming the vocabulary and the largest token.
  """
  _require(
    config.model.vocab_size > corpus.largest,
    "model.vocab_size",
    config.model.vocab_size,
    f"more than {corpus.largest}, the largest {corpus.unit} of {corpus.name}",
  )


def check_data(config, corpus, devices: int):
  """Checks that every shard holds a sequence, or a segment of all its streams.

  Raises:
    SettingsError: naming the context, the bytes and the split.
  """
  T = config.model.context_tokens
  shard = len(corpus.train) // devices
  lengths = {
    "each device's part of the train split": shard,
    "the validation split": len(corpus.valid),
  }
  if len(corpus.test):  # tokens may come without
    lengths["the test split"] = len(corpus.test)
  for split, length in lengths.items():
    _require(
      length > max(T, 2),
      "model.context_tokens",
      T,
      f"less than the {length} {corpus.unit}s of {split} of {corpus.name}",
    )
  streams = config.batch_size // devices
  _require(
    not config.model.memory_tokens or streams * T < shard,
    "batch_size",
    config.batch_size,
    f"streams of at least one segment of {T} tokens, that is at most "
    f"{(shard - 1) // T} on each of {devices} device(s), as with "
    f"model.memory_tokens={config.model.memory_tokens} they share the {shard} "
    f"{corpus.unit}s of a device's part of the train split of {corpus.name}",
  )


def flatten(config, prefix="") -> dict:
  """Returns name -> value of all settings, those of sections with a dot."""
  flat = {}
  for name, value in config.items():
    if hasattr(value, "items"):
      flat |= flatten(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = value
  return flat
