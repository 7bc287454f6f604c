"""Folders of checkpoints that were left half written or half removed.

A process may be killed while it writes a checkpoint or removes one. A folder
has the bare number of its step as its name only while it is whole, so that
what is left over is known by its name, and the next save removes it.
"""

import errno
import os
import pathlib
import re
import shutil
import time

_LEFTOVER = re.compile(r"\d+\.(removed|orbax-checkpoint-tmp.*)")

# How long threads of a failed write may go on writing, in seconds.
_PATIENCE = 10


def set_aside(checkpoint: pathlib.Path):
  """Renames a checkpoint to what the next `remove` of its folder takes away."""
  checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.removed"))


def move_into(folder: pathlib.Path, checkpoint: pathlib.Path):
  """Moves a checkpoint to another folder without overwriting any there."""
  folder.mkdir(exist_ok=True)
  target, number = folder / checkpoint.name, 1
  while target.exists():
    number += 1
    target = folder / f"{checkpoint.name}-{number}"
  shutil.move(checkpoint, target)


def remove(folder: pathlib.Path):
  """Removes what is left over in a folder of checkpoints."""
  for path in folder.glob("*.*"):
    if _LEFTOVER.fullmatch(path.name):
      _remove_while_written(path)


def _remove_while_written(path):
  """Removes a folder to which threads of a write that failed may still add.

  The first array that cannot be written ends a save. The libraries do not wait
  for the threads that write the other arrays.
  """
  end = time.monotonic() + _PATIENCE
  while os.path.lexists(path):
    try:
      shutil.rmtree(path)
    except OSError as error:
      passing = error.errno in (errno.ENOTEMPTY, errno.ENOENT)
      if not passing or time.monotonic() > end:
        raise
      time.sleep(0.01)
