"""The command line: which mode, on which settings, into which folder."""

import contextlib
import logging
import pathlib
import sys
import urllib.parse

from ml_collections import ConfigDict

from adaptive_attention.command_line import config_file, flags
from adaptive_attention.training import console, signals
from configs import base

_HERE = pathlib.Path(__file__).resolve().parent


def main(argv) -> int:
  """Runs the mode; returns the exit code, an error said in one sentence."""
  defaults = base.get_config()
  try:
    given = flags.parse(argv, _HERE / "configs", defaults)
  except flags.UsageError as error:
    return _fail(error, 2)
  if given is None:
    page = flags.help_page(base.get_config())
    with contextlib.suppress(OSError):  # nobody reads on
      console.write(f"{page}\n", sys.stdout)
    return 0
  # Imported after the flags were read, so that a wrong one is told at once.
  from adaptive_attention.errors import Error
  from data import CorpusError

  try:
    _run(given)
  except (CorpusError, Error) as error:
    return _fail(error, getattr(error, "exit_code", 1))
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


def _run(given: flags.Given):
  match given.use.mode:
    case "train":
      _train(given)
    case "eval":
      _eval(given)
    case "sample":
      _sample(given)
    case "export":
      _export(given)
    case "plan":
      _plan(given)
    case "bench":
      _bench(given)


def _train(given):
  from adaptive_attention.modes import train
  from adaptive_attention.training import parallel, settings

  config, workdir = given.config, _workdir(given)
  settings.check(config)
  _check_folder(workdir)
  settings.check_devices(config, max(config.cpu_devices, 1))
  corpus = _corpus(given, config)
  settings.check_data(config, corpus, devices=max(config.cpu_devices, 1))
  parallel.start(
    config.batch_size // config.accumulation_steps, **settings.machine(config)
  )
  settings.check_devices(config, parallel.device_count())
  settings.check_data(config, corpus, parallel.device_count())
  _say_header(given)
  train.run(config, workdir, corpus, step=given.flags["step"])


def _eval(given):
  from adaptive_attention.modes import eval as eval_mode
  from adaptive_attention.training import parallel, settings

  config, step, said = _saved_settings(given)
  corpus = _corpus(given, config)
  parallel.start(config.eval_batch_size, **settings.machine(config))
  _say(said)
  eval_mode.run(
    config,
    _workdir(given),
    corpus,
    step=step,
    split=given.flags["split"],
    protocol=given.flags["protocol"],
  )


def _sample(given):
  from adaptive_attention.modes import sample
  from adaptive_attention.training import parallel, settings

  config, step, said = _saved_settings(given)
  names = ("tokens", "temperature", "top_k", "top_p", "num", "seed")
  prompt = sample.read_prompt(given.flags["prompt"], given.flags["prompt_file"])
  parallel.start(1, **settings.machine(config))
  _say(said)
  sample.run(
    config,
    _workdir(given),
    step=step,
    prompt=prompt,
    **{name: given.flags[name] for name in names},
  )


def _export(given):
  from adaptive_attention.modes import export
  from adaptive_attention.training import parallel, settings

  config, step, said = _saved_settings(given)
  harden, finetune_steps = (
    given.flags[name] for name in ("harden", "finetune_steps")
  )
  corpus = _corpus(given, config) if harden else None
  sequences = config.eval_batch_size
  if finetune_steps:
    sequences = config.batch_size // config.accumulation_steps
  parallel.start(sequences, **settings.machine(config))
  _say(said)
  export.run(
    config,
    _workdir(given),
    corpus,
    step=step,
    harden=harden,
    finetune_steps=finetune_steps,
  )


def _plan(given):
  from adaptive_attention.modes import plan
  from adaptive_attention.training import parallel, settings

  config, step, said = given.config, None, []
  if given.file is None:
    config, step, said = _saved_settings(given)
  else:
    settings.check(config)
    _check_data_flags(given, config)
    if given.flags["workdir"]:
      _check_folder(_workdir(given))
  settings.check_devices(config, max(config.cpu_devices, 1))
  parallel.start(
    config.batch_size // config.accumulation_steps, **settings.machine(config)
  )
  settings.check_devices(config, parallel.device_count())
  _say(said)
  if given.file is not None:
    _say_header(given)
    _say([f"{'workdir':<10} {_workdir(given)}"])
  plan.run(config, None if step is None else _workdir(given), step)


def _bench(given):
  from adaptive_attention.modes import bench
  from adaptive_attention.training import parallel, settings

  config, workdir = given.config, _workdir(given)
  settings.check(config)
  _check_folder(workdir)
  config.cpu_devices = config.cpu_devices or 1  # what is timed
  parallel.start(1, **settings.machine(config))
  bench.run(config, workdir)


def _workdir(given) -> pathlib.Path:
  """The run's folder.

  Raises:
    SettingsError: nothing can be there.
  """
  from adaptive_attention.errors import SettingsError

  workdir = _named_folder(given)
  try:
    workdir.resolve().exists()
  except (OSError, RuntimeError) as error:  # too long, or a circle of links
    raise SettingsError(
      f"--workdir={workdir} cannot be reached ({error}); give another folder"
    ) from error
  return workdir


