"""Prints a message when a signal of C ends the process before Python acts.

Python calls its own handlers in the main thread, between two instructions of a
program. The handlers here are called at once, in whatever thread, and must end
the process.
"""

import contextlib
import ctypes
import os
import pathlib
import signal
import sys
from collections.abc import Callable

_handlers = []  # which C calls, and which must therefore live


def on(number: int, speak: Callable[[], int]):
  """Ends the process with the code that `speak` returns where C sends a signal.

  Args:
    number: that of the signal, as SIGABRT of abort().
    speak: called without arguments, in any thread.
  """
  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: os._exit(speak()))
  _handlers.append(handler)
  with contextlib.suppress(OSError, TypeError, AttributeError):  # no such libc
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = ctypes.c_int, type(handler)
    libc.signal(number, handler)


def of_lost_file(name: str):
  """Tells of a file that is read as needed and no longer gives its bytes.

  Such a file is mapped into memory, so that no read fails: the system sends
  SIGBUS. The exit code is 1.

  Args:
    name: how the user knows the file.
  """

  def speak():
    say(
      f"{name} cannot be read any more: the file got shorter, or its disk is "
      "gone; bring it back and give the same command again"
    )
    return 1

  if hasattr(signal, "SIGBUS"):
    on(signal.SIGBUS, speak)


def say(text: str):
  """Writes a line to stderr from any thread, even if the main one is held."""
  with contextlib.suppress(OSError):
    line = f"{pathlib.Path(sys.argv[0]).name}: {text}\n"
    os.write(2, line.encode(errors="backslashreplace"))
