"""Settings are held in bounds."""

import pytest

from adaptive_attention.training import settings
from configs import base


@pytest.mark.parametrize(
  ("name", "wrong", "right"),
  [
    ("seed", 2**32, 2**32 - 1),
    ("steps", 2**31, 2**31 - 1),
    ("eval_tokens", 1, 2),
    ("process_count", 2, 0),
    ("coordinator_address", "here:1", ""),
    ("train_only", "(span", "(span)"),
  ],
)
def test_bounds(name, wrong, right):
  config = base.get_config()
  config[name] = right
  settings.check(config)
  config[name] = wrong
  with pytest.raises(settings.SettingsError, match=f"config.{name}="):
    settings.check(config)
  # Of a checkpoint's settings only those that flags change are checked.
  settings.check(config, {"batch_size"})
  with pytest.raises(settings.SettingsError, match=f"config.{name}="):
    settings.check(config, {name})


def test_a_warmup_that_outlasts_the_run_is_noted():
  config = base.get_config()
  config.steps = config.optimizer.warmup_steps + 1
  assert settings.warmup_note(config) is None
  config.steps = 26
  config.optimizer.warmup_steps = 50
  assert "at 0.5 of the learning rate" in settings.warmup_note(config)
