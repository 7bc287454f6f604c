"""Checkpoints that are intact or refused.

WORKDIR/checkpoints/STEP/ holds these items:

  params      the model's own tree
  opt_state   a flat dictionary from path to array, which can be read without
              any class of optax
  memory      such a dictionary of the streams' memory, if the model has one
  meta        JSON: the step, a table of all leaves and a sha256 of each item,
              as flipped bits and swapped arrays restore without an error

Arrays are saved from the host, by a thread of its own, while training goes on.
Except for the memory, which belongs to the streams of the devices, a checkpoint
does not depend on the number of devices.
"""

import contextlib
import pathlib
import time
from collections.abc import Mapping
from concurrent import futures
from typing import NamedTuple

import jax
import numpy as np

from adaptive_attention.errors import Error
from adaptive_attention.training import (
  checkpoint_items,
  checkpoint_meta,
  console,
  disks,
  leaf_table,
  leftovers,
  library_noise,
)
from adaptive_attention.training.checkpoint_meta import (
  DamageError,
  UnreadableError,
)

_PATIENCE_SECONDS = 5  # before a line says what is waited for


class CheckpointError(Error):
  """A checkpoint is missing, is damaged or belongs to another model."""


class Save(NamedTuple):
  """A checkpoint that is whole on the disk, and what it took.

  Attributes:
    step: its number.
    bytes: of its arrays.
    seconds: from the copy on the host to the end of the check.
    stall_seconds: how long the caller waited for it.
  """

  step: int
  bytes: int
  seconds: float
  stall_seconds: float


