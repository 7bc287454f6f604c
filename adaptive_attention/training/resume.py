"""Where a run goes on from, and the lock that makes it the one writer."""

import contextlib
import os
import pathlib

from adaptive_attention.errors import Error
from adaptive_attention.training import console
from adaptive_attention.training.checkpoint import CheckpointError


class DataError(Error):
  """A checkpoint that was trained on other data."""


@contextlib.contextmanager
def lock(workdir):
  """Makes this process the one writer of `workdir` while the context lasts.

  The lock dies with the process, however it ends.

  Raises:
    CheckpointError: another process holds it, or this one does already.
  """
  path = pathlib.Path(workdir).resolve() / "lock"
  if path in _LOCKED:  # to open it again, and to close that, would free it
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


_LOCKED = set()  # by this process


def _hold(descriptor):
  """Locks a file against other processes; an OSError if one of them has it."""
  if hasattr(os, "lockf"):
    os.lockf(descriptor, os.F_TLOCK, 0)
  else:  # on Windows
    import msvcrt

    # What is locked cannot be read there: a byte far behind the process' id.
    os.lseek(descriptor, 1 << 30, os.SEEK_SET)
    msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)


def _is_written(workdir, process):
  return CheckpointError(
    f"workdir {workdir} is being written by process {process}; wait for its "
    "end or give another --workdir"
  )


def check_same_data(corpus, meta, step):
  """That a checkpoint was trained on these bytes.

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
  """A line where `corpus` is not what the checkpoint was trained on."""
  trained = meta["data"]
  if corpus.sha256 != trained["sha256"]:
    console.say(
      f"other data: {corpus.name} (sha256 {corpus.sha256[:12]}...); step "
      f"{meta['step']} was trained on {trained['name']} (sha256 "
      f"{trained['sha256'][:12]}...)"
    )
