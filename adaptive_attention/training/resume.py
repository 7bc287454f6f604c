"""Where a run goes on from, and the lock that makes it the one writer."""

import contextlib
import os
import pathlib
from typing import NamedTuple

import flax.traverse_util
import jax
import numpy as np

from adaptive_attention import weights
from adaptive_attention.config import ModelConfig
from adaptive_attention.errors import Error
from adaptive_attention.fitted import adapted, shapes_of
from adaptive_attention.mask_parameters import mask_params
from adaptive_attention.model import Transformer
from adaptive_attention.segment_memory import Groups
from adaptive_attention.state import leaves_today
from adaptive_attention.training import (
  console,
  earlier_settings,
  exported,
  files,
  logbook,
  parallel,
  processes,
  regrouping,
  steps,
)
from adaptive_attention.training.checkpoint import CheckpointError, Checkpoints
from adaptive_attention.training.optimizer import Optimizer
from adaptive_attention.training.training_config import TrainingConfig


class DataError(Error):
  """A checkpoint was trained on other data."""


@contextlib.contextmanager
def lock(workdir):
  """Makes this process the one writer of `workdir` while the context lasts.

  The folder is made if it is absent. The lock dies with the process, however it
  ends. Of several processes that work together the primary one holds it.

  Raises:
    CheckpointError: another process holds it, or this one does already; or
      the folder is another program's.
    WriteError: the folder cannot be written to.
  """
  if not parallel.is_primary():
    yield
    return
  _check_own(pathlib.Path(workdir))
  with files.writing(workdir):
    pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
    pathlib.Path(workdir, "lock").touch()
  path = pathlib.Path(workdir).resolve() / "lock"
  if path in _LOCKED:  # opening and closing it again would free it
    raise _is_written(workdir, os.getpid())
  with path.open("a+") as file:
    try:
      _hold(file.fileno())
    except (BlockingIOError, PermissionError):
      file.seek(0)
      raise _is_written(workdir, file.read().strip()) from None
    _LOCKED.add(path)
    try:
      file.truncate(0)
      file.write(f"{os.getpid()}\n")
      file.flush()
      yield
    finally:
      _LOCKED.remove(path)


def _check_own(workdir):
  """Checks that a run overwrites no file of another program.

  Raises:
    CheckpointError: naming such a file.
  """
  theirs = [name for name in logbook.NAMES if (workdir / name).is_file()]
  if theirs and not logbook.is_of_run(workdir):
    raise CheckpointError(
      f"workdir {workdir} holds {theirs[0]}, and no config.json of a run, so "
      "it is another program's; give another --workdir, or move the file away"
    )


_LOCKED = set()  # the files that this process has locked


def _hold(descriptor):
  """Locks a file against other processes.

  Raises:
    OSError: another process has locked it.
  """
  if hasattr(os, "lockf"):
    os.lockf(descriptor, os.F_TLOCK, 0)
  else:  # on Windows
    import msvcrt

    # Locked bytes cannot be read there, so a byte far behind the process' id is
    # locked.
    os.lseek(descriptor, 1 << 30, os.SEEK_SET)
    msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)


def _is_written(workdir, process):
  return CheckpointError(
    f"workdir {workdir} is being written by process {process}; wait for its "
    "end or give another --workdir"
  )


class Start(NamedTuple):
  """What a run starts or goes on from.

  Attributes:
    state: the train state.
    saved_step: the step of the checkpoint that it was restored from, or None.
    owed: whether the step has yet to be evaluated, as the run ended too early.
    groups: of the heads of the checkpoint's memory; None if it says none.
  """

  state: steps.TrainState
  saved_step: int | None
  owed: bool
  groups: tuple[Groups, ...] | None = None

  @property
  def step(self) -> int:
    return self.saved_step or 0


def start(
  saved: Checkpoints,
  model: Transformer,
  optimizer: Optimizer,
  config: TrainingConfig,
  corpus,
  which: str | None,
) -> Start:
  """Restores the train state to go on from, or makes a new one, on the host.

  Args:
    saved: the run's checkpoints.
    model, optimizer: what the train state is of.
    config: the settings to go on with.
    corpus: the data to go on with.
    which: the checkpoint, instead of the newest; later ones are set aside.

  Raises:
    CheckpointError: the checkpoint does not exist or is damaged.
    DataError: it was trained on other data.
    SettingsError: the settings do not fit it.
  """
  found = processes.from_primary(lambda: _newest(saved, which))
  if found is None:
    return Start(_first_state(model, optimizer, config), None, False)
  # The settings are checked first, so that one that does not fit is named.
  step, meta = found
  check_same_data(corpus, meta, step)
  _say_changes(earlier_settings.check_resumed(meta["config"], config, step))
  shapes = jax.eval_shape(
    lambda: steps.init_state(model, optimizer, config.seed)
  )
  like = shapes.params, shapes.opt_state
  params, opt_state = _from_primary(
    lambda: saved.restore(step, *like)[:2], like
  )
  if which is not None and parallel.is_primary():
    moved = saved.set_aside_after(step)
    if moved:
      console.say(f"set aside: the later checkpoints {moved}")
  state = steps.TrainState(np.asarray(step, np.int32), params, opt_state)
  owed = meta["bits"] is None and config.every.evaluates(step)
  return Start(state, step, owed, regrouping.from_meta(meta, config.model))


