"""The text that every Python carries: the sources of its standard library."""

import pathlib
import sysconfig

from data import Corpus, CorpusError, split

CAP_BYTES = 8_000_000
# Tests repeat themselves, installed packages differ between machines, and
# tables of characters are not what one calls Python.
_LEFT_OUT = {
  "test",
  "tests",
  "idle_test",
  "site-packages",
  "dist-packages",
  "encodings",
  "pydoc_data",
  "__pycache__",
}


def load() -> Corpus:
  """The .py files of the running Python's library, in the order of their paths.

  Tests are left out; the first 8,000,000 bytes count. The splits are 90/5/5
  per cent, so that training, validation and test are different files.

  Raises:
    CorpusError: this Python carries no sources.
  """
  folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
  paths = sorted(
    path.relative_to(folder)
    for path in folder.rglob("*.py")
    if not _LEFT_OUT & set(path.relative_to(folder).parts[:-1])
    and not path.name.startswith("test_")
  )
  content = bytearray()
  for path in paths:
    content += (folder / path).read_bytes() + b"\n"
    if len(content) >= CAP_BYTES:
      break
  if not content:
    raise CorpusError(
      f"{folder} holds no .py files, as this Python carries no sources; give "
      "any text with --config.data.path=FILE"
    )
  return split("python_source", bytes(content[:CAP_BYTES]))
