"""The command line: which verb, on which settings, into which folder."""

import ast
import contextlib
import logging
import pathlib
import runpy
import sys

from absl import flags
from ml_collections import ConfigDict, config_flags

from adaptive_attention import console, signals
from configs import base

_HERE = pathlib.Path(__file__).parent
_CONFIG = config_flags.DEFINE_config_file(
  "config",
  str(_HERE / "configs" / "base.py"),
  "The experiment, a file of configs/; --config.FIELD=VALUE changes a setting.",
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "The run's folder; runs/NAME for --config configs/NAME.py."
)
_MODE = flags.DEFINE_enum(
  "mode",
  "train",
  ["train", "eval", "sample", "export", "plan", "bench"],
  "What to do.",
)
_STEP = flags.DEFINE_string(
  "step", None, "The checkpoint to use: latest (if not given), best or N."
)
_SPLIT = flags.DEFINE_enum(
  "split", "valid", ["valid", "test"], "Which split to evaluate."
)
_PROTOCOL = flags.DEFINE_string(
  "protocol",
  None,
  "How to evaluate: window (disjoint), stride:N, or memory (read once, as "
  "streams); memory for a model that has one, else window, if not given.",
)


_PROMPT = flags.DEFINE_string("prompt", None, "What a sample goes on from.")
_PROMPT_FILE = flags.DEFINE_string(
  "prompt_file", None, "The same out of a file, to the byte."
)
_TOKENS = flags.DEFINE_integer("tokens", 500, "How many bytes to write.", 1)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.8, "Divides the logits; 0 for the likeliest byte.", 0.0
)
_TOP_K = flags.DEFINE_integer(
  "top_k", 0, "Draw from so many of the likeliest bytes; 0 for all.", 0
)
_TOP_P = flags.DEFINE_float(
  "top_p", 1.0, "Draw from the likeliest bytes of so much probability.", 0.0
)
_NUM = flags.DEFINE_integer("num", 1, "How many texts to write.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "The same seed, the same texts.", 0)
_HARDEN = flags.DEFINE_bool(
  "harden", False, "Export spans and periods rounded, and say what that costs."
)
_FINETUNE_STEPS = flags.DEFINE_integer(
  "finetune_steps", 0, "Train the hardened model on for so many steps.", 0
)
_EXPORTING = ("harden", "finetune_steps")
_SAMPLING = (
  "prompt",
  "prompt_file",
  "tokens",
  "temperature",
  "top_k",
  "top_p",
  "num",
  "seed",
)


def main() -> int:
  """Runs the verb; returns the exit code, an error said in one sentence."""
  # Imported after the flags were read, so that a wrong one is told at once.
  from adaptive_attention import (
    benchmark,
    checkpoint,
    evaluate,
    export,
    generate,
    logbook,
    parallel,
    plan,
    settings,
    train,
    weights,
  )
  from data import CorpusError

  mode, config = _MODE.value, _CONFIG.value
  try:
    _check_flags(settings)
    settings.check(config)
    corpus = None
    if mode == "train":
      corpus = _corpus(config)
      settings.check_data(config, corpus, devices=max(config.cpu_devices, 1))
    if mode in ("bench", "sample"):  # one device is what is timed or used
      config.cpu_devices = config.cpu_devices or 1
    parallel.start(config)
    step = None
    if mode in ("eval", "sample", "export") or (
      mode == "plan" and not _config_given()
    ):
      config, step = _saved_settings(checkpoint, settings)
    settings.check_devices(config, parallel.device_count())
    match mode:
      case "train":
        settings.check_data(config, corpus, parallel.device_count())
        _say_header(logbook)
        train.run(config, _workdir(), corpus, step=_STEP.value)
      case "eval":
        evaluate.run(
          config,
          _workdir(),
          _corpus(config),
          step=step,
          split=_SPLIT.value,
          protocol=_PROTOCOL.value,
        )
      case "sample":
        generate.run(
          config,
          _workdir(),
          step=step,
          prompt=generate.read_prompt(_PROMPT.value, _PROMPT_FILE.value),
          tokens=_TOKENS.value,
          temperature=_TEMPERATURE.value,
          top_k=_TOP_K.value,
          top_p=_TOP_P.value,
          num=_NUM.value,
          seed=_SEED.value,
        )
      case "export":
        export.run(
          config,
          _workdir(),
          _corpus(config) if _HARDEN.value else None,
          step=step,
          harden=_HARDEN.value,
          finetune_steps=_FINETUNE_STEPS.value,
        )
      case "plan":
        plan.run(config, _WORKDIR.value, step)
      case "bench":
        benchmark.run(config, _workdir())
  except settings.SettingsError as error:
    return _fail(error, 2)
  except train.Stopped as stopped:
    return _fail(stopped, stopped.exit_code)
  except (
    CorpusError,
    benchmark.BenchmarkError,
    checkpoint.CheckpointError,
    evaluate.EvaluationError,
    generate.GenerationError,
    logbook.LogbookError,
    train.TrainingError,
    weights.WeightsError,
  ) as error:
    return _fail(error, 1)
  except OSError as error:
    return _fail_by_system(error)
  return 0


def _fail(error, code) -> int:
  with contextlib.suppress(OSError):  # the code tells, if nobody reads it
    console.write(f"main.py: {error}\n", sys.stderr)
  return code


def _fail_by_system(error) -> int:
  """What the system refused: of files, and of a console that nobody reads."""
  if isinstance(error, BrokenPipeError):
    return _fail("stopped by a closed pipe", 128 + 13)  # SIGPIPE
  return _fail(
    f"{error.filename or 'a file'} cannot be read or written "
    f"({error.strerror or error}); see that it is there, may be used and has "
    "room",
    1,
  )


def _config_given() -> bool:
  return any(a.lstrip("-").split("=")[0] == "config" for a in sys.argv[1:])


def _workdir() -> pathlib.Path:
  if _WORKDIR.value:
    return pathlib.Path(_WORKDIR.value)
  if _MODE.value == "bench":
    return pathlib.Path("runs/bench")
  return pathlib.Path("runs") / pathlib.Path(_config_path()).stem


def _config_path() -> str:
  return flags.FLAGS["config"].config_filename


def _check_flags(settings):
  """Each verb has what it needs, and nothing that it would pass over."""
  mode = _MODE.value
  if not _config_given() and (
    mode == "train"
    or (mode in ("eval", "sample", "export", "plan") and not _WORKDIR.value)
  ):
    needed = {
      "train": "--config=FILE, the experiment, a file of configs/",
      "eval": "--workdir=DIR, the folder of a run",
      "sample": "--workdir=DIR, the folder of a run",
      "export": "--workdir=DIR, the folder of a run",
      "plan": "--config=FILE or --workdir=DIR",
    }[mode]
    raise settings.SettingsError(f"--mode={mode} needs {needed}")
  used = {
    "train": {"step"},
    "eval": {"step", "split", "protocol"},
    "sample": {"step", *_SAMPLING},
    "export": {"step", *_EXPORTING},
    "plan": {"step"},
    "bench": set(),
  }
  for name in ("step", "split", "protocol", *_SAMPLING, *_EXPORTING):
    if flags.FLAGS[name].present and name not in used[mode]:
      raise settings.SettingsError(
        f"--{name}={flags.FLAGS[name].value} means nothing to --mode={mode}; "
        "leave it out"
      )


def _saved_settings(checkpoint, settings):
  """The checkpoint's settings under the flags that were given, and its step.

  The model is the checkpoint's: flags may not change what it computes.
  """
  overrides = flags.FLAGS["config"].override_values
  for name, value in overrides.items():
    if settings.fixes_the_model(name):
      raise settings.SettingsError(
        f"--config.{name}={value} has no place in --mode={_MODE.value}, which "
        "takes the model from the checkpoint; leave it out"
      )
  with checkpoint.Checkpoints(_workdir()) as checkpoints:
    step = checkpoints.resolve(_STEP.value or "latest")
    saved = checkpoints.read_meta(step)["config"]
  config = base.get_config()
  with config.unlocked():
    for name, (_, value) in settings.changes(config, saved).items():
      config.update_from_flattened_dict({name: value})
  config.update_from_flattened_dict(overrides)
  settings.check(config)
  return config, step


def _corpus(config):
  """The bytes that the settings name, split."""
  from adaptive_attention import logbook
  from data import enwik8, python_source, text_file

  if config.data.path:
    return text_file.load(config.data.path)
  match config.data.corpus:
    case "enwik8":
      return enwik8.load(config.data.cache_dir, log=logbook.say)
    case "python_source":
      return python_source.load()


def _say_header(logbook):
  """What runs here: versions, and the settings that flags have changed."""
  versions = logbook.environment()
  logbook.say(
    f"adaptive_attention {versions['adaptive_attention']} "
    f"({versions['commit']}), python {versions['python']}, "
    f"jax {versions['packages']['jax']}"
  )
  before = runpy.run_path(_config_path())["get_config"]()
  overrides = flags.FLAGS["config"].override_values
  changed = [
    f"{name}={value!r} (was {_get(before, name)!r})"
    for name, value in overrides.items()
  ]
  logbook.say(f"{'settings':<10} {', '.join([_config_path(), *changed])}")


def _get(config: ConfigDict, name: str):
  for part in name.split("."):
    config = config[part]
  return config


def _parse_flags() -> None:
  """Reads the command line; a wrong flag is one sentence and exit code 2."""
  try:
    positional = flags.FLAGS(sys.argv)[1:]
  except (AttributeError, KeyError) as error:  # of the locked config
    reason = str(error.args[0])
    if reason[:1] in ("'", '"'):  # one KeyError in another is quoted by it
      reason = ast.literal_eval(reason)
    reason = reason.replace("\n", "; ")
    sys.exit(_fail(f"unknown setting: {reason}; see configs/base.py", 2))
  except (flags.Error, TypeError, ValueError) as error:
    reason = " ".join(str(error).split()).rstrip(".")
    sys.exit(_fail(f"{reason}; see --help", 2))
  if not pathlib.Path(_config_path()).is_file():
    sys.exit(
      _fail(f"--config={_config_path()} is no file; give one of configs/", 2)
    )
  if positional:
    sys.exit(
      _fail(
        f"{positional[0]!r} is no flag; settings are changed as "
        "--config.FIELD=VALUE",
        2,
      )
    )


if __name__ == "__main__":
  logging.basicConfig(level=logging.WARNING)
  signals.Signals(saving=False).__enter__()  # until the program's very end
  _parse_flags()
  sys.exit(main())
