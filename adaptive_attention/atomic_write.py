"""Files that are replaced as a whole."""

import contextlib
import os
import pathlib


def atomic_write(path, content: bytes):
  """Replaces a file as a whole: a reader finds the old or the new content.

  Raises:
    OSError: the file cannot be written; the old content stays.
  """
  path = pathlib.Path(path)
  part = path.with_name(path.name + ".part")
  try:
    with part.open("wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())  # or a host that fails may keep an empty file
    part.replace(path)
  except OSError:
    with contextlib.suppress(OSError):
      part.unlink(missing_ok=True)
    raise
