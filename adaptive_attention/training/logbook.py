"""The files that a run writes: metrics, their copies, masks, and others."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import secrets
import subprocess
import sys
import time

import jax

import adaptive_attention
from adaptive_attention.atomic_write import atomic_write
from adaptive_attention.errors import Error
from adaptive_attention.training import console


class LogbookError(Error):
  """A file or a copy of the metrics cannot be written."""


@contextlib.contextmanager
def writing(path):
  """Wraps the writing of a file or folder; a failure becomes one sentence.

  Raises:
    LogbookError: naming the path and the system's reason.
  """
  try:
    yield
  except OSError as error:
    raise LogbookError(
      f"{path} cannot be written ({error.strerror or error}); make room, or "
      "name a folder that may be written to"
    ) from error


def write_bytes(path, content: bytes):
  """Replaces a file at once: a reader finds the old or the new content.

  Raises:
    LogbookError: it cannot be written; the old content stays.
  """
  with writing(path):
    atomic_write(path, content)


def write_text(path, text: str):
  """Replaces a file by text in UTF-8, as `write_bytes` does."""
  write_bytes(path, text.encode())


def write_json(path, content):
  """Replaces a file by JSON, as `write_bytes` does."""
  write_text(path, json.dumps(content, indent=2) + "\n")


def read_lines(path) -> list[dict]:
  """Returns the objects of a file of JSON lines; a cut line is left out.

  Raises:
    OSError: the file cannot be read.
  """
  found = []
  for text in pathlib.Path(path).read_bytes().splitlines():
    try:
      line = json.loads(text)
    except ValueError:
      continue
    if isinstance(line, dict):
      found.append(line)
  return found


def write_evaluation(workdir, record):
  """Adds a record to evals.jsonl, and replaces eval_SPLIT.json by it.

  `chunk_bits`, which are many numbers, are kept in the former alone.
  """
  workdir = pathlib.Path(workdir)
  _append_line(workdir / "evals.jsonl", record)
  shown = {name: record[name] for name in record if name != "chunk_bits"}
  write_json(workdir / f"eval_{record['split']}.json", shown)


def _append_line(path, content):
  """Adds a line of JSON; it replaces half a line that a killed writer left."""
  with writing(path), path.open("a+b") as file:
    file.seek(0)
    last = file.read().rpartition(b"\n")[2]
    if last and _is_json(last):
      file.write(b"\n")
    else:
      file.truncate(file.tell() - len(last))
    file.write(json.dumps(content).encode() + b"\n")


def _is_json(line: bytes) -> bool:
  try:
    json.loads(line)
  except ValueError:
    return False
  return True


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

  Lines after `resumed_step` are dropped, and those of it whose split is in
  `made_again`.

  Attributes:
    kept: the lines that were there and stay.
  """

  def __init__(self, path, resumed_step, made_again=()):
    self._path = path
    self.kept = _drop_after(path, resumed_step, made_again)
    with writing(path):
      self._file = path.open("a", encoding="utf-8")

  def write(self, line):
    with writing(self._path):
      self._file.write(json.dumps(line) + "\n")
      self._file.flush()

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
    self._made_again, self._copies = made_again, copies
    self._metrics = self._masks = None
    self._tensorboard = None
    self._wandb = None

  def __enter__(self):
    if jax.process_index() != 0:
      return self
    config = self._config
    write_json(self._workdir / "config.json", config)
    write_json(self._workdir / "environment.json", environment())
    self._metrics = _Lines(
      self._workdir / "metrics.jsonl", self._resumed_step, self._made_again
    )
    self.seconds = max(
      (line.get("seconds", 0.0) for line in self._metrics.kept), default=0.0
    )
    self._masks = _Lines(self._workdir / "masks.jsonl", self._resumed_step)
    if "tensorboard" in self._copies:
      self._tensorboard = _start_tensorboard(self._workdir, self._resumed_step)
    if "wandb" in self._copies:
      self._wandb = _start_wandb(self._workdir, config)
    return self

  def __exit__(self, *_):
    for lines in (self._metrics, self._masks):
      if lines:
        lines.close()
    if self._tensorboard:
      self._tensorboard.close()
    if self._wandb:
      self._wandb.finish()

  def write(self, step: int, split: str, **values):
    """Writes a line of metrics.jsonl, and the same numbers to its copies."""
    if not self._metrics:
      return
    self._metrics.write({"step": step, "split": split, **values})
    named = dict(_named(split, values))
    if self._tensorboard:
      for name, value in named.items():
        self._tensorboard.add_scalar(name, value, step)
    if self._wandb:
      self._wandb.log(named, step=step)

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
    with writing(aside), aside.open("ab") as file:
      file.writelines(unreadable)
    console.say(
      f"{path} has {len(unreadable)} lines that cannot be read; they were "
      f"moved to {aside}"
    )
  write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
  return kept


def _start_tensorboard(workdir, resumed_step):
  """Returns a writer into the run's folder that drops steps made again."""
  import tensorboardX

  return tensorboardX.SummaryWriter(
    str(workdir / "tensorboard"),
    purge_step=resumed_step + 1,
    # Two files of one second need different names, in the order of time.
    filename_suffix=f".{time.time_ns()}",
  )


def _start_wandb(workdir, config):
  try:
    import wandb
  except ImportError as error:
    raise LogbookError(
      "config.wandb=True needs the package wandb; pip install wandb, or leave "
      "it False"
    ) from error
  # wandb reads entity, mode and more from its environment; arguments given here
  # would override those.
  environment = os.environ.get
  try:
    return wandb.init(
      project=environment("WANDB_PROJECT") or "adaptive_attention",
      name=environment("WANDB_NAME") or workdir.absolute().name,
      dir=str(workdir),
      config=config,
      id=environment("WANDB_RUN_ID") or _wandb_id(workdir.absolute()),
      resume="allow",
    )
  except Exception as error:  # of any of the libraries below wandb
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    raise LogbookError(
      f"wandb cannot be started ({reason}); run wandb login, set "
      "WANDB_MODE=offline, or leave config.wandb False"
    ) from error


def _wandb_id(workdir) -> str:
  """Returns the run's id at wandb: random, and kept in the workdir.

  A workdir that was moved keeps its id. A copy of a workdir is another run as
  long as the original exists.
  """
  path = workdir / "wandb.json"
  kept = _read_object(path)
  known, home = kept.get("id"), kept.get("workdir", str(workdir))
  if known and home == str(workdir):
    return known
  if (
    not known or _read_object(pathlib.Path(home, path.name)).get("id") == known
  ):
    known = secrets.token_hex(8)
  write_json(path, {"id": known, "workdir": str(workdir)})
  return known


def _read_object(path) -> dict:
  """Returns what `write_json` wrote; {} if that cannot be read."""
  try:
    return dict(json.loads(path.read_text(encoding="utf-8")))
  except (OSError, ValueError, TypeError):
    return {}
