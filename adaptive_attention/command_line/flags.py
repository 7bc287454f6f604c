"""The flags: they are read and checked against the use of main.py.

A flag, or a setting as --config.FIELD=VALUE, that would do nothing is refused.
Flags have no defaults here: a flag that is not given is not passed to the mode,
whose `run` has the defaults.
"""

import ast
import dataclasses
import difflib
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from adaptive_attention.command_line import config_file
from adaptive_attention.command_line.uses import USES, Use
from adaptive_attention.errors import SettingsError


class Flag(NamedTuple):
  """A flag: its help, and which values it may have.

  Attributes:
    help: a sentence about what it does.
    kind: the type of its values, or all values that it may have.
    least, most: the bounds of a number.
  """

  help: str
  kind: type | tuple[str, ...] = str
  least: float | None = None
  most: float | None = None


MODES = tuple(dict.fromkeys(use.mode for use in USES))
FLAGS = {
  "mode": Flag("What to do.", MODES),
  "config": Flag(
    "The experiment, a file of configs/; FILE:ARGUMENT passes get_config an "
    "argument."
  ),
  "workdir": Flag("The run's folder; runs/NAME for --config=configs/NAME.py."),
  "step": Flag(
    "The checkpoint: latest (if not given), best (by validation) or a number."
  ),
  "split": Flag("What to evaluate: valid or test.", ("valid", "test")),
  "protocol": Flag(
    "How to evaluate: window (disjoint), stride:N, memory (read once, as "
    "streams), or memory:N (with N tokens of memory); memory for a model that "
    "has one, else window, if not given."
  ),
  "against": Flag(
    "The folder of another run, evaluated on the same tokens: the difference "
    "is printed with a standard error of its own."
  ),
  "against_protocol": Flag(
    "The protocol of that run's evaluation, if it is another one."
  ),
  "compare": Flag("Folders of other runs to show beside it: DIR,DIR."),
  "heads": Flag("The heads to show: LAYER.HEAD,LAYER.HEAD; all if not given."),
  "inspect_bytes": Flag(
    "How many bytes, or tokens, of the split are predicted without a part of "
    "each head.",
    int,
    0,
  ),
  "prompt": Flag(
    "The text that a sample continues; numbers, where tokens were learned."
  ),
  "prompt_file": Flag("A file with that text, taken byte for byte."),
  "tokens": Flag("How many bytes, or tokens, to write.", int, 1),
  "temperature": Flag(
    "Divides the logits; 0 for the likeliest token.", float, 0.0
  ),
  "top_k": Flag(
    "Draw from so many of the likeliest tokens; 0 for all.", int, 0
  ),
  "top_p": Flag(
    "Draw from the likeliest tokens of so much probability.", float, 0.0
  ),
  "num": Flag("How many texts to write.", int, 1),
  "seed": Flag("Equal seeds give equal texts; under 2^32.", int, 0, 2**32 - 1),
  "harden": Flag("Round spans and periods, and print what that costs.", bool),
  "finetune_steps": Flag("How long to train the hardened model on.", int, 0),
  "layout": Flag("gpt2 to write a folder that others read as one.", ("gpt2",)),
  "dtype": Flag(
    "What the parameters are written in; float32 if not given.",
    ("float32", "bfloat16"),
  ),
}
_HELP = ("help", "h", "helpshort", "helpfull")


@dataclasses.dataclass(frozen=True)
class Given:
  """A command line that was read.

  Attributes:
    use: its way of calling main.py.
    flags: the values of the flags that were given.
    config: all settings, from the file and the flags.
    overrides: the settings that flags change.
  """

  use: Use
  flags: Mapping[str, object]
  config: ConfigDict
  overrides: Mapping[str, object]


def parse(argv, folder: pathlib.Path, defaults: ConfigDict) -> Given | None:
  """Reads the command line; returns None if it asks for help.

  Args:
    argv: the words of the command line, as in `sys.argv`.
    folder: the folder of the configs.
    defaults: the settings without a config; every config has these names.

  Raises:
    SettingsError: a flag, file or setting is wrong or would do nothing.
  """
  values = _defined()
  try:
    rest = values(argv, known_only=True)
  except (flags.Error, ValueError) as error:
    raise SettingsError(f"{_sentence(error)}; see --help") from error
  given = {n: values[n].value for n in values if values[n].present}
  if any(given.get(name) for name in _HELP):
    return None
  config = defaults
  if "config" in given:
    config = config_file.read(given["config"], folder, defaults)
  overrides = _override(config, rest)
  given = {name: given[name] for name in FLAGS if name in given}
  mode = given.pop("mode", MODES[0])
  use = _use_of(mode, given)
  _check(use, given, overrides)
  return Given(use, given, config, overrides)


