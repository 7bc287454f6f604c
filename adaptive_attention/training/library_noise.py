"""Silence for what orbax logs and what Python prints of its late reads."""

import contextlib
import logging
import sys


@contextlib.contextmanager
def quiet():
  """Silences what orbax logs and what Python prints of its late reads.

  One save logs some sixty lines. Errors are dropped too: they also arrive as
  exceptions, which are reported once. Contexts may be nested. The hook outlives
  its context if a read has failed in it, as late reads may end at any time.
  """
  logger, hook = logging.getLogger("absl"), sys.unraisablehook
  installs = not isinstance(hook, LateReads)
  if installs:
    sys.unraisablehook = hook = LateReads(hook)
  quiet = _WithoutOrbax()
  logger.addFilter(quiet)
  try:
    yield
  finally:
    logger.removeFilter(quiet)
    if installs and sys.unraisablehook is hook and not hook.expected:
      sys.unraisablehook = hook.otherwise


def expect_late_reads():
  """Keeps the hook that is installed, as a read has failed."""
  if isinstance(sys.unraisablehook, LateReads):
    sys.unraisablehook.expected = True


class _WithoutOrbax(logging.Filter):
  def filter(self, record):
    return "orbax" not in record.pathname


class LateReads:
  """A `sys.unraisablehook` that ignores reads of arrays that end too late.

  When the read of one array of a damaged checkpoint fails, orbax closes its
  event loop. The reads of the other arrays end afterwards, and each of them
  would print a traceback.

  Attributes:
    otherwise: the hook for everything else.
    expected: whether a read has failed.
  """

  def __init__(self, otherwise):
    self.otherwise = otherwise
    self.expected = False

  def __call__(self, unraisable):
    if str(unraisable.exc_value) != "Event loop is closed":
      self.otherwise(unraisable)