def _first_state(model, optimizer, config) -> steps.TrainState:
  """Returns the train state of step 0, of parameters given or drawn."""
  state = jax.device_get(steps.init_state(model, optimizer, config.seed))
  if not config.init_from:
    return state
  return state.replace(
    params=_from_primary(
      lambda: _given(config.init_from, config.model), state.params
    )
  )


def _newest(saved, which) -> tuple[int, dict] | None:
  """Returns (step, meta) of the checkpoint to go on from; None if none is."""
  if saved.steps():
    step = saved.resolve("latest" if which is None else which)
    return step, saved.read_meta(step)
  if which is not None:
    raise CheckpointError(
      f"--step={which} names no checkpoint, as there is none yet; leave it "
      "out to start from the beginning"
    )
  return None


def _from_primary(read, like, part=lambda array: array):
  """Returns the tree that `read` reads on the primary process, on all.

  Args:
    read: called there alone, as no other process need see the files.
    like: a tree of the same arrays, or of their shapes.
    part: what each process keeps of an array.
  """
  tree = read() if parallel.is_primary() else None
  processes.exchange(None)  # all of them learn of a failure there
  return parallel.from_primary(tree, like, part)


def _given(init_from: str, model: ModelConfig) -> dict:
  """Returns the parameters of a file, or of the newest checkpoint of a run."""
  has_checkpoints = (pathlib.Path(init_from) / "checkpoints").is_dir()
  if not (has_checkpoints or exported.is_alone(init_from)):
    return weights.load(init_from, model)
  with exported.opened(init_from) as saved:
    step = saved.resolve("latest")
    params, meta = saved.restore_params(step)
  try:
    params = adapted(params, meta["config"]["model"], model)
  except weights.WeightsError as error:
    raise weights.WeightsError(f"init_from={init_from}: {error}") from error
  console.say(f"parameters of step {step} of {init_from}")
  return params


def _say_changes(changed):
  if changed:
    said = (f"{n}={new!r} (was {old!r})" for n, (old, new) in changed.items())
    console.say(f"changed since the checkpoint: {', '.join(said)}")


def start_memory(
  saved: Checkpoints, config: ModelConfig, streams: int, start: Start
):
  """Returns the memory of this process' devices at the start.

  Args:
    saved: the run's checkpoints.
    config: the model's settings.
    streams: how many streams each device has.
    start: what the run starts or goes on from.

  Returns:
    The memory of the checkpoint. If it is of other streams, a line says so, and
    the memory has read nothing.
  """
  if not config.memory_tokens:
    return steps.start_memory(config, streams)
  restored = _restored_memory(saved, config, streams, start)
  if restored is None:
    layers = mask_params(start.state.params, config)
    groups = regrouping.groups_for(layers, config)
    restored = steps.start_memory(config, streams, groups)
  regrouping.say(restored, config, streams)
  return restored


def _restored_memory(saved, config, streams, start):
  """Returns the memory of the checkpoint; None if none is, or of others."""
  step = start.step
  if not step:
    return None
  N = parallel.device_count()
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((N, *x.shape[1:]), x.dtype),
    jax.eval_shape(lambda: steps.start_memory(config, streams, start.groups)),
  )
  restored = None
  if parallel.is_primary():
    restored = saved.restore_memory(step, like, leaves_today)
  if not processes.from_primary(lambda: restored is not None):
    console.say(
      "memory     empty: the streams restart, as the checkpoint's are not "
      f"those of {N} device(s) with {streams} sequences each in "
      f"{config.compute_dtype}"
    )
    return None
  shards = parallel.local_shards()
  return parallel.deal(
    _from_primary(lambda: restored, like, lambda x: x[shards])
  )


def params_and_meta(workdir, step: int, model: ModelConfig):
  """Returns (params, meta) of a checkpoint that the primary process reads.

  Args:
    workdir, step: the run's folder and the checkpoint.
    model: the settings of its model.

  Raises:
    CheckpointError: it is damaged or does not exist.
  """
  params = meta = None
  if parallel.is_primary():
    with exported.opened(workdir) as saved:
      params, meta = saved.restore_params(step)
  meta = processes.exchange(meta)[0]
  like = flax.traverse_util.unflatten_dict(
    {
      path: jax.ShapeDtypeStruct(shape, np.float32)
      for path, shape in shapes_of(model).items()
    },
    sep="/",
  )
  return parallel.from_primary(params, like), meta


def check_same_data(corpus, meta, step):
  """Checks that a checkpoint was trained on these data.

  Raises:
    DataError: naming both.
  """
  if meta["data"]["sha256"] != corpus.sha256:
    raise DataError(
      f"the checkpoint of step {step} was trained on {meta['data']['name']} "
      f"(sha256 {meta['data']['sha256'][:12]}...), not on {corpus.name} "
      f"({corpus.sha256[:12]}...); give that data, or another --workdir"
    )


def say_other_data(corpus, meta):
  """Prints a line if the checkpoint was not trained on `corpus`."""
  trained = meta["data"]
  if corpus.sha256 != trained["sha256"]:
    console.say(
      f"other data: {corpus.name} (sha256 {corpus.sha256[:12]}...); step "
      f"{meta['step']} was trained on {trained['name']} (sha256 "
      f"{trained['sha256'][:12]}...)"
    )
