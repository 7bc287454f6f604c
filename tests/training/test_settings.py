"""Settings are held in bounds, and come back out of a checkpoint."""

import json

import pytest

from adaptive_attention.config import ModelConfig
from adaptive_attention.training import settings
from configs import base

DEFAULTS = settings._flatten(base.get_config())


def another(value):
  """Returns a value of the same type that is not the default."""
  match value:
    case bool():
      return not value
    case int() | float():
      return value + 3
    case str():
      return f"{value}-other"


def saved(**changes):
  """Returns the settings in a checkpoint, as JSON, with some changed."""
  config = base.get_config()
  config.update_from_flattened_dict(
    {name.replace("__", "."): value for name, value in changes.items()}
  )
  return json.loads(json.dumps(config.to_dict()))


@pytest.mark.parametrize("name", DEFAULTS)
def test_each_setting_is_restored_whatever_the_defaults_are(name, monkeypatch):
  """A setting and the default of today differ, both ways round."""
  monkeypatch.setattr(settings, "model_config", lambda model: None)
  value = another(DEFAULTS[name])
  for kept, today in ((value, DEFAULTS[name]), (DEFAULTS[name], value)):
    found = base.get_config()
    found.update_from_flattened_dict({name: today})
    assert not settings.restore(found, saved(**{name: kept}))
    assert settings._flatten(found) == DEFAULTS | {name: kept}


def test_the_largest_span_is_the_checkpoints_and_not_the_context():
  """The saved value equals today's default, so that nothing "differs"."""
  kept = saved(model__context_tokens=64, model__max_span=512)
  config = base.get_config()
  settings.restore(config, kept)
  assert (config.model.context_tokens, config.model.max_span) == (64, 512)


def test_settings_of_other_versions():
  config, older = base.get_config(), saved(model__context_tokens=64)
  del older["model"]["max_span"], older["model"]["remat"], older["wandb"]
  assert not settings.restore(config, older)
  assert settings.model_config(config.model).max_span == 64
  assert settings._flatten(config).keys() == DEFAULTS.keys()
  assert settings.model_config(older["model"]) == ModelConfig(
    context_tokens=64, max_span=64
  )
  assert not settings.check_resumed(older, config, 7)

  newer = saved() | {"novel": 3}
  assert settings.restore(base.get_config(), newer) == {"novel": 3}
  newer["model"]["depth"] = 2
  with pytest.raises(settings.SettingsError, match="depth=2 is unknown"):
    settings.restore(base.get_config(), newer)
  with pytest.raises(settings.SettingsError, match="steps='many' is not"):
    settings.restore(base.get_config(), saved() | {"steps": "many"})


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("model.n_layer", 3),
    ("model.max_span", 9),
    ("optimizer.name", "adagrad"),
    ("init_from", "a.npz"),
  ],
)
def test_what_does_not_fit_a_checkpoint_is_named(name, value):
  config = base.get_config()
  config.update_from_flattened_dict({name: value})
  with pytest.raises(settings.SettingsError, match=f"config.{name}={value!r}"):
    settings.check_resumed(saved(), config, 7)
  config = base.get_config()
  config.model.dropout = 0.5
  assert settings.check_resumed(saved(), config, 7) == {
    "model.dropout": (0.0, 0.5)
  }


@pytest.mark.parametrize(
  ("name", "wrong", "right"),
  [
    ("seed", 2**32, 2**32 - 1),
    ("steps", 2**31, 2**31 - 1),
    ("eval_tokens", 1, 2),
    ("process_count", 2, 0),
    ("coordinator_address", "here:1", ""),
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
