"""Settings come back out of a checkpoint, and those that must stay do."""

import json

import pytest

from adaptive_attention.command_line.prepare import restore
from adaptive_attention.config import ModelConfig
from adaptive_attention.training import earlier_settings, settings
from configs import base

DEFAULTS = settings.flatten(base.get_config())


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


def resuming(config):
  return settings.training_config(settings.check(config))


@pytest.mark.parametrize("name", DEFAULTS)
def test_each_setting_is_restored_whatever_the_defaults_are(name, monkeypatch):
  """A setting and the default of today differ, both ways round."""
  monkeypatch.setattr(settings, "model_config", lambda model: None)
  value = another(DEFAULTS[name])
  for kept, today in ((value, DEFAULTS[name]), (DEFAULTS[name], value)):
    found = base.get_config()
    found.update_from_flattened_dict({name: today})
    assert not restore(found, saved(**{name: kept}))
    assert settings.flatten(found) == DEFAULTS | {name: kept}


def test_the_largest_span_is_the_checkpoints_and_not_the_context():
  """The saved value equals today's default, so that nothing "differs"."""
  kept = saved(model__context_tokens=64, model__max_span=512)
  config = base.get_config()
  restore(config, kept)
  assert (config.model.context_tokens, config.model.max_span) == (64, 512)


def test_settings_of_other_versions():
  config, older = base.get_config(), saved(model__context_tokens=64)
  del older["model"]["max_span"], older["model"]["remat"], older["wandb"]
  assert not restore(config, older)
  assert settings.model_config(config.model).max_span == 64
  assert settings.flatten(config).keys() == DEFAULTS.keys()
  assert settings.model_config(older["model"]) == ModelConfig(
    context_tokens=64, max_span=64
  )
  assert not earlier_settings.check_resumed(older, resuming(config), 7)

  newer = saved() | {"novel": 3}
  assert restore(base.get_config(), newer) == {"novel": 3}
  newer["model"]["depth"] = 2
  with pytest.raises(settings.SettingsError, match="depth=2 is unknown"):
    restore(base.get_config(), newer)
  with pytest.raises(settings.SettingsError, match="steps='many' is not"):
    restore(base.get_config(), saved() | {"steps": "many"})


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
    earlier_settings.check_resumed(saved(), resuming(config), 7)
  config = base.get_config()
  config.model.dropout = 0.5
  assert earlier_settings.check_resumed(saved(), resuming(config), 7) == {
    "model.dropout": (0.0, 0.5)
  }
