"""Copies of the metrics, for TensorBoard and for Weights & Biases."""

import json
import os
import pathlib
import secrets
import time
from collections.abc import Mapping

from adaptive_attention.training import files

_FLUSH_SECONDS = 10


class TensorBoard:
  """A file of events in the run's folder, which drops steps made again.

  It is written by the thread that calls, so that a failure is noticed.

  Args:
    workdir: the run's folder.
    resumed_step: the step that the run goes on from.

  Raises:
    WriteError: the file cannot be written; so do its methods.
  """

  def __init__(self, workdir, resumed_step: int):
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2

    self._event, self._scalar = event_pb2.Event, summary.scalar
    self._folder = pathlib.Path(workdir, "tensorboard")
    with files.writing(self._folder):
      self._folder.mkdir(exist_ok=True)
      self._file = event_file_writer.EventsWriter(
        str(self._folder / "events"),
        # Two files of one second need different names, in the order of time.
        f".{time.time_ns()}",
      )
    begins = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._add(step=resumed_step + 1, session_log=begins)
    self._flush()

  def write(self, step: int, numbers: Mapping[str, float]):
    for name, value in numbers.items():
      self._add(step=step, summary=self._scalar(name, value))
    if time.monotonic() > self._flushed + _FLUSH_SECONDS:
      self._flush()

  def close(self):
    with files.writing(self._folder):
      self._file.close()

  def _add(self, **values):
    with files.writing(self._folder):
      self._file.write_event(self._event(wall_time=time.time(), **values))

  def _flush(self):
    with files.writing(self._folder):
      self._file.flush()
    self._flushed = time.monotonic()


class WeightsAndBiases:
  """A run of the service, which a resumed run goes on with.

  Args:
    workdir: the run's folder.
    config: every setting.

  Raises:
    WriteError: it cannot be started.
  """

  def __init__(self, workdir, config: Mapping):
    workdir = pathlib.Path(workdir).absolute()
    try:
      import wandb
    except ImportError as error:
      raise files.WriteError(
        "config.wandb=True needs the package wandb; pip install wandb, or "
        "leave it False"
      ) from error
    # wandb reads entity, mode and more from its environment; arguments given
    # here would override those.
    environment = os.environ.get
    try:
      self._run = wandb.init(
        project=environment("WANDB_PROJECT") or "adaptive_attention",
        name=environment("WANDB_NAME") or workdir.name,
        dir=str(workdir),
        config=config,
        id=environment("WANDB_RUN_ID") or _wandb_id(workdir),
        resume="allow",
      )
    except Exception as error:  # of any of the libraries below wandb
      reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
      raise files.WriteError(
        f"wandb cannot be started ({reason}); run wandb login, set "
        "WANDB_MODE=offline, or leave config.wandb False"
      ) from error

  def write(self, step: int, numbers: Mapping[str, float]):
    self._run.log(numbers, step=step)

  def close(self):
    self._run.finish()


def opened(names, workdir, config, resumed_step: int) -> list:
  """Returns the copies of these names, of "tensorboard" and "wandb"."""
  made = []
  if "tensorboard" in names:
    made.append(TensorBoard(workdir, resumed_step))
  if "wandb" in names:
    made.append(WeightsAndBiases(workdir, config))
  return made


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
  files.write_json(path, {"id": known, "workdir": str(workdir)})
  return known


def _read_object(path) -> dict:
  """Returns what `write_json` wrote; {} if that cannot be read."""
  try:
    return dict(json.loads(path.read_text(encoding="utf-8")))
  except (OSError, ValueError, TypeError):
    return {}
