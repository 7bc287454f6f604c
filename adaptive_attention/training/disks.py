"""Tells why a disk failed, and whether a run's folder is still there."""

import errno
import os
import pathlib
import re

_GONE = "it is not the folder any more that the run began in"


def reason_of(error: BaseException) -> str | None:
  """Returns why a disk failed, in the system's words; None if no disk did.

  Args:
    error: an OSError, or an error of tensorstore, which has a text of many
      lines with the system's number at the end.
  """
  if isinstance(error, OSError):
    return error.strerror or str(error) or type(error).__name__
  if found := _number(error):
    return os.strerror(found)
  # Arrays are written at the same time. If one fails, another may find that the
  # file of both is gone, which has no number, and be the one that is told of.
  lost = str(error).startswith(("NOT_FOUND: ", "DATA_LOSS: "))
  return "a file that was just written is gone" if lost else None


def refusal(error: BaseException) -> str | None:
  """Returns why a disk gave no bytes; None if the error is not of a disk.

  An absent file gives None too. The bytes may still be whole, so that such an
  error is no damage.
  """
  number = error.errno if isinstance(error, OSError) else _number(error)
  absent = errno.ENOENT, errno.ENOTDIR, errno.EISDIR
  return None if number in (None, *absent) else os.strerror(number)


def _number(error) -> int | None:
  found = re.search(r"os_error_code='(\d+)'", str(error))
  return int(found[1]) if found else None


class Place:
  """A folder that must stay the same one, also behind the same path.

  What is mounted there may vanish. Libraries would then make the folder anew,
  on another disk.
  """

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    self._identity = self._look()

  def check(self):
    """Checks that the folder is still the same, if there was one.

    Raises:
      OSError: it is not.
    """
    if self._identity is not None and self._look() != self._identity:
      raise OSError(errno.ENOENT, _GONE, str(self._folder))

  def _look(self):
    try:
      found = self._folder.stat()
    except OSError:
      return None
    return found.st_dev, found.st_ino
