"""Silence for what orbax logs, and for what its threads print too late."""

import contextlib
import logging
import sys


@contextlib.contextmanager
def quiet():
  """Silences what orbax logs, and what is printed of its late failures.

  One save logs some sixty lines. Errors are dropped too: they also arrive as
  exceptions, which are reported once. Contexts may be nested. If a read or a
  write has failed in a context, the silence outlives it, as threads of that
  read or write may end at any time.
  """
  before = sys.unraisablehook
  if isinstance(before, LateFailures):
    yield
    return
  sys.unraisablehook = hook = LateFailures(before)
  for name in _LOGGERS:
    logging.getLogger(name).addFilter(_SILENCE)
  try:
    yield
  finally:
    if not hook.expected:
      for name in _LOGGERS:
        logging.getLogger(name).removeFilter(_SILENCE)
      if sys.unraisablehook is hook:
        sys.unraisablehook = before


def expect_late_failures():
  """Keeps the silence after its context, as a read or a write has failed."""
  if isinstance(sys.unraisablehook, LateFailures):
    sys.unraisablehook.expected = True


class _WithoutOrbax(logging.Filter):
  """Drops what orbax logs, and what asyncio logs of the tasks that it left."""

  def filter(self, record):
    of = record.getMessage() if record.name == "asyncio" else record.pathname
    return "orbax" not in of


_LOGGERS = "absl", "asyncio"
_SILENCE = _WithoutOrbax()


class LateFailures:
  """A `sys.unraisablehook` that ignores tasks of arrays that end too late.

  When one array of a checkpoint fails, orbax closes its event loop. The tasks
  of the other arrays end afterwards, and each would print a traceback.

  Attributes:
    otherwise: the hook for everything else.
    expected: whether a read or a write has failed.
  """

  def __init__(self, otherwise):
    self.otherwise = otherwise
    self.expected = False

  def __call__(self, unraisable):
    if str(unraisable.exc_value) != "Event loop is closed":
      self.otherwise(unraisable)
