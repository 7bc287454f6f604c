"""The settings of a checkpoint beside those of today."""

import dataclasses
from collections.abc import Mapping

from adaptive_attention.config import fixes_the_model
from adaptive_attention.errors import SettingsError
from adaptive_attention.training.settings import (
  Settings,
  flatten,
  model_config,
)


def check_resumed(
  saved: Mapping, given: Mapping, step: int
) -> dict[str, tuple]:
  """Checks that a run may go on with the given settings.

  Args:
    saved: all settings of the checkpoint of `step`.
    given: all settings that the run goes on with.

  Returns:
    The settings that differ, as `changes` returns them.

  Raises:
    SettingsError: naming the setting that does not fit.
  """
  saved, given = (
    dict(these, model=dataclasses.asdict(model_config(these["model"])))
    for these in (saved, given)
  )
  changed = {
    name: (old, new)
    for name, (old, new) in changes(saved, given).items()
    if old is not None  # the version of the checkpoint lacks this setting
  }
  for name, (old, new) in changed.items():
    if name == "init_from" and new:
      raise SettingsError(
        f"config.init_from={new!r} means nothing to a run that goes on from "
        f"step {step}; leave it out, or give another --workdir"
      )
    # Each optimizer has a state of its own kind.
    if fixes_the_model(name) or name == "optimizer.name":
      raise SettingsError(
        f"config.{name}={new!r} does not fit the checkpoint of step {step}, "
        f"which was trained with {old!r}; leave it so, or give another "
        "--workdir"
      )
  return changed


def restore(config: Settings, saved: Mapping) -> dict:
  """Sets every setting in `config` to that of a checkpoint.

  A setting that the checkpoint lacks, as its version did not have it, stays.

  Args:
    config: the defaults, with their references.
    saved: the settings of a checkpoint, read from JSON.

  Returns:
    The settings that this version does not know.

  Raises:
    SettingsError: a value of another type, or an unknown setting of the model.
  """
  known, values = flatten(config), flatten(saved)
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
  """Returns name -> (old value, new value) of the settings that differ."""
  old, new = flatten(old), flatten(new)
  return {
    name: (old.get(name), value)
    for name, value in new.items()
    if old.get(name) != value
  }
