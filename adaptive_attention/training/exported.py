"""A run of which only model.safetensors is left: what --mode=export wrote.

It is read as a run with one checkpoint, so that a model can be evaluated,
sampled and inspected where it was not trained.
"""

import contextlib
import json
import pathlib
from collections.abc import Mapping

from adaptive_attention import weight_files, weights
from adaptive_attention.errors import first_line
from adaptive_attention.training import settings
from adaptive_attention.training.checkpoint import CheckpointError, Checkpoints

NAME = "model.safetensors"
_KEPT = ("config", "data", "bits")  # of a checkpoint's meta


def opened(workdir) -> "Checkpoints | Exported":
  """Returns the checkpoints of a run, or its exported model if it has none.

  Either is a context manager with `resolve`, `read_meta` and `restore_params`.
  """
  return Exported(workdir) if is_alone(workdir) else Checkpoints(workdir)


def is_alone(workdir) -> bool:
  """Tells whether a folder holds an exported model of ours, and no checkpoint.

  Beside a config.json it is a GPT-2, or is left of a run that is not whole.
  """
  folder = pathlib.Path(workdir)
  others = folder / "checkpoints", folder / "config.json"
  return (folder / NAME).is_file() and not any(p.exists() for p in others)


def save(path, params, meta: Mapping):
  """Writes a checkpoint's parameters, and what its run is.

  Args:
    path: the file, which is called model.safetensors.
    params: the parameters, in the dtype that they are written in.
    meta: that of the checkpoint. Of an absolute path in its settings the last
      part is kept, as folders are those of one machine.

  Raises:
    OSError: the file cannot be written; the old content stays.
  """
  kept = {name: meta[name] for name in _KEPT}
  kept["config"] = settings.without_folders(kept["config"])
  config = settings.model_config(meta["config"]["model"])
  weights.save(path, params, config, meta["step"], run=json.dumps(kept))


class Exported(contextlib.AbstractContextManager):
  """An exported model as a run's one checkpoint; a context manager.

  Args:
    workdir: a folder of which `is_alone` is true.
  """

  def __init__(self, workdir):
    self._path = pathlib.Path(workdir) / NAME

  def __exit__(self, *_):
    pass

  def resolve(self, which: str) -> int:
    """Returns the step that "latest", "best" or its number names.

    Raises:
      CheckpointError: it is another step, or the file cannot be read.
    """
    step = self._meta()["step"]
    if which not in ("latest", "best", str(step)):
      raise CheckpointError(
        f"--step={which} names no checkpoint, as {self._path} alone is there; "
        f"choose latest or {step}"
      )
    return step

  def read_meta(self, step: int) -> dict:
    """Returns the meta of the checkpoint that was exported.

    Raises:
      CheckpointError: the file cannot be read, or holds another step.
    """
    self.resolve(str(step))
    return self._meta()

  def restore_params(self, step: int) -> tuple[dict, dict]:
    """Returns (float32 parameters, meta).

    Raises:
      CheckpointError: the file is damaged or incomplete, or holds another step.
    """
    meta = self.read_meta(step)
    config = settings.model_config(meta["config"]["model"])
    try:
      return weights.load(self._path, config), meta
    except weight_files.WeightsError as error:
      raise CheckpointError(str(error).removeprefix("init_from=")) from error

  def _meta(self):
    try:
      texts = weight_files.read_metadata(self._path)
      run = json.loads(texts["run"])
      dict(run["config"]["model"], **run["data"])  # what every reader takes
      kept = {name: run[name] for name in _KEPT}
      return {"step": int(texts["step"]), **kept}
    except KeyError as error:
      raise CheckpointError(
        f"{self._path} does not say what run it is of ({error} is missing); "
        "export that run again, or give the --workdir of one with checkpoints"
      ) from error
    except (weight_files.WeightsError, TypeError, ValueError) as error:
      raise CheckpointError(f"{self._path}: {first_line(error)}") from error
