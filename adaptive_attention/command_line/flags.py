"""The command line: the flags, read and held against the table of `uses`.

What a use does not take is refused, be it a flag or a setting, as
--config.FIELD=VALUE; the help is printed from the same table.
"""

import ast
import dataclasses
import difflib
import pathlib
import textwrap
from collections.abc import Mapping

from absl import flags
from ml_collections import ConfigDict, config_flags

from adaptive_attention.command_line import config_file
from adaptive_attention.command_line.uses import EXAMPLES, USES, Use
from adaptive_attention.errors import Error


class UsageError(Error):
  """Flags that are wrong, or that do not fit each other."""


def _defined() -> flags.FlagValues:
  """All flags but the settings; those of absl are not among them."""
  values = flags.FlagValues()
  to = {"flag_values": values}
  modes = list(dict.fromkeys(use.mode for use in USES))
  flags.DEFINE_enum("mode", modes[0], modes, "What to do.", **to)
  flags.DEFINE_string(
    "config",
    None,
    "The experiment, a file of configs/; FILE:ARGUMENT hands get_config an "
    "argument.",
    **to,
  )
  flags.DEFINE_string(
    "workdir",
    None,
    "The run's folder; runs/NAME for --config=configs/NAME.py.",
    **to,
  )
  flags.DEFINE_string(
    "step",
    None,
    "The checkpoint: latest (if not given), best (by validation) or a number.",
    **to,
  )
  flags.DEFINE_enum(
    "split",
    "valid",
    ["valid", "test"],
    "What to evaluate: valid or test.",
    **to,
  )
  flags.DEFINE_string(
    "protocol",
    None,
    "How to evaluate: window (disjoint), stride:N, or memory (read once, as "
    "streams); memory for a model that has one, else window, if not given.",
    **to,
  )
  flags.DEFINE_string("prompt", None, "What a sample goes on from.", **to)
  flags.DEFINE_string(
    "prompt_file", None, "The same out of a file, to the byte.", **to
  )
  flags.DEFINE_integer("tokens", 500, "How many bytes to write.", 1, **to)
  flags.DEFINE_float(
    "temperature",
    0.8,
    "Divides the logits; 0 for the likeliest byte.",
    0.0,
    **to,
  )
  flags.DEFINE_integer(
    "top_k", 0, "Draw from so many of the likeliest bytes; 0 for all.", 0, **to
  )
  flags.DEFINE_float(
    "top_p",
    1.0,
    "Draw from the likeliest bytes of so much probability.",
    0.0,
    **to,
  )
  flags.DEFINE_integer("num", 1, "How many texts to write.", 1, **to)
  flags.DEFINE_integer(
    "seed",
    0,
    "The same seed, the same texts; under 2^32.",
    0,
    2**32 - 1,
    **to,
  )
  flags.DEFINE_bool(
    "harden",
    False,
    "Round spans and periods, and say what that costs.",
    **to,
  )
  flags.DEFINE_integer(
    "finetune_steps", 0, "How long to train the hardened model on.", 0, **to
  )
  flags.DEFINE_bool("help", False, "Prints this page.", short_name="h", **to)
  for name in _HELP[1:]:
    flags.DEFINE_bool(name, False, "The same.", **to)
  return values


_HELP = ("help", "helpshort", "helpfull")


@dataclasses.dataclass(frozen=True)
class Given:
  """What was typed.

  Attributes:
    use: the way of calling main.py that it is.
    flags: the value of each flag, given or not.
    config: all settings, as the file and the flags have them.
    file: of the settings, with its argument; None if it was not given.
    overrides: the settings that flags change.
  """

  use: Use
  flags: Mapping[str, object]
  config: ConfigDict
  file: str | None
  overrides: Mapping[str, object]


def parse(argv, folder: pathlib.Path, defaults: ConfigDict) -> Given | None:
  """Reads the command line; None if it asks for help.

  Args:
    argv: as `sys.argv`.
    folder: where the configs are.
    defaults: the settings without a config, of which all have the names.

  Raises:
    UsageError: a flag, file or setting that is wrong, or that would do nothing.
  """
  values = _defined()
  values.set_gnu_getopt()
  try:
    rest = values(argv, known_only=True)
  except (flags.Error, ValueError) as error:
    raise UsageError(f"{_sentence(error)}; see --help") from error
  if any(values[name].value for name in _HELP):
    return None
  file = values["config"].value
  config = defaults
  if file is not None:
    try:
      config = config_file.read(file, folder, defaults)
    except config_file.ConfigFileError as error:
      raise UsageError(error) from error
  overrides = _override(config, rest, list(values))
  given = [n for n in values if values[n].present and n not in (*_HELP, "h")]
  use = _use_of(values, given)
  _check(use, {name: values[name].value for name in values}, given, overrides)
  return Given(use, values.flag_values_dict(), config, file, overrides)