class Checkpoints:
  """The checkpoints of one run; a context manager.

  All processes may read; only the primary one may save. One save is under way
  at a time; the end of the context waits for it.

  Args:
    workdir: the run's folder.
    keep: how many of the newest to keep, besides the best one.
  """

  def __init__(self, workdir, *, keep: int = 2):
    self._workdir = pathlib.Path(workdir).absolute()
    self._folder = self._workdir / "checkpoints"
    self._keep = keep
    self._context = contextlib.ExitStack()
    self._under_way = None

  def __enter__(self) -> "Checkpoints":
    self._check_path()  # an error comes now, not at the first save
    self._place = disks.Place(self._workdir)
    self._context.enter_context(library_noise.quiet())
    self._writer = self._context.enter_context(futures.ThreadPoolExecutor(1))
    return self

  def __exit__(self, *_):
    with self._context:
      self.finish()

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
    """Copies a checkpoint to the host; a thread writes it and reads it back.

    Only then older ones are removed. `finish` tells of the end.

    Args:
      step: its number, which must be new.
      params, opt_state: trees of arrays, each complete on this host.
      meta: what else to keep; JSON.
      bits: per token of the validation split, if it was evaluated.
      memory: the memory of the streams of all devices, a tree of arrays.

    Raises:
      CheckpointError: the save before it failed, or a checkpoint of this step
        exists.
    """
    self.finish()
    began = time.perf_counter()
    with self._writing(step):
      self._place.check()
      if step in self.steps():
        raise CheckpointError(
          f"the checkpoint of step {step} was not written, as {self._folder} "
          f"has one; remove {self._folder / str(step)} or give another "
          "--workdir"
        )
    # On a CPU what comes to the host is the array itself, which the next step
    # overwrites.
    params, opt_state, memory = jax.tree.map(
      np.array, jax.device_get((params, opt_state, memory))
    )
    items = {"params": params, "opt_state": leaf_table.flat(opt_state)}
    if jax.tree.leaves(memory):
      items["memory"] = leaf_table.flat(memory)
    stall = time.perf_counter() - began
    meta = {**meta, "step": step, "bits": bits}
    self._under_way = (
      Save(step, sum(x.nbytes for x in jax.tree.leaves(items)), 0.0, stall),
      self._writer.submit(self._complete, step, items, meta),
    )

  def finish(self, *, wait: bool = True) -> Save | None:
    """Returns what the save under way took; None if none is, or it goes on.

    Args:
      wait: whether to wait for its end.

    Raises:
      CheckpointError: it failed, or what was read back differs from what was to
        be saved.
    """
    if self._under_way is None or not (wait or self._under_way[1].done()):
      return None
    begun, writing = self._under_way
    began = time.perf_counter()
    if not futures.wait([writing], _PATIENCE_SECONDS).done:
      console.say(
        f"waiting    for the checkpoint of step {begun.step}, {begun.bytes:,} "
        f"bytes, which is being written to {self._folder}"
      )
    self._under_way = None
    seconds = writing.result()
    stall = begun.stall_seconds + time.perf_counter() - began
    return begun._replace(seconds=seconds, stall_seconds=stall)

  def _complete(self, step, items, meta) -> float:
    """Writes and checks a checkpoint, removes older ones; returns seconds."""
    began = time.perf_counter()
    tables = {name: leaf_table.table(tree) for name, tree in items.items()}
    digests = {name: leaf_table.digest(tree) for name, tree in items.items()}
    meta = checkpoint_meta.sealed({**meta, "leaves": tables, "sha256": digests})
    with self._writing(step):
      leftovers.remove(self._folder)
      checkpoint_items.write(self._workdir, step, items, meta)
    self._guarded(step, lambda: self._verify(step))
    with self._writing(step):
      self._remove_older()
    return time.perf_counter() - began

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
    self.finish()
    with self._writing(step):
      self._place.check()
      meta = {**self.read_meta(step), "bits": bits}
      checkpoint_meta.write(self._folder / str(step), meta)

  @contextlib.contextmanager
  def _writing(self, step):
    """Turns a system's error, also inside a library, into one sentence."""
    try:
      yield
    except (OSError, ValueError) as error:
      reason = disks.reason_of(error)
      if reason is None:
        raise
      intact = [s for s in self.steps() if s != step and self._is_intact(s)]
      kept = f"{_listed(intact)} is kept" if intact else "there is no older one"
      raise CheckpointError(
        f"the checkpoint of step {step} cannot be written to {self._folder} "
        f"({reason}); make room there, or mend the disk, and give the same "
        f"command again ({kept})"
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

  def restore_memory(self, step: int, memory_like, today=dict):
    """Returns the memory, verified; None if it is absent or its streams differ.

    Args:
      memory_like: a tree of the same arrays, or of their shapes.
      today: turns the arrays of a checkpoint, by their paths, into today's.
    """
    if "memory" not in self.read_meta(step)["leaves"]:
      return None
    found, _ = self._guarded(step, lambda: self._read(step, ("memory",)))
    found = today(found)
    if leaf_table.table(found) != leaf_table.table(memory_like):
      return None
    return leaf_table.filled(memory_like, found)

  def set_aside_after(self, step: int) -> list[int]:
    """Moves later checkpoints to WORKDIR/set_aside without overwriting any.

    Otherwise a run that goes on from `step` could not save those steps again.
    """
    later = [other for other in self.steps() if other > step]
    for other in later:
      leftovers.move_into(
        self._workdir / "set_aside", self._folder / str(other)
      )
    return later

  def _guarded(self, step, read):
    """Calls `read`; turns damage into a sentence that says what to do."""
    try:
      return read()
    except DamageError as damage:
      of_disk = isinstance(damage, UnreadableError)
      found = "cannot be read" if of_disk else "is damaged"
      mend = "mend the disk, or " if of_disk else ""
      intact = [s for s in self.steps() if s < step and self._is_intact(s)]
      way_out = (
        f"older ones that are intact: {_listed(intact)}; {mend}choose one with "
        f"--step={intact[-1]}"
        if intact
        else f"no older one is intact; {mend}give another --workdir"
      )
      raise CheckpointError(
        f"the checkpoint of step {step} in {self._workdir} {found} ({damage}); "
        f"{way_out}"
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
    read = (
      checkpoint_items.read(self._workdir, step, name, meta) for name in names
    )
    return (*read, meta)

  def _check_path(self):
    try:
      with checkpoint_items.plain(self._workdir):
        pass
    except checkpoint_items.PathError as error:
      raise CheckpointError(
        f"checkpoints cannot be kept in {self._workdir}, as its path has "
        f"characters that need a link, which cannot be made ({error}); give a "
        "--workdir of letters, digits, dots and dashes"
      ) from error


def _best_of(figures):
  """Returns the step with the least figure, the newest of equals, or None."""
  evaluated = [step for step in figures if figures[step] is not None]
  return min(evaluated, key=lambda step: (figures[step], -step), default=None)


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
