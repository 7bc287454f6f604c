"""Checkpoints that are intact or refused; the only file that names orbax.

WORKDIR/checkpoints/STEP/ holds these items:

  params      the model's own tree
  opt_state   a flat dictionary from path to array, which can be read without
              any class of optax
  memory      such a dictionary of the streams' memory, if the model has one
  meta        JSON: the step, a table of all leaves and a sha256 of each item,
              as flipped bits and swapped arrays restore without an error

Arrays are saved from the host. Except for the memory, which belongs to the
streams of the devices, a checkpoint does not depend on the number of devices.
"""

import contextlib
import os
import pathlib
import re
import shutil
from collections.abc import Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp

from adaptive_attention.errors import Error, first_line
from adaptive_attention.training import (
  checkpoint_meta,
  leaf_table,
  leftovers,
  library_noise,
)
from adaptive_attention.training.checkpoint_meta import DamageError
from adaptive_attention.training.plain_path import plain_path


class CheckpointError(Error):
  """A checkpoint is missing, is damaged or belongs to another model."""


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
    self._context = contextlib.ExitStack()

  def __enter__(self) -> "Checkpoints":
    with self._plain_workdir():  # an error comes now, not at the first save
      pass
    self._late_reads = self._context.enter_context(library_noise.quiet())
    return self

  def __exit__(self, *_):
    self._context.close()

  def steps(self) -> list[int]:
    """Returns the steps that have a folder, ascending."""
    if not self._folder.is_dir():
      return []
    names = (path.name for path in self._folder.iterdir() if path.is_dir())
    return sorted(int(name) for name in names if name.isdecimal())

  def resolve(self, which: str) -> int:
    """Returns the step that "latest", "best" (by validation) or a number names.

    Raises:
      CheckpointError: there is no such checkpoint.
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
    if which.isdecimal() and int(which) in steps:
      return int(which)
    raise CheckpointError(
      f"--step={which} names no checkpoint of {self._workdir}; choose latest, "
      f"best or one of {_listed(steps)}"
    )

  def _best(self, steps):
    best = _best_of({step: self.read_meta(step)["bits"] for step in steps})
    if best is None:
      raise CheckpointError(
        "--step=best finds no checkpoint that was evaluated; choose latest or "
        f"one of {_listed(steps)}"
      )
    return best

  def save(
    self,
    step: int,
    params,
    opt_state,
    meta: Mapping,
    bits: float | None = None,
    memory=None,
  ):
    """Writes a checkpoint and reads it back; only then removes older ones.

    Args:
      step: its number, which must be new.
      params, opt_state: trees of arrays, each complete on this host.
      meta: what else to keep; JSON.
      bits: per token of the validation split, if it was evaluated.
      memory: the memory of the streams of all devices, a tree of arrays.

    Raises:
      CheckpointError: a checkpoint of this step exists, or what was read back
        differs from what was to be saved.
    """
    params, opt_state, memory = jax.device_get((params, opt_state, memory))
    items = {"params": params, "opt_state": leaf_table.flat(opt_state)}
    if jax.tree.leaves(memory):
      items["memory"] = leaf_table.flat(memory)
    meta = {
      **meta,
      "step": step,
      "bits": bits,
      "leaves": {name: leaf_table.table(tree) for name, tree in items.items()},
      "sha256": {name: leaf_table.digest(tree) for name, tree in items.items()},
    }
    if step in self.steps():
      raise CheckpointError(
        f"the checkpoint of step {step} was not written, as {self._folder} has "
        f"one; remove {self._folder / str(step)} or give another --workdir"
      )
    with self._writing(step):
      leftovers.remove(self._folder)
      self._write(step, items, checkpoint_meta.sealed(meta))
    self._guarded(step, lambda: self._verify(step))
    with self._writing(step):
      self._remove_older()

  def _write(self, step, items, meta):
    """Has orbax write the folder of a step, completely or not at all."""
    options = ocp.CompositeOptions(multiprocessing_options=_alone())
    handler = ocp.CompositeCheckpointHandler(composite_options=options)
    with (
      self._plain_workdir() as workdir,
      ocp.Checkpointer(
        handler, multiprocessing_options=_alone()
      ) as checkpointer,
    ):
      checkpointer.save(
        workdir / "checkpoints" / str(step),
        args=ocp.args.Composite(
          meta=ocp.args.JsonSave(meta),
          **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
        ),
      )

  def _remove_older(self):
    """Keeps the newest, the best, and those whose meta cannot be read."""
    steps = self.steps()
    figures = {}
    for step in steps:
      with contextlib.suppress(DamageError):
        figures[step] = self._meta(step)["bits"]
    for step in figures.keys() - {_best_of(figures), *steps[-self._keep :]}:
      leftovers.set_aside(self._folder / str(step))
    leftovers.remove(self._folder)

  def record_evaluation(self, step: int, bits: float):
    """Adds the result of a later evaluation to a checkpoint."""
    meta = {**self.read_meta(step), "bits": bits}
    with self._writing(step):
      checkpoint_meta.write(self._folder / str(step), meta)

  @contextlib.contextmanager
  def _writing(self, step):
    """Turns a system's error, also inside a library, into one sentence."""
    try:
      yield
    except (OSError, ValueError) as error:
      # tensorstore has a ValueError of many lines, with the number at the end.
      reason = getattr(error, "strerror", None) or _system_error(str(error))
      if reason is None:
        raise
      intact = [s for s in self.steps() if s != step and self._is_intact(s)]
      kept = f"{_listed(intact)} is kept" if intact else "there is no older one"
      raise CheckpointError(
        f"the checkpoint of step {step} cannot be written to {self._folder} "
        f"({reason}); make room there and give the same command again ({kept})"
      ) from error

  def read_meta(self, step: int) -> dict:
    """Returns the meta that `save` was given, with leaf table and digests.

    Raises:
      CheckpointError: it cannot be read, or belongs to another step.
    """
    return self._guarded(step, lambda: self._meta(step))

  def restore_params(self, step: int):
    """Returns (params, meta), verified, without reading opt_state."""
    return self._guarded(step, lambda: self._read(step, ("params",)))

  def restore_items(self, step: int):
    """Returns (params, opt_state, meta), verified; opt_state is flat."""
    return self._guarded(
      step, lambda: self._read(step, ("params", "opt_state"))
    )

  def restore(self, step: int, params_like, opt_state_like):
    """Returns (params, opt_state, meta), verified, as trees like those given.

    Args:
      params_like, opt_state_like: trees of arrays, or of their shapes.

    Raises:
      CheckpointError: damage, naming the older checkpoints that are intact, or
        leaves that are not those of the given trees.
    """
    params, opt_state, meta = self.restore_items(step)
    return (
      _like(params_like, leaf_table.flat(params), step),
      _like(opt_state_like, opt_state, step),
      meta,
    )

  def restore_memory(self, step: int, memory_like, renamed=str):
    """Returns the memory, verified; None if it is absent or its streams differ.

    Args:
      memory_like: a tree of the same arrays, or of their shapes.
      renamed: maps the path of an array of the checkpoint to today's path.
    """
    if "memory" not in self.read_meta(step)["leaves"]:
      return None
    found, _ = self._guarded(step, lambda: self._read(step, ("memory",)))
    found = {renamed(path): array for path, array in found.items()}
    if leaf_table.table(found) != leaf_table.table(memory_like):
      return None
    return leaf_table.filled(memory_like, found)

  def set_aside_after(self, step: int) -> list[int]:
    """Moves later checkpoints to WORKDIR/set_aside without overwriting any.

    Otherwise a run that goes on from `step` could not save those steps again.
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
    """Calls `read`; turns damage into a sentence that says what to do."""
    try:
      return read()
    except DamageError as damage:
      intact = [s for s in self.steps() if s < step and self._is_intact(s)]
      way_out = (
        f"older ones that are intact: {_listed(intact)}; choose one with "
        f"--step={intact[-1]}"
        if intact
        else "no older one is intact; give another --workdir"
      )
      raise CheckpointError(
        f"the checkpoint of step {step} in {self._workdir} is damaged "
        f"({damage}); {way_out}"
      ) from damage

  def _is_intact(self, step):
    try:
      self._verify(step)
    except DamageError:
      return False
    return True

  def _verify(self, step):
    """Checks all items, one at a time, as they may fill the memory."""
    for name in self._meta(step)["leaves"]:
      self._read(step, [name])

  def _meta(self, step):
    return checkpoint_meta.read(self._folder / str(step), step)

  def _read(self, step, names):
    """Returns (*trees, meta); each tree fits the table and its digest."""
    meta = self._meta(step)
    trees = []
    for name in names:
      try:
        tree = self._restored(step, name)
      except jax.errors.JaxRuntimeError:  # of a device: no damage
        raise
      except Exception as error:  # of any of the libraries below orbax
        self._late_reads.expected = True
        raise DamageError(f"{name}: {first_line(error)}") from error
      tree = jax.tree.map(np.asarray, tree)
      if leaf_table.table(tree) != meta["leaves"][name]:
        raise DamageError(
          f"{name}: its leaves differ from those that were saved"
        )
      if leaf_table.digest(tree) != meta["sha256"][name]:
        raise DamageError(
          f"{name}: its sha256 differs from the one that was saved"
        )
      trees.append(tree)
    return (*trees, meta)

  def _restored(self, step, name):
    """Returns an item as orbax reads it."""
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
    with (
      self._plain_workdir() as workdir,
      ocp.Checkpointer(
        handler, multiprocessing_options=_alone()
      ) as checkpointer,
    ):
      return checkpointer.restore(workdir / "checkpoints" / str(step) / name)

  @contextlib.contextmanager
  def _plain_workdir(self):
    """Yields a path of the workdir that the libraries take as it is written.

    Raises:
      CheckpointError: there is no such path, as no link can be made.
    """
    with contextlib.ExitStack() as stack:
      try:
        workdir = stack.enter_context(plain_path(self._workdir))
      except OSError as error:
        raise CheckpointError(
          f"checkpoints cannot be kept in {self._workdir}, as its path has "
          "characters that need a link, which cannot be made "
          f"({first_line(error)}); give a --workdir of letters, digits, dots "
          "and dashes"
        ) from error
      yield workdir


def _alone():
  """Returns options for orbax: this process waits for no other one."""
  me = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"{me}"
  )


def _best_of(figures):
  """Returns the step with the least figure, the newest of equals, or None."""
  evaluated = [step for step in figures if figures[step] is not None]
  return min(evaluated, key=lambda step: (figures[step], -step), default=None)


def _system_error(text):
  """Returns the system's message for the number in tensorstore's, or None.

  Arrays are written at the same time. If one fails, another may find that the
  file of both is gone, which has no number, and be the one that is told of.
  """
  if found := re.search(r"os_error_code='(\d+)'", text):
    return os.strerror(int(found[1]))
  lost = text.startswith(("NOT_FOUND: ", "DATA_LOSS: "))
  return "a file that was just written is gone" if lost else None


def _listed(steps):
  return ", ".join(map(str, steps))


def _like(template, leaves, step):
  """Returns a tree of the template's structure with the leaves of these paths.

  Raises:
    CheckpointError: naming the first leaf that differs.
  """
  try:
    return leaf_table.filled(template, leaves)
  except leaf_table.LeafError as error:
    raise CheckpointError(
      f"the checkpoint of step {step} has {error}; give the settings it was "
      "trained with, or another --workdir"
    ) from error