def _sentence(error) -> str:
  """Why, in one line."""
  return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _override(config, rest, names) -> dict:
  """Sets in `config` what `rest` of a command line says; by name."""
  values = flags.FlagValues()
  try:
    flag = config_flags.DEFINE_config_dict(
      "config", config, flag_values=values, sys_argv=rest
    )
    values.set_gnu_getopt()
    positional = values(rest)[1:]
    overrides = config_flags.get_override_values(values[flag.name])
  except flags.UnrecognizedFlagError as error:
    close = difflib.get_close_matches(error.flagname, names)
    meant = f", but --{close[0]} is one" if close else ""
    raise UsageError(
      f"--{error.flagname} is no flag{meant}; see --help"
    ) from error
  except (AttributeError, KeyError) as error:  # of the locked config
    reason = str(error.args[0])
    if reason[:1] in ("'", '"'):  # one KeyError in another is quoted by it
      reason = ast.literal_eval(reason)
    reason = reason.strip().replace("\n", "; ")
    raise UsageError(
      f"unknown setting: {reason}; see configs/base.py"
    ) from error
  except (flags.Error, TypeError, ValueError) as error:
    raise UsageError(f"{_sentence(error)}; see --help") from error
  for name, value in overrides.items():
    if isinstance(value, ConfigDict):
      raise UsageError(
        f"config.{name} is a section; give --config.{name}.FIELD=VALUE"
      )
  if positional:
    raise UsageError(
      f"{positional[0]!r} is no flag; settings are changed as "
      "--config.FIELD=VALUE"
    )
  return dict(overrides)


def _use_of(values, given) -> Use:
  """The use that a command line is, by what is given besides the mode."""
  mode = values["mode"].value
  extra = ""
  match mode:
    case "train":
      extra = "--config=FILE"
    case "plan" if "config" in given:
      extra = "--config=FILE"
    case "export" if values["harden"].value:
      extra = "--harden"
      if values["finetune_steps"].value:
        extra += " --finetune_steps=N"
  return next(use for use in USES if (use.mode, use.given) == (mode, extra))


def _check(use: Use, values, given, overrides):
  """That the use has what it needs, and nothing that it would pass over."""
  steps = values["finetune_steps"]
  if use.mode == "export" and steps and not values["harden"]:
    raise UsageError(
      f"--finetune_steps={steps} trains a hardened model; add --harden"
    )
  for name in given:
    if name not in ("mode", *use.flags.split()):
      raise UsageError(
        f"--{name}={values[name]} means nothing to {use.name}; leave it out"
      )
    if values[name] == "" and name != "prompt":
      raise UsageError(f"--{name} is empty; give a value, or leave it out")
  has = "config" in given or "workdir" in given
  if use.mode == "train" and "config" not in given:
    raise UsageError(
      "--mode=train needs --config=FILE, the experiment, a file of configs/; "
      "see --help"
    )
  if use.mode == "plan" and not has:
    raise UsageError("--mode=plan needs --config=FILE or --workdir=DIR")
  if use.mode in ("eval", "sample", "export") and not has:
    raise UsageError(
      f"--mode={use.mode} needs --workdir=DIR, the folder of a run"
    )
  for name, value in overrides.items():
    if not use.acts(name):
      raise UsageError(_refusal(use, name, value))


def _refusal(use, name, value):
  if name.startswith("model.") and use.mode in ("eval", "sample", "export"):
    return (
      f"--config.{name}={value} has no place in {use.name}, which takes the "
      "model from the checkpoint; leave it out"
    )
  return f"--config.{name}={value} means nothing to {use.name}; leave it out"


def help_page(defaults: ConfigDict) -> str:
  """The modes, each with its flags and settings, and examples."""
  values = _defined()
  lines = ["python main.py --mode=MODE ...", ""]
  for use in USES:
    lines += [use.name, *_wrapped(use.does, "  ")]
    for name in use.flags.split():
      flag = values[name]
      shown = f"--{name}"
      if flag.default is not None and not flag.boolean:
        shown += f"={flag.default}"
      lines += _wrapped(flag.help, f"  {shown:<18}  ", " " * 22)
    acting = ", ".join(_acting(use, defaults)) or "none"
    lines += [*_wrapped(acting, f"  {'settings':<18}  ", " " * 22), ""]
  lines += _wrapped(
    "Settings are given as --config.FIELD=VALUE; each has its default and its "
    "reason in configs/base.py.",
    "",
  )
  return "\n".join([*lines, "", "Examples", *(f"  {x}" for x in EXAMPLES)])


def _wrapped(text, first, others=None):
  return textwrap.wrap(
    text,
    80,
    initial_indent=first,
    subsequent_indent=first if others is None else others,
    break_long_words=False,
    break_on_hyphens=False,
  )


def _acting(use, config, prefix=""):
  """The settings that act, a section whose fields all do as SECTION.*."""
  found = []
  for name, value in config.items():
    if not isinstance(value, ConfigDict):
      found += [prefix + name] if use.acts(prefix + name) else []
    elif (inner := _acting(use, value, f"{name}.")) and len(inner) == len(
      value
    ):
      found.append(f"{name}.*")
    else:
      found += inner
  return found
