"""The sha256 of large files and the bounds of their numbers, found once.

They are kept in a file of `data.cache_dir`, and are believed as long as the
size and the time of the last change of the file that they are of stay the same.
"""

import hashlib
import json
import os
import pathlib
from typing import NamedTuple

import numpy as np

_KEPT = "digests.json"
_READ_AT_ONCE = 1 << 24  # bytes; a multiple of any number's
_SAID_FROM_BYTES = 1 << 30  # which take seconds


class Digest(NamedTuple):
  """What is known of a file.

  Attributes:
    sha256: the hex digest of its numbers' bytes.
    bounds: dtype -> the least and the largest number, read as this dtype.
  """

  sha256: str
  bounds: dict[str, list[int]]


class Digests:
  """Finds digests; as a context it keeps those that are new.

  Args:
    folder: where they are kept, made if absent.
    log: a function that takes lines: that a large file is read, and why
      digests could not be kept; None for no lines.
  """

  def __init__(self, folder, log=None):
    self._path = pathlib.Path(folder) / _KEPT
    self._log = log or (lambda line: None)

  def __enter__(self):
    try:
      self._kept = json.loads(self._path.read_text(encoding="utf-8"))
      self._changed = not isinstance(self._kept, dict)
    except (OSError, ValueError):
      self._changed = True
    if self._changed:
      self._kept, self._changed = {}, False
    return self

  def __exit__(self, kind, *_):
    if self._changed and kind is None:
      self._keep()

  def of(self, path, content: np.ndarray, *dtypes: np.dtype) -> Digest:
    """Returns the digest of a file, which is read if it is not known yet.

    Args:
      path: the file.
      content: its numbers' bytes, uint8, memory-mapped.
      dtypes: what to read them as, for the bounds. A number that the content
        ends within is left out.
    """
    path = pathlib.Path(path).resolve()
    stat = path.stat()
    is_of = [stat.st_size, stat.st_mtime_ns]
    kept = self._kept.get(str(path), {})
    names = {dtype.str for dtype in dtypes}
    try:
      if kept["is_of"] == is_of and names <= kept["bounds"].keys():
        return Digest(kept["sha256"], kept["bounds"])
    except (TypeError, KeyError, AttributeError):
      pass  # it was not kept, or not by this version
    if len(content) >= _SAID_FROM_BYTES:
      self._log(f"{path} is read once, for its sha256")
    found = _read(content, dtypes)
    self._kept[str(path)] = {"is_of": is_of, **found._asdict()}
    self._changed = True
    return found

  def _keep(self):
    """Replaces the file at once, so that no other process reads half of it."""
    part = self._path.with_name(f"{_KEPT}.{os.getpid()}.part")
    try:
      part.parent.mkdir(parents=True, exist_ok=True)
      try:
        part.write_text(json.dumps(self._kept, indent=1), encoding="utf-8")
        part.replace(self._path)
      finally:
        part.unlink(missing_ok=True)
    except OSError as error:
      self._log(
        f"{self._path} cannot be written ({error.strerror or error}), so that "
        "the data are read for their sha256 each time"
      )


def _read(content, dtypes) -> Digest:
  sha256 = hashlib.sha256()
  bounds = {dtype.str: [] for dtype in dtypes}
  for start in range(0, len(content), _READ_AT_ONCE):
    piece = np.ascontiguousarray(content[start : start + _READ_AT_ONCE])
    sha256.update(piece)
    for dtype in dtypes:
      whole = len(piece) // dtype.itemsize * dtype.itemsize
      if whole:
        numbers = piece[:whole].view(dtype)
        bounds[dtype.str] += [int(numbers.min()), int(numbers.max())]
  return Digest(
    sha256.hexdigest(),
    {name: [min(n), max(n)] for name, n in bounds.items() if n},
  )
