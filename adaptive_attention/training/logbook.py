"""The record of a run: its metrics, masks, evaluations and environment."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys

import jax

import adaptive_attention
from adaptive_attention.training import console, copies, files

NAMES = ("config.json", "environment.json", "metrics.jsonl", "masks.jsonl")


def is_of_run(workdir: pathlib.Path) -> bool:
  """Tells whether a folder has the settings of a run."""
  try:
    config = json.loads((workdir / "config.json").read_bytes())
    return {"model", "optimizer", "data"} <= config.keys()
  except (OSError, ValueError, AttributeError):
    return False


def write_evaluation(workdir, record):
  """Adds a record to evals.jsonl, and replaces eval_SPLIT.json by it.

  `chunk_bits`, which are many numbers, are kept in the former alone.
  """
  workdir = pathlib.Path(workdir)
  files.append_line(workdir / "evals.jsonl", record)
  shown = {name: record[name] for name in record if name != "chunk_bits"}
  files.write_json(workdir / f"eval_{record['split']}.json", shown)


def environment() -> dict:
  """Returns versions, devices and commit, on which results depend too."""
  return {
    **versions(),
    "platform": platform.platform(),
    "cpus": os.cpu_count(),
    "backend": jax.default_backend(),
    "devices": [device.device_kind for device in jax.devices()],
    "processes": jax.process_count(),
    "command": sys.argv,
    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
  }


def versions() -> dict:
  """Returns the versions of what runs here, by name."""
  packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
  return {
    "adaptive_attention": adaptive_attention.__version__,
    "commit": _commit(),
    "python": platform.python_version(),
    "packages": {name: importlib.metadata.version(name) for name in packages},
  }


def _commit() -> str:
  """Returns the commit of the source, with a "+" if files differ from it."""

  def git(*args):
    return subprocess.run(
      ["git", "-C", str(pathlib.Path(__file__).parent), *args],
      capture_output=True,
      encoding="utf-8",
      errors="replace",
      timeout=10,
      check=True,
    ).stdout.strip()

  try:
    return git("rev-parse", "--short=12", "HEAD") + (
      "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    )
  except (OSError, subprocess.SubprocessError):
    return "unknown"


class _Lines:
  """A file with a line of JSON for each of some steps, open for more of them.

  Lines after `resumed_step` are dropped. Lines of that step are dropped too if
  their split is in `made_again`.

  Attributes:
    kept: the lines that were there and stay.
  """

  def __init__(self, path, resumed_step, made_again=()):
    self._path = path
    self.kept = _drop_after(path, resumed_step, made_again)
    with files.writing(path):
      self._file = path.open("ab", buffering=0)

  def write(self, line):
    with files.writing(self._path):
      self._path.stat()  # a file that is gone takes lines, too
      files.add_line(self._file, line)

  def close(self):
    with contextlib.suppress(OSError):  # which `write` has reported
      self._file.close()


class Logbook:
  """The record of one training run; a context manager.

  On entering, lines of metrics.jsonl and masks.jsonl after `resumed_step` are
  dropped, as the run makes those steps again. Only the primary process writes.

  Args:
    workdir: the run's folder.
    config: every setting, a plain dictionary, for config.json.
    resumed_step: the step that the run goes on from; 0 for a new run.
    made_again: the splits whose line of that step is dropped too.
    copies: where the metrics go besides, of "tensorboard" and "wandb".

  Attributes:
    seconds: the wall time of the run up to the last line that is kept.
  """

  def __init__(
    self, workdir, config, resumed_step: int, made_again=(), copies=()
  ):
    self.seconds = 0.0
    self._workdir = pathlib.Path(workdir)
    self._config = config
    self._resumed_step = resumed_step
    self._made_again = made_again
    self._copy_names, self._copies = copies, []
    self._metrics = self._masks = None
    self._added = {}

  def __enter__(self):
    if jax.process_index() != 0:
      return self
    config = self._config
    files.write_json(self._workdir / "config.json", config)
    files.write_json(self._workdir / "environment.json", environment())
    self._metrics = _Lines(
      self._workdir / "metrics.jsonl", self._resumed_step, self._made_again
    )
    self.seconds = max(
      (line.get("seconds", 0.0) for line in self._metrics.kept), default=0.0
    )
    self._masks = _Lines(self._workdir / "masks.jsonl", self._resumed_step)
    self._copies = copies.opened(
      self._copy_names, self._workdir, config, self._resumed_step
    )
    return self

  def __exit__(self, kind, *_):
    for lines in (self._metrics, self._masks):
      if lines:
        lines.close()
    for copy in self._copies:
      # An error that ends the run says more than one of what is left to write.
      with contextlib.suppress(*([files.WriteError] if kind else [])):
        copy.close()

  def add(self, **values):
    """Has the next line of metrics.jsonl hold these too."""
    self._added |= values

  def write(self, step: int, split: str, **values):
    """Writes a line of metrics.jsonl, and the same numbers to its copies."""
    if not self._metrics:
      return
    values, self._added = values | self._added, {}
    self._metrics.write({"step": step, "split": split, **values})
    named = dict(_named(split, values))
    for copy in self._copies:
      copy.write(step, named)

  def write_masks(self, step: int, **values):
    """Writes a line of masks.jsonl: per layer a list of each head's values."""
    if self._masks:
      self._masks.write({"step": step, **values})


def _named(prefix, values):
  """Yields (a/b, value) of each number of a dictionary, also of nested ones.

  A value of None was not measured and is left out.
  """
  for name, value in values.items():
    if isinstance(value, list):
      value = dict(enumerate(value))
    if isinstance(value, dict):
      yield from _named(f"{prefix}/{name}", value)
    elif value is not None:
      yield f"{prefix}/{name}", value


def _drop_after(path, step, made_again) -> list[dict]:
  """Drops the lines of steps that are made again; returns the others."""
  if not path.exists():
    return []
  kept, unreadable = [], []
  for line in path.read_bytes().splitlines(keepends=True):
    try:
      entry = json.loads(line)
      again = entry["step"] == step and entry.get("split") in made_again
      before = entry["step"] <= step and not again
    except (ValueError, KeyError, TypeError, AttributeError):
      unreadable.append(line)
      continue
    if before:
      kept.append(entry)
  # A last line that cannot be read was cut by the end of a process: it may go.
  if unreadable and unreadable != [line]:
    aside = path.with_name(path.name + ".unreadable")
    with files.writing(aside), aside.open("ab") as file:
      file.writelines(unreadable)
    console.say(
      f"{path} has {len(unreadable)} lines that cannot be read; they were "
      f"moved to {aside}"
    )
  files.write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
  return kept
