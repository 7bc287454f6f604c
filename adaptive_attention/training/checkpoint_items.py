"""The items of one checkpoint as orbax keeps them; nothing else names orbax."""

import contextlib
import pathlib
import threading
import time
from collections.abc import Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp

from adaptive_attention.errors import first_line
from adaptive_attention.training import disks, leaf_table, library_noise
from adaptive_attention.training.checkpoint_meta import (
  DamageError,
  UnreadableError,
)
from adaptive_attention.training.plain_path import plain_path

_PATIENCE_SECONDS = 2  # for the other threads of what has failed


class PathError(Exception):
  """A workdir's path needs a link, which cannot be made."""


def write(workdir: pathlib.Path, step: int, items: Mapping, meta: Mapping):
  """Has orbax write the folder of a step, completely or not at all.

  Args:
    items: trees of numpy arrays, by their names.
    meta: JSON.
  """
  options = ocp.CompositeOptions(multiprocessing_options=_alone())
  handler = ocp.CompositeCheckpointHandler(composite_options=options)
  with (
    _ending_as_a_whole(),
    plain(workdir) as path,
    ocp.Checkpointer(handler, multiprocessing_options=_alone()) as checkpointer,
  ):
    trees = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    checkpointer.save(
      path / "checkpoints" / str(step),
      args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **trees),
    )


@contextlib.contextmanager
def _ending_as_a_whole():
  """Waits, where a read or a write fails, until its other threads have ended.

  A thread that outlives it could make a folder again after the next write of
  this step has removed it.
  """
  before = set(threading.enumerate())
  try:
    yield
  except Exception:
    library_noise.expect_late_failures()
    end = time.monotonic() + _PATIENCE_SECONDS
    while late := set(threading.enumerate()) - before:  # each may start others
      left = end - time.monotonic()
      if left <= 0:
        break
      with contextlib.suppress(RuntimeError, AssertionError):  # not begun, C's
        threading.Thread.join(late.pop(), left)  # orbax's own raises its error
    raise


def read(workdir: pathlib.Path, step: int, name: str, meta: Mapping):
  """Returns the tree of an item, which fits the table and digest in `meta`.

  Raises:
    DamageError: it does not.
    UnreadableError: the disk does not give its bytes.
  """
  try:
    with _ending_as_a_whole():
      tree = _restored(workdir, step, name)
  except jax.errors.JaxRuntimeError:  # of a device: no damage
    raise
  except Exception as error:  # of any of the libraries below orbax
    if reason := disks.refusal(error):
      raise UnreadableError(f"{name}: {reason}") from error
    raise DamageError(f"{name}: {first_line(error)}") from error
  tree = jax.tree.map(np.asarray, tree)
  if leaf_table.table(tree) != meta["leaves"][name]:
    raise DamageError(f"{name}: its leaves differ from those that were saved")
  if leaf_table.digest(tree) != meta["sha256"][name]:
    raise DamageError(f"{name}: its sha256 differs from the one that was saved")
  return tree


def _restored(workdir, step, name):
  """Returns an item as orbax reads it."""
  handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
  with (
    plain(workdir) as path,
    ocp.Checkpointer(handler, multiprocessing_options=_alone()) as checkpointer,
  ):
    return checkpointer.restore(path / "checkpoints" / str(step) / name)


@contextlib.contextmanager
def plain(workdir: pathlib.Path):
  """Yields a path of the workdir that the libraries take as it is written.

  Raises:
    PathError: there is no such path, as no link can be made.
  """
  with contextlib.ExitStack() as stack:
    try:
      path = stack.enter_context(plain_path(workdir))
    except OSError as error:
      raise PathError(first_line(error)) from error
    yield path


def _alone():
  """Returns options for orbax: this process waits for no other one."""
  me = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"{me}"
  )
