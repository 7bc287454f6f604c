"""Paths without characters that the libraries below orbax interpret."""

import contextlib
import pathlib
import re
import tempfile


@contextlib.contextmanager
def plain_path(folder: pathlib.Path):
  """Yields a path to `folder` that every library takes as it is written.

  The libraries below orbax use the path as a pattern to search for files, so
  that [1], * and ? match other names. They read a backslash as a separator and
  gs: as a service, and they cannot name bytes that are not UTF-8. A folder with
  such a path is reached through a link in the folder for temporary files. The
  link is made for each use, as that folder may be cleaned up during a run.

  Args:
    folder: an absolute path; nothing needs to exist there.

  Raises:
    OSError: the link cannot be made.
  """
  if _is_plain(folder):
    yield folder
    return
  with tempfile.TemporaryDirectory() as made:
    link = pathlib.Path(made, "workdir")
    link.symlink_to(folder, target_is_directory=True)
    if not _is_plain(link):
      raise OSError(f"{tempfile.gettempdir()} has such characters too")
    yield link


def _is_plain(path: pathlib.Path) -> bool:
  name = path.relative_to(path.anchor).as_posix()
  return bool(re.fullmatch(r"[\w ./=,+@#%~-]*", name))
