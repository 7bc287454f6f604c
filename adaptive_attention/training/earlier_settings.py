"""The settings of a checkpoint beside those of today."""

import dataclasses
from collections.abc import Mapping

from adaptive_attention.config import fixes_the_model
from adaptive_attention.errors import SettingsError
from adaptive_attention.training.settings import flatten, model_config
from adaptive_attention.training.training_config import TrainingConfig


def check_resumed(
  saved: Mapping, given: TrainingConfig, step: int
) -> dict[str, tuple]:
  """Checks that a run may go on with the given settings.

  Args:
    saved: all settings of the checkpoint of `step`.
    given: the settings that the run goes on with.

  Returns:
    The settings that differ, as `changes` returns them.

  Raises:
    SettingsError: naming the setting that does not fit.
  """
  before, now = (
    dict(these, model=dataclasses.asdict(model))
    for these, model in (
      (saved, model_config(saved["model"])),
      (given.record, given.model),
    )
  )
  changed = {
    name: (old, new)
    for name, (old, new) in changes(before, now).items()
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


def changes(old, new) -> dict[str, tuple]:
  """Returns name -> (old value, new value) of the settings that differ."""
  old, new = flatten(old), flatten(new)
  return {
    name: (old.get(name), value)
    for name, value in new.items()
    if old.get(name) != value
  }
