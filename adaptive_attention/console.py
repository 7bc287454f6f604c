"""The console: texts of any characters, and streams that nobody reads."""

import contextlib
import os

_handlers = []  # the innermost one is the last


def write(text: str, stream):
  """Writes at once; what the stream cannot encode is escaped, as \\xNN.

  Raises:
    OSError: the stream takes no more, as a closed pipe or a file on a full
      disk. From then on it leads nowhere, so that Python has nothing left to
      fail with at its end.
  """
  if stream is None:  # closed before the program began
    return
  encoding = stream.encoding or "utf-8"
  try:
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()
  except OSError as error:
    error.filename = getattr(stream, "name", "the console")
    _lead_nowhere(stream)
    if not _handlers:
      raise
    _handlers[-1](error)


@contextlib.contextmanager
def failures(handle):
  """Has `handle(error)` called where `write` would raise, while it lasts."""
  _handlers.append(handle)
  try:
    yield
  finally:
    _handlers.pop()


def _lead_nowhere(stream):
  with contextlib.suppress(OSError, ValueError):  # of streams without a file
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
