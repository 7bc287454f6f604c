"""Files of settings: what get_config returns, or why it cannot be called."""

import inspect
import os
import pathlib
import runpy
import traceback

from ml_collections import ConfigDict

from adaptive_attention.errors import SettingsError


class ConfigFileError(SettingsError):
  """A file of settings is missing, fails or has other settings."""


def file_and_argument(given: str) -> tuple[str, list[str]]:
  """Splits --config into a file and the arguments of its get_config."""
  if os.path.isfile(given):  # also False for a name that no file may have
    return given, []
  file, *argument = given.split(":", 1)
  return file, argument


def read(given: str, folder: pathlib.Path, defaults: ConfigDict) -> ConfigDict:
  """Returns the settings of a file, locked.

  Args:
    given: FILE.py, or FILE.py:ARGUMENT.
    folder: the folder of the configs.
    defaults: a config with all settings.

  Raises:
    ConfigFileError: the file does not exist, fails, or has other settings.
  """
  file, argument = file_and_argument(given)
  if not os.path.isfile(file) or not file.endswith(".py"):
    exists = os.path.exists(file)
    raise ConfigFileError(
      f"--config={given} "
      + ("is not a Python file" if exists else "does not exist")
      + "; give one of configs/: "
      + ", ".join(sorted(p.name for p in folder.glob("[!_]*.py")))
    )
  try:
    config = _called(given, file, argument)
  except ConfigFileError:
    raise
  except BaseException as error:  # a file may raise anything
    reason = " ".join(traceback.format_exception_only(error)[-1].split())
    raise ConfigFileError(
      f"--config={given} fails ({reason}); correct it, or give another"
    ) from error
  if not isinstance(config, ConfigDict):
    raise ConfigFileError(
      f"get_config of --config={given} returns {type(config).__name__}; "
      "expected a ConfigDict, as of configs/base.py"
    )
  _check_names(given, _typed(config), _typed(defaults))
  return config.lock()


def _called(given, file, argument):
  get_config = runpy.run_path(file).get("get_config")
  if not callable(get_config):
    raise ConfigFileError(
      f"--config={given} has no get_config; give a file like configs/base.py"
    )
  try:
    inspect.signature(get_config).bind(*argument)
  except TypeError as error:
    takes = "no argument" if argument else "an argument"
    shape = file if argument else f"{file}:ARGUMENT"
    raise ConfigFileError(
      f"get_config of --config={given} takes {takes}; give --config={shape}"
    ) from error
  return get_config(*argument)


def _typed(config, prefix="") -> dict[str, type]:
  """Returns the type of each setting; a section stands before its fields."""
  found = {}
  for name, value in config.items():
    found[prefix + name] = type(value)
    if isinstance(value, ConfigDict):
      found |= _typed(value, f"{prefix}{name}.")
  return found


def _check_names(given, found, expected):
  for name in [*expected, *found]:
    kinds = [kinds.get(name) for kinds in (found, expected)]
    if kinds[0] is not kinds[1]:
      has, wants = (k.__name__ if k else "nothing" for k in kinds)
      raise ConfigFileError(
        f"--config={given} has {has} at config.{name}; expected {wants}; start "
        "from base.get_config(), as the files of configs/ do"
      )