def _defined() -> flags.FlagValues:
  """Returns all flags but the settings; absl's own flags are left out."""
  values = flags.FlagValues()
  to = {"flag_values": values}
  for name, flag in FLAGS.items():
    bounds = {"lower_bound": flag.least, "upper_bound": flag.most}
    if flag.kind is int:
      flags.DEFINE_integer(name, None, flag.help, **bounds, **to)
    elif flag.kind is float:
      flags.DEFINE_float(name, None, flag.help, **bounds, **to)
    elif flag.kind is bool:
      flags.DEFINE_bool(name, None, flag.help, **to)
    elif flag.kind is str:
      flags.DEFINE_string(name, None, flag.help, **to)
    else:
      flags.DEFINE_enum(name, None, flag.kind, flag.help, **to)
  for name in _HELP:
    flags.DEFINE_bool(name, False, "Prints the help.", **to)
  values.set_gnu_getopt()
  return values


def _sentence(error) -> str:
  """Returns an error's message in one line."""
  return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _override(config, rest) -> dict:
  """Sets in `config` the settings that `rest` changes; returns them by name."""
  try:
    overrides, positional = _read_settings(config, rest)
  except flags.UnrecognizedFlagError as error:
    close = difflib.get_close_matches(error.flagname, [*FLAGS, *_HELP])
    meant = f", but --{close[0]} is one" if close else ""
    raise SettingsError(
      f"--{error.flagname} is not a flag{meant}; see --help"
    ) from error
  except (AttributeError, KeyError) as error:  # of the locked config
    reason = str(error.args[0])
    if reason[:1] in ("'", '"'):  # a KeyError quotes another one in it
      reason = ast.literal_eval(reason)
    reason = reason.strip().replace("\n", "; ")
    raise SettingsError(
      f"unknown setting: {reason}; see configs/base.py"
    ) from error
  except (flags.Error, TypeError, ValueError) as error:
    raise SettingsError(f"{_sentence(error)}; see --help") from error
  for name, value in overrides.items():
    if isinstance(value, ConfigDict):
      raise SettingsError(
        f"config.{name} is a section; give --config.{name}.FIELD=VALUE"
      )
  if positional:
    raise SettingsError(
      f"{positional[0]!r} is not a flag; settings are changed as "
      "--config.FIELD=VALUE"
    )
  return overrides


def _read_settings(config, rest) -> tuple[dict, list[str]]:
  """Returns the settings that `rest` changes, and the words left over."""
  values = flags.FlagValues()
  flag = config_flags.DEFINE_config_dict(
    "config", config, flag_values=values, sys_argv=rest
  )
  values.set_gnu_getopt()
  positional = values(rest)[1:]
  return dict(config_flags.get_override_values(values[flag.name])), positional


def _use_of(mode, given) -> Use:
  """Returns the use of main.py that the mode and the other flags name."""
  extra = ""
  match mode:
    case "train":
      extra = "--config=FILE"
    case "plan" if "config" in given:
      extra = "--config=FILE"
    case "inspect" if given.get("inspect_bytes"):
      extra = "--inspect_bytes=N"
    case "export" if given.get("harden"):
      extra = "--harden"
      if given.get("finetune_steps"):
        extra += " --finetune_steps=N"
  return next(use for use in USES if (use.mode, use.given) == (mode, extra))


def _check(use: Use, given, overrides):
  """Checks that the use gets what it needs, and nothing that it ignores."""
  steps = given.get("finetune_steps")
  if use.mode == "export" and steps and not given.get("harden"):
    raise SettingsError(
      f"--finetune_steps={steps} trains a hardened model; add --harden"
    )
  known = use.flags()
  for name, value in given.items():
    if name not in known:
      raise SettingsError(
        f"--{name}={value} means nothing to {use.name}; leave it out"
      )
    if value == "" and name != "prompt":
      raise SettingsError(f"--{name} is empty; give a value, or leave it out")
  _check_needs(use, given)
  for name, value in overrides.items():
    if not use.acts(name):
      raise SettingsError(_refusal(use, name, value))


def _check_needs(use, given):
  """Checks that an experiment or a run is named, if the use needs one."""
  if use.mode == "train" and "config" not in given:
    raise SettingsError(
      "--mode=train needs --config=FILE, the experiment, a file of configs/; "
      "see --help"
    )
  if use.saved and not given.keys() & {"config", "workdir"}:
    raise SettingsError(
      "--mode=plan needs --config=FILE or --workdir=DIR"
      if use.mode == "plan"
      else f"--mode={use.mode} needs --workdir=DIR, the folder of a run"
    )


def _refusal(use, name, value):
  if name.startswith("model.") and use.saved and use.mode != "plan":
    return (
      f"--config.{name}={value} means nothing to {use.name}, which takes the "
      "model from the checkpoint; leave it out"
    )
  return f"--config.{name}={value} means nothing to {use.name}; leave it out"
