"""Checkpoints that are whole or refused: the only file that says orbax.

WORKDIR/checkpoints/STEP/ holds these items: `params`, the model's own tree;
`opt_state`, a flat dictionary from path to array, which needs no class of optax
to be read; `memory`, if the model has one, the same of its streams; and `meta`,
JSON with the step, a table of all leaves and a sha256 of each item, since
flipped bits and swapped arrays restore without a word otherwise. Arrays are
saved from the host: but for the memory, which belongs to the streams of the
devices, a checkpoint does not know how many devices made it.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies


class CheckpointError(Exception):
  """A checkpoint that is missing, damaged or of another model."""


class _Quiet(logging.Filter):
  """Drops what orbax tells of each save, some sixty lines.

  Its errors, too: they come as exceptions, and are told once.
  """

  def filter(self, record):
    return "orbax" not in record.pathname


logging.getLogger("absl").addFilter(_Quiet())


def _pass_over_late_reads(unraisable, otherwise=sys.unraisablehook):
  """When one array of a damaged checkpoint fails, the reads of the others end
  after orbax has closed its event loop, and each would print a traceback."""
  if str(unraisable.exc_value) != "Event loop is closed":
    otherwise(unraisable)


sys.unraisablehook = _pass_over_late_reads


@contextlib.contextmanager
def lock(workdir):
  """Makes this process the one writer of `workdir` while the context lasts.

  The lock dies with the process, however it ends.

  Raises:
    CheckpointError: another process holds it.
  """
  path = pathlib.Path(workdir) / "lock"
  with path.open("a+") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise CheckpointError(
        f"workdir {workdir} is being written by process {file.read().strip()};"
        " wait for its end or give another --workdir"
      ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    yield


class Checkpoints:
  """The checkpoints of one run; a context manager.

  All processes may read; only the primary one may save.

  Args:
    workdir: the run's folder.
    keep: how many of the newest to keep, besides the best one.
  """

  def __init__(self, workdir, *, keep: int = 2):
    self._workdir = pathlib.Path(workdir).absolute()
    self._folder = self._workdir / "checkpoints"
    self._keep = keep
    self._manager = None  # of orbax, opened by the first save

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._manager is not None:
      self._manager.close()

  def steps(self) -> list[int]:
    """The steps that have a folder, ascending."""
    if not self._folder.is_dir():
      return []
    names = (path.name for path in self._folder.iterdir() if path.is_dir())
    return sorted(int(name) for name in names if name.isdigit())

  def resolve(self, which: str) -> int:
    """The step that "latest", "best" (by validation) or a number names.

    Raises:
      CheckpointError: there is none such.
    """
    steps = self.steps()
    if not steps:
      raise CheckpointError(
        f"{self._workdir} holds no checkpoint; give the --workdir of a run "
        "that has saved one"
      )
    if which == "latest":
      return steps[-1]
    if which == "best":
      return self._best(steps)
    if which.isdigit() and int(which) in steps:
      return int(which)
    raise CheckpointError(
      f"--step={which} names no checkpoint of {self._workdir}; choose latest, "
      f"best or one of {_listed(steps)}"
    )

  def _best(self, steps):
    figures = {step: self.read_meta(step)["bits_per_char"] for step in steps}
    evaluated = [step for step in steps if figures[step] is not None]
    if not evaluated:
      raise CheckpointError(
        "--step=best finds no checkpoint that was evaluated; choose latest or "
        f"one of {_listed(steps)}"
      )
    return min(evaluated, key=figures.__getitem__)

  def save(
    self,
    step,
    params,
    opt_state,
    meta: Mapping,
    bits_per_char=None,
    memory=None,
  ):
    """Writes a checkpoint; on return it is on the disk.

    Args:
      step: its number, which must be new.
      params, opt_state: trees of arrays, each one whole on this host.
      meta: what else to keep; JSON.
      bits_per_char: of the validation split, if it was evaluated.
      memory: that of the streams of all devices, a tree of arrays.
    """
    params, opt_state, memory = jax.device_get((params, opt_state, memory))
    items = {"params": params, "opt_state": _flat(opt_state)}
    if memory is not None:
      items["memory"] = _flat(memory)
    meta = {
      **meta,
      "step": step,
      "bits_per_char": bits_per_char,
      "leaves": {name: _leaves(tree) for name, tree in items.items()},
      "sha256": {name: _digest(tree) for name, tree in items.items()},
    }
    if self._manager is None:
      self._manager = self._open_manager()
    with self._writing(step):
      saved = self._manager.save(
        step,
        args=ocp.args.Composite(
          meta=ocp.args.JsonSave(meta),
          **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
        ),
      )
      self._manager.wait_until_finished()
    if not saved:
      raise CheckpointError(
        f"the checkpoint of step {step} was not written, as {self._folder} has "
        f"one; remove {self._folder / str(step)} or give another --workdir"
      )

  def record_evaluation(self, step: int, bits_per_char: float):
    """Adds to a checkpoint what its evaluation, which came later, has found."""
    path = self._folder / str(step) / "meta" / "metadata"
    meta = {**self.read_meta(step), "bits_per_char": bits_per_char}
    part = path.with_name(path.name + ".part")
    with self._writing(step):
      part.write_text(json.dumps(meta), encoding="utf-8")
      part.replace(path)

  @contextlib.contextmanager
  def _writing(self, step):
    """Tells what the system refuses, also by way of the libraries below."""
    try:
      yield
    except (OSError, ValueError) as error:
      # tensorstore has a ValueError of many lines, with the number at the end.
      reason = getattr(error, "strerror", None) or _system_error(str(error))
      if reason is None:
        raise
      good = [s for s in self.steps() if s != step and self._is_whole(s)]
      kept = f"{_listed(good)} is kept" if good else "there is no older one"
      raise CheckpointError(
        f"the checkpoint of step {step} cannot be written to {self._folder} "
        f"({reason}); make room there and give the same command again ({kept})"
      ) from error

  def _open_manager(self):
    return ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(
          [policies.LatestN(self._keep), _BestByMeta(self)]
        ),
        # What a killed process left half written.
        cleanup_tmp_directories=True,
        enable_async_checkpointing=False,
        # Without barriers: the other processes do not take part in saving.
        multiprocessing_options=ocp.options.MultiprocessingOptions(
          primary_host=0, active_processes={0}, barrier_sync_key_prefix="save"
        ),
        create=False,
      ),
    )

  def read_meta(self, step: int) -> dict:
    """What `save` was told, and the leaf table.

    Raises:
      CheckpointError: it cannot be read, or belongs to another step.
    """
    return self._guarded(step, lambda: self._meta(step))

  def restore_params(self, step: int):
    """(params, meta), verified; the optimizer's state is not read."""
    return self._guarded(step, lambda: self._read(step, ("params",)))

  def restore_items(self, step: int):
    """(params, opt_state, meta), verified, as they are; the latter flat."""
    return self._guarded(
      step, lambda: self._read(step, ("params", "opt_state"))
    )

  def restore(self, step: int, params_like, opt_state_like):
    """(params, opt_state, meta), verified, as trees like the given ones.

    Raises:
      CheckpointError: damage, naming the older checkpoints that are whole, or
        leaves that are not those of the given trees.
    """
    params, opt_state, meta = self.restore_items(step)
    return (
      _like(params_like, _flat(params), step),
      _like(opt_state_like, opt_state, step),
      meta,
    )

  def restore_memory(self, step: int, memory_like):
    """The memory, verified; None if there is none or it was of other streams.

    Args:
      memory_like: a tree of the same arrays, or of their shapes.
    """
    if "memory" not in self.read_meta(step)["leaves"]:
      return None
    found, _ = self._guarded(step, lambda: self._read(step, ("memory",)))
    if _leaves(found) != _leaves(memory_like):
      return None
    return jax.tree.unflatten(
      jax.tree.structure(memory_like),
      [found[path] for path in _by_path(memory_like)],
    )

  def set_aside_after(self, step: int) -> list[int]:
    """Moves later checkpoints to WORKDIR/set_aside, where none overwrites them.

    Without it the run that goes on from `step` could not save those again.
    """
    later = [other for other in self.steps() if other > step]
    for other in later:
      target = self._workdir / "set_aside" / str(other)
      target.parent.mkdir(exist_ok=True)
      number = 1
      while target.exists():
        number += 1
        target = target.with_name(f"{other}-{number}")
      shutil.move(self._folder / str(other), target)
    return later

  def _guarded(self, step, read):
    """Calls `read`; damage is told with the ways out."""
    try:
      return read()
    except _DamageError as damage:
      good = [s for s in self.steps() if s < step and self._is_whole(s)]
      way_out = (
        f"older ones that are whole: {_listed(good)}; choose one with "
        f"--step={good[-1]}"
        if good
        else "no older one is whole; give another --workdir"
      )
      raise CheckpointError(
        f"the checkpoint of step {step} in {self._workdir} is damaged "
        f"({damage}); {way_out}"
      ) from damage

  def _is_whole(self, step):
    try:
      self._read(step, self._meta(step)["leaves"])
    except _DamageError:
      return False
    return True

  def _meta(self, step):
    path = self._folder / str(step) / "meta" / "metadata"
    try:
      meta = json.loads(path.read_text(encoding="utf-8"))
      found = meta["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise _DamageError(f"meta: {_first_line(error)}") from error
    if found != step:
      raise _DamageError(f"meta: it is of step {found}")
    return meta

  def _read(self, step, names):
    """(*trees, meta), each tree verified against the table and its digest."""
    meta = self._meta(step)
    trees = []
    for name in names:
      try:
        with ocp.PyTreeCheckpointer() as checkpointer:
          tree = checkpointer.restore(self._folder / str(step) / name)
      except Exception as error:  # of any of the libraries below orbax
        raise _DamageError(f"{name}: {_first_line(error)}") from error
      tree = jax.tree.map(np.asarray, tree)
      expected = meta["leaves"][name]
      if _leaves(tree) != expected:
        raise _DamageError(f"{name}: its leaves are not those that were saved")
      if _digest(tree) != meta["sha256"][name]:
        raise _DamageError(f"{name}: its sha256 is not that of what was saved")
      trees.append(tree)
    return (*trees, meta)


class _DamageError(Exception):
  """What is wrong with one checkpoint."""


class _BestByMeta:
  """A policy of orbax: the best by what `record_evaluation` has found."""

  def __init__(self, checkpoints):
    self._checkpoints = checkpoints

  def should_preserve(self, checkpoints, *, context):
    del context
    figures = {}
    for info in checkpoints:
      with contextlib.suppress(_DamageError):  # one that is being written
        figures[info.step] = self._checkpoints._meta(info.step)["bits_per_char"]
    evaluated = [step for step in figures if figures[step] is not None]
    best = min(evaluated, key=figures.__getitem__, default=None)
    return [info.step == best for info in checkpoints]


def _system_error(text):
  """What a number that tensorstore quotes from the system says; or None."""
  found = re.search(r"os_error_code='(\d+)'", text)
  return found and os.strerror(int(found[1]))


def _listed(steps):
  return ", ".join(map(str, steps))


def _first_line(error):
  text = str(error).strip() or type(error).__name__
  return text.splitlines()[0][:200].rstrip(".")


def _by_path(tree) -> dict:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): leaf
    for path, leaf in leaves
  }


