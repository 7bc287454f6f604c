"""Files that are replaced as a whole, and files that get one line more."""

import contextlib
import io
import json
import pathlib

from adaptive_attention.atomic_write import atomic_write
from adaptive_attention.errors import Error


class WriteError(Error):
  """A file or a copy of the metrics cannot be written."""


@contextlib.contextmanager
def writing(path):
  """Wraps the writing of a file or folder; a failure becomes one sentence.

  Raises:
    WriteError: naming the path and the system's reason.
  """
  try:
    yield
  except OSError as error:
    raise WriteError(
      f"{path} cannot be written ({error.strerror or error}); make room, or "
      "name a folder that may be written to"
    ) from error


def write_bytes(path, content: bytes):
  """Replaces a file at once: a reader finds the old or the new content.

  Raises:
    WriteError: it cannot be written; the old content stays.
  """
  with writing(path):
    atomic_write(path, content)


def write_text(path, text: str):
  """Replaces a file by text in UTF-8, as `write_bytes` does."""
  write_bytes(path, text.encode())


def write_json(path, content):
  """Replaces a file by JSON, as `write_bytes` does."""
  write_text(path, json.dumps(content, indent=2) + "\n")


def read_lines(path) -> list[dict]:
  """Returns the objects of a file of JSON lines; a cut line is left out.

  Raises:
    OSError: the file cannot be read.
  """
  found = []
  for text in pathlib.Path(path).read_bytes().splitlines():
    try:
      line = json.loads(text)
    except ValueError:
      continue
    if isinstance(line, dict):
      found.append(line)
  return found


def append_line(path, content):
  """Adds a line of JSON; it replaces half a line that a killed writer left.

  Raises:
    WriteError: it cannot be written; the lines before it stay.
  """
  with writing(path):
    is_new = not path.exists()
    try:
      with path.open("a+b", buffering=0) as file:
        file.seek(0)
        last = file.read().rpartition(b"\n")[2]
        if is_whole := _is_json(last):
          last = b""
        file.truncate(file.tell() - len(last))
        _add(file, (b"\n" if is_whole else b"") + _line(content))
    except OSError:
      if is_new:
        path.unlink(missing_ok=True)
      raise


def add_line(file: io.FileIO, content):
  """Adds a whole line of JSON, or nothing, to a file open for appending.

  Raises:
    OSError: it cannot be written.
  """
  _add(file, _line(content))


def _line(content) -> bytes:
  return json.dumps(content).encode() + b"\n"


def _add(file, data: bytes):
  size = file.seek(0, io.SEEK_END)
  try:
    while data:  # a disk that is nearly full takes a part
      data = data[file.write(data) :]
  except OSError:
    with contextlib.suppress(OSError):
      file.truncate(size)
    raise


def _is_json(line: bytes) -> bool:
  try:
    json.loads(line)
  except ValueError:
    return False
  return True
