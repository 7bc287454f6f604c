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
import hashlib
import json
import logging
import math
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp

from adaptive_attention.errors import Error


class CheckpointError(Error):
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

  def __enter__(self):
    with _plain(self._workdir):  # lest the first save finds that there is none
      return self

  def __exit__(self, *_):
    pass

  def steps(self) -> list[int]:
    """The steps that have a folder, ascending."""
    if not self._folder.is_dir():
      return []
    names = (path.name for path in self._folder.iterdir() if path.is_dir())
    return sorted(int(name) for name in names if name.isdecimal())

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
    if which.isdecimal() and int(which) in steps:
      return int(which)
    raise CheckpointError(
      f"--step={which} names no checkpoint of {self._workdir}; choose latest, "
      f"best or one of {_listed(steps)}"
    )

  def _best(self, steps):
    best = _best_of(
      {step: self.read_meta(step)["bits_per_char"] for step in steps}
    )
    if best is None:
      raise CheckpointError(
        "--step=best finds no checkpoint that was evaluated; choose latest or "
        f"one of {_listed(steps)}"
      )
    return best

  def save(
    self,
    step,
    params,
    opt_state,
    meta: Mapping,
    bits_per_char=None,
    memory=None,
  ):
    """Writes a checkpoint and reads it back; only then older ones go.

    Args:
      step: its number, which must be new.
      params, opt_state: trees of arrays, each one whole on this host.
      meta: what else to keep; JSON.
      bits_per_char: of the validation split, if it was evaluated.
      memory: that of the streams of all devices, a tree of arrays.

    Raises:
      CheckpointError: there is one of this step, or what was read back is not
        what was to be saved.
    """
    params, opt_state, memory = jax.device_get((params, opt_state, memory))
    items = {"params": params, "opt_state": _flat(opt_state)}
    if jax.tree.leaves(memory):
      items["memory"] = _flat(memory)
    meta = {
      **meta,
      "step": step,
      "bits_per_char": bits_per_char,
      "leaves": {name: _leaves(tree) for name, tree in items.items()},
      "sha256": {name: _digest(tree) for name, tree in items.items()},
    }
    if step in self.steps():
      raise CheckpointError(
        f"the checkpoint of step {step} was not written, as {self._folder} has "
        f"one; remove {self._folder / str(step)} or give another --workdir"
      )
    with self._writing(step):
      self._remove_leftovers()
      self._write(step, items, _sealed(meta))
    self._guarded(step, lambda: self._verify(step))
    with self._writing(step):
      self._remove_older()

  def _write(self, step, items, meta):
    """Has orbax write the folder of a step, which appears whole or not."""
    options = ocp.CompositeOptions(multiprocessing_options=_alone())
    handler = ocp.CompositeCheckpointHandler(composite_options=options)
    with (
      _plain(self._workdir) as workdir,
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
    """Leaves the newest, the best and those of which nothing can be told."""
    steps = self.steps()
    figures = {}
    for step in steps:
      with contextlib.suppress(_DamageError):
        figures[step] = self._meta(step)["bits_per_char"]
    for step in figures.keys() - {_best_of(figures), *steps[-self._keep :]}:
      # Under this name a part of it is not taken for the whole.
      path = self._folder / str(step)
      path.rename(path.with_name(f"{step}.removed"))
    self._remove_leftovers()

  def _remove_leftovers(self):
    """What a killed process left half written or half removed."""
    for path in self._folder.glob("*.*"):
      if _LEFTOVER.fullmatch(path.name):
        shutil.rmtree(path)

  def record_evaluation(self, step: int, bits_per_char: float):
    """Adds to a checkpoint what its evaluation, which came later, has found."""
    path = self._folder / str(step) / "meta" / "metadata"
    meta = _sealed({**self.read_meta(step), "bits_per_char": bits_per_char})
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
      self._verify(step)
    except _DamageError:
      return False
    return True

  def _verify(self, step):
    """Reads all items, each by itself, as they may fill the memory."""
    for name in self._meta(step)["leaves"]:
      self._read(step, [name])

  def _meta(self, step):
    path = self._folder / str(step) / "meta" / "metadata"
    try:
      meta = json.loads(path.read_text(encoding="utf-8"))
      found, *_ = (meta[name] for name in _META)
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise _DamageError(f"meta: {_first_line(error)}") from error
    if found != step:
      raise _DamageError(f"meta: it is of step {found}")
    if meta.get(_SEAL, "") not in ("", _sealed(meta)[_SEAL]):
      raise _DamageError("meta: its sha256 is not that of what was saved")
    return meta

  def _read(self, step, names):
    """(*trees, meta), each tree verified against the table and its digest."""
    meta = self._meta(step)
    trees = []
    for name in names:
      try:
        tree = self._restored(step, name)
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

  def _restored(self, step, name):
    """An item, as orbax reads it."""
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
    with (
      _plain(self._workdir) as workdir,
      ocp.Checkpointer(
        handler, multiprocessing_options=_alone()
      ) as checkpointer,
    ):
      return checkpointer.restore(workdir / "checkpoints" / str(step) / name)


_META = ("step", "bits_per_char", "leaves", "sha256")  # what `save` adds
_SEAL = "meta_sha256"  # those of earlier versions have none
_LEFTOVER = re.compile(r"\d+\.(removed|orbax-checkpoint-tmp.*)")


def _alone():
  """Options for orbax: this process waits for no other one."""
  me = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"{me}"
  )


@contextlib.contextmanager
def _plain(folder):
  """A path of `folder` that the libraries below orbax take as it is written.

  They look for files by the whole path as a pattern, so that [1], * and ? stand
  for other names; a backslash parts folders, gs: is a service, and bytes that
  are no UTF-8 cannot be told. Then it is a link in the folder for temporary
  files, made for each use, as those may be cleaned up while a run lasts.

  Raises:
    CheckpointError: no such link can be made.
  """
  name = folder.relative_to(folder.anchor).as_posix()
  if _is_plain(name):
    yield folder
    return
  with contextlib.ExitStack() as stack:
    try:
      made = stack.enter_context(tempfile.TemporaryDirectory())
      link = pathlib.Path(made, "workdir")
      link.symlink_to(folder, target_is_directory=True)
      if not _is_plain(link.relative_to(link.anchor).as_posix()):
        raise OSError(f"{tempfile.gettempdir()} is not plain either")
    except OSError as error:
      raise CheckpointError(
        f"checkpoints cannot be kept in {folder}, as its path has characters "
        f"that need a link, which cannot be made ({_first_line(error)}); give "
        "a --workdir of letters, digits, points and dashes"
      ) from error
    yield link


def _is_plain(path: str) -> bool:
  return bool(re.fullmatch(r"[\w ./=,+@#%~-]*", path))


class _DamageError(Exception):
  """What is wrong with one checkpoint."""


def _best_of(figures):
  """The step with the least figure, the newest of several; None without any."""
  evaluated = [step for step in figures if figures[step] is not None]
  return min(evaluated, key=lambda step: (figures[step], -step), default=None)


def _system_error(text):
  """What a number that tensorstore quotes from the system says; or None."""
  found = re.search(r"os_error_code='(\d+)'", text)
  return found and os.strerror(int(found[1]))


def _sealed(meta: Mapping) -> dict:
  """Meta with the sha256 of all else that it says, as JSON."""
  said = {name: value for name, value in meta.items() if name != _SEAL}
  text = json.dumps(json.loads(json.dumps(said)), sort_keys=True)
  return {**said, _SEAL: hashlib.sha256(text.encode()).hexdigest()}


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
