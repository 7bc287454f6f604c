"""The sources of Python's standard library: every machine has this text."""

import os
import pathlib
import sysconfig

from data import Corpus, CorpusError, split

CAP_BYTES = 8_000_000
# Tests repeat themselves. Tables of characters are hardly Python. Packages and
# the settings of a build differ between machines.
_FOLDERS_LEFT_OUT = {
  "test",
  "tests",
  "idle_test",
  "site-packages",
  "dist-packages",
  "encodings",
  "pydoc_data",
  "__pycache__",
}
_FILES_LEFT_OUT = ("test_", "_sysconfigdata", "sitecustomize", "usercustomize")


def load() -> Corpus:
  """Joins the .py files of this Python's library, in the order of their paths.

  Tests and files that belong to one machine are left out; the first 8,000,000
  bytes of the others are taken. The splits are 90/5/5 per cent. They have
  different files, except that each cut may lie within a file.

  Raises:
    CorpusError: this Python has no sources, or they cannot be read.
  """
  folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
  content = bytearray()
  try:
    for path in sorted(_paths(folder)):
      content += (folder / path).read_bytes() + b"\n"
      if len(content) >= CAP_BYTES:
        break
  except OSError as error:
    raise CorpusError(
      f"the sources of this Python cannot be read ({error}); give any text "
      "with --config.data.path=FILE"
    ) from error
  if not content:
    raise CorpusError(
      f"{folder} holds no .py files, as this Python has no sources; give "
      "any text with --config.data.path=FILE"
    )
  return split("python_source", bytes(content[:CAP_BYTES]))


def _paths(folder):
  """Yields the files to take, as paths from `folder` with forward slashes."""
  for parent, folders, names in os.walk(folder):
    # Folders left out are not entered, as site-packages may hold many files.
    folders[:] = [
      name
      for name in folders
      if name not in _FOLDERS_LEFT_OUT and not name.startswith("config-")
    ]
    for name in names:
      if name.endswith(".py") and not name.startswith(_FILES_LEFT_OUT):
        yield pathlib.Path(parent, name).relative_to(folder).as_posix()