def _flat(tree) -> dict[str, np.ndarray]:
  return {path: np.asarray(leaf) for path, leaf in _by_path(tree).items()}


def _leaves(tree) -> dict[str, list]:
  """The leaf table: path -> [shape, dtype]; of arrays or of their shapes."""
  return {
    path: [list(leaf.shape), np.dtype(leaf.dtype).name]
    for path, leaf in sorted(_by_path(tree).items())
  }


def _digest(tree) -> str:
  """sha256 over path, shape, dtype and bytes of all leaves."""
  digest = hashlib.sha256()
  for path, leaf in sorted(_flat(tree).items()):
    digest.update(f"{path} {leaf.shape} {leaf.dtype.name} ".encode())
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()


def _like(template, flat, step):
  """The tree of the template's structure with the leaves of `flat`."""
  expected = _leaves(template)
  found = {path: [list(x.shape), x.dtype.name] for path, x in flat.items()}
  for path in sorted(expected.keys() | found.keys()):
    if expected.get(path) != found.get(path):
      raise CheckpointError(
        f"the checkpoint of step {step} has {_told(found.get(path))} at {path} "
        f"where the settings ask for {_told(expected.get(path))}; give the "
        "settings it was trained with, or another --workdir"
      )
  # _flat keeps the order in which the template flattens.
  return jax.tree.unflatten(
    jax.tree.structure(template), [flat[path] for path in _flat(template)]
  )


def _told(entry):
  if entry is None:
    return "nothing"
  shape, dtype = entry
  return f"{dtype}{shape} ({math.prod(shape):,} numbers)"