def _named_folder(given):
  if given.flags["workdir"]:
    return pathlib.Path(given.flags["workdir"])
  if given.use.mode == "bench":
    return pathlib.Path("runs/bench")
  file, argument = config_file.file_and_argument(given.file)
  # As part of a name an argument is quoted: it may hold a slash.
  quoted = [urllib.parse.quote(text, safe="") for text in argument]
  return pathlib.Path("runs") / "_".join([pathlib.Path(file).stem, *quoted])


def _check_folder(workdir: pathlib.Path):
  """That a run may be written there: no file, and no part of the source.

  Raises:
    SettingsError: naming the folder.
  """
  from adaptive_attention.errors import SettingsError

  sources = [p for p in _HERE.iterdir() if (p / "__init__.py").is_file()]
  sources += [p for p in _HERE.glob(".*") if p.is_dir()]
  place = workdir.resolve()
  above = [p for p in (place, *place.parents) if p.exists()]
  if not above[0].is_dir():
    raise SettingsError(
      f"--workdir={workdir} is not possible, as {above[0]} is a file; give a "
      "folder"
    )
  # Compared as places, however they are spelled.
  inside = [s for s in sources if any(p.samefile(s) for p in above)]
  inside += [_HERE] if place.exists() and place.samefile(_HERE) else []
  if inside:
    raise SettingsError(
      f"--workdir={workdir} is not possible, as the source is in {inside[0]}; "
      f"give another folder, as runs/{place.name}"
    )


def _saved_settings(given):
  """(settings, step, what to say): the checkpoint's, under the flags given.

  Every one of them, whatever the defaults are today, but for those of the
  machine. Evaluation is of the whole split unless a flag says less.
  """
  from adaptive_attention.training import checkpoint, settings

  workdir, step, said = _workdir(given), given.flags["step"], []
  with checkpoint.Checkpoints(workdir) as checkpoints:
    step = checkpoints.resolve("latest" if step is None else step)
    saved = checkpoints.read_meta(step)["config"]
  config, defaults = base.get_config(), base.get_config()
  unknown = settings.restore(config, saved)
  if unknown:
    listed = ", ".join(f"{name}={value!r}" for name, value in unknown.items())
    said.append(
      f"passed over: {listed} of the checkpoint, unknown to this version"
    )
  if given.file and given.flags["workdir"]:
    said.append(f"settings   of step {step} in {workdir}, not of {given.file}")
  if given.use.mode != "plan":
    config.eval_tokens = 0
  for name in settings.MACHINE:
    config[name] = defaults[name]
  config.update_from_flattened_dict(given.overrides)
  settings.check(config, given.overrides)
  return config, step, said


def _corpus(given, config):
  """The bytes that the settings name, split."""
  from data import enwik8, python_source, text_file

  _check_data_flags(given, config)
  if config.data.path:  # whole, so that the run finds it from any folder
    config.data.path = str(pathlib.Path(config.data.path).absolute())
    return text_file.load(config.data.path)
  match config.data.corpus:
    case "enwik8":
      return enwik8.load(config.data.cache_dir, log=console.say)
    case "python_source":
      return python_source.load()


def _check_data_flags(given, config):
  """That those which name the data are all used."""
  from adaptive_attention.errors import SettingsError

  unused = {}
  if config.data.corpus != "enwik8":
    unused["data.cache_dir"] = f"data.corpus={config.data.corpus} is read"
  if config.data.path:
    read = f"data.path={config.data.path} is read"
    unused |= {"data.corpus": read, "data.cache_dir": read}
  for name, why in unused.items():
    if name in given.overrides:
      raise SettingsError(
        f"--config.{name}={given.overrides[name]} means nothing where {why}; "
        "leave it out, or change that too (--config.data.path= for no file)"
      )


def _say(lines):

  for line in lines:
    console.say(line)


def _say_header(given):
  """What runs here: versions, and the settings that flags have changed."""
  from adaptive_attention.training import logbook, settings

  versions = logbook.environment()
  before = config_file.read(given.file, _HERE / "configs", base.get_config())
  changed = [
    f"{name}={value!r} (was {_get(before, name)!r})"
    for name, value in given.overrides.items()
  ]
  note = settings.warmup_note(given.config)
  _say(
    [
      f"adaptive_attention {versions['adaptive_attention']} "
      f"({versions['commit']}), python {versions['python']}, "
      f"jax {versions['packages']['jax']}",
      f"{'settings':<10} {', '.join([given.file, *changed])}",
      *([f"{'warmup':<10} {note}"] if note else []),
    ]
  )


def _get(config: ConfigDict, name: str):
  for part in name.split("."):
    config = config[part]
  return config


if __name__ == "__main__":
  logging.basicConfig(level=logging.WARNING)
  signals.Signals(saving=False).__enter__()  # until the program's very end
  sys.exit(main(sys.argv))
