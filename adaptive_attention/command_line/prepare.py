"""The arguments of a mode's `run`: settings, folder, data and devices.

main.py passes in what is not part of the package: its folder, the default
settings and the data.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from adaptive_attention.command_line import config_file, workdirs
from adaptive_attention.command_line.flags import Given
from adaptive_attention.errors import SettingsError
from adaptive_attention.training import (
  bounds,
  console,
  exported,
  logbook,
  parallel,
  processes,
  settings,
  targets,
)


class Project(NamedTuple):
  """What main.py passes in, as it is not part of the package.

  Attributes:
    folder: the folder of main.py, with configs/ in it.
    get_config: makes the default settings.
    load_corpus: load_corpus(config) returns the data that the settings name.
  """

  folder: pathlib.Path
  get_config: Callable[[], ConfigDict]
  load_corpus: Callable[[ConfigDict], object]


def arguments(given: Given, project: Project) -> tuple[tuple, dict]:
  """Checks everything, makes the devices and prints what runs here.

  Returns:
    The positional arguments of the mode's `run`, the checked settings and the
    workdir, and those by name: flags that were given, the data, the
    checkpoint's step.

  Raises:
    SettingsError: settings are wrong, or do not fit the data or the devices.
    CheckpointError: the checkpoint that is asked for does not exist.
  """
  workdir = workdirs.of(given)
  if given.use.acts("distributed"):
    processes.join(**settings.joining(given.config))
  parameters = given.use.parameters()
  named = {n: v for n, v in given.flags.items() if n in parameters}
  said = []
  if given.use.saved:
    checked, named["step"], said = saved_settings(given, workdir, project)
  else:
    checked = settings.check(given.config)
    workdirs.check(workdir, project.folder)
  config = checked.given
  _check_data_settings(given, config)
  devices = max(config.cpu_devices, 1)
  _check_fit(given, config, None, devices)  # before any data is fetched
  corpus = None
  if "corpus" in parameters and given.use.acts("data.path"):
    corpus = named["corpus"] = _corpus(config, project)
  _check_fit(given, config, corpus, devices)
  if config.target:
    targets.stay_on_cpu()
  parallel.start(_sequences(given, config), cpu_devices=config.cpu_devices)
  processes.agree(_shared(named, config, corpus))
  _check_fit(given, config, corpus)
  if given.use.acts("model.implementation") and not config.target:
    settings.check_attention(checked.model)
  for line in said if given.use.saved else header(given, project):
    console.say(line)
  return (checked, workdir), named


def saved_settings(given: Given, workdir, project: Project):
  """Returns a checkpoint's settings with the flags, its step, lines to print.

  Every setting is the checkpoint's, whatever the defaults are today, except
  those of the machine. The complete split is evaluated unless a flag limits it.
  """

  def read():
    with exported.opened(workdir) as checkpoints:
      step = checkpoints.resolve(given.flags.get("step", "latest"))
      return step, checkpoints.read_meta(step)["config"]

  step, saved = processes.from_primary(read)
  config, defaults, said = project.get_config(), project.get_config(), []
  unknown = restore(config, saved)
  if unknown:
    listed = ", ".join(f"{name}={value!r}" for name, value in unknown.items())
    said.append(f"ignored: {listed} of the checkpoint, unknown to this version")
  if {"config", "workdir"} <= given.flags.keys():
    said.append(
      f"settings   of step {step} in {workdir}, not of {given.flags['config']}"
    )
  if given.use.acts("eval_tokens"):
    config.eval_tokens = 0
  for name in settings.MACHINE:
    config[name] = defaults[name]
  config.update_from_flattened_dict(given.overrides)
  return settings.check(config, given.overrides), step, said


def restore(config: ConfigDict, saved: Mapping) -> dict:
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
  known, values = settings.flatten(config), settings.flatten(saved)
  settings.model_config(saved["model"])
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


def _shared(named, config, corpus) -> dict:
  """Returns what several processes must have alike, by name."""
  flags = {f"--{n}": value for n, value in named.items() if n != "corpus"}
  data = {} if corpus is None else {"data sha256": corpus.sha256}
  versions = logbook.versions()
  return flags | settings.shared(config) | data | versions


def _check_data_settings(given, config):
  """Checks that no flag changes a setting of the data that is not used."""
  unused = {}
  if config.data.corpus != "enwik8":
    unused["data.cache_dir"] = f"data.corpus={config.data.corpus} is read"
  if config.data.path:
    read = f"data.path={config.data.path} is read"
    unused |= {"data.corpus": read, "data.cache_dir": read}
  if bounds.holds_tokens(config.data.path):
    del unused["data.cache_dir"]  # it keeps the digests of the files
  for name, why in unused.items():
    if name in given.overrides:
      raise SettingsError(
        f"--config.{name}={given.overrides[name]} means nothing where {why}; "
        "leave it out, or change that too (--config.data.path= for no file)"
      )


def _corpus(config, project):
  if config.data.path:  # absolute, so that the run finds it from any folder
    config.data.path = str(pathlib.Path(config.data.path).absolute())
  corpus = project.load_corpus(config)
  settings.check_vocabulary(config, corpus)
  return corpus


def _sequences(given, config) -> int:
  """Counts the sequences that are dealt out to the devices of a CPU."""
  if given.use.acts("batch_size"):
    return config.batch_size // config.accumulation_steps
  return config.eval_batch_size if given.use.acts("eval_batch_size") else 1


def _check_fit(given, config, corpus, devices=None):
  """Checks that a training batch fits `devices`, or the devices that exist.

  With a corpus it checks that each device's part of the data is long enough.
  """
  if not given.use.acts("batch_size"):
    return
  devices = devices or parallel.device_count()
  settings.check_devices(config, devices)
  if corpus is not None:
    settings.check_data(config, corpus, devices)


def header(given: Given, project: Project) -> list[str]:
  """Returns lines on what runs: versions, and settings that flags change."""
  if "config" not in given.flags:
    return []
  versions = logbook.environment()
  file = given.flags["config"]
  before = config_file.read(
    file, project.folder / "configs", project.get_config()
  )
  changed = [
    f"{name}={value!r} (was {_get(before, name)!r})"
    for name, value in given.overrides.items()
  ]
  note = settings.warmup_note(given.config)
  return [
    f"adaptive_attention {versions['adaptive_attention']} "
    f"({versions['commit']}), python {versions['python']}, "
    f"jax {versions['packages']['jax']}",
    f"{'settings':<10} {', '.join([file, *changed])}",
    *([f"{'warmup':<10} {note}"] if note else []),
  ]


def _get(config: ConfigDict, name: str):
  for part in name.split("."):
    config = config[part]
  return config
