"""The libraries are silent in a context; after it all is as before."""

import logging
import sys
import types

import pytest

from adaptive_attention.training import library_noise
from adaptive_attention.training.checkpoint import Checkpoints

ORBAX, OTHER = "/lib/orbax/checkpoint.py", "/lib/flax/module.py"
LATE = RuntimeError("Event loop is closed")


@pytest.fixture
def seen(monkeypatch):
  """Returns the exceptions that reach the hook that was there before."""
  exceptions = []
  monkeypatch.setattr(
    sys, "unraisablehook", lambda caught: exceptions.append(caught.exc_value)
  )
  return exceptions


def logged(path, name="absl", text="text") -> bool:
  logger = logging.getLogger(name)
  record = logger.makeRecord(name, logging.ERROR, path, 1, text, (), None)
  return bool(logger.filter(record))


def left_by(path) -> bool:
  """Returns whether asyncio tells of a task whose code is at the path."""
  text = f"Task exception was never retrieved: a task, defined at {path}:1"
  return logged("/lib/asyncio/tasks.py", "asyncio", text)


def raise_late(error=LATE):
  sys.unraisablehook(types.SimpleNamespace(exc_value=error))


def test_orbax_alone_is_silent_and_only_in_the_context(seen, tmp_path):
  before = sys.unraisablehook
  with Checkpoints(tmp_path):
    assert not logged(ORBAX) and not left_by(ORBAX)
    assert logged(OTHER) and left_by(OTHER)
    raise_late()
    raise_late(other := ValueError("of something else"))
    assert seen == [other]
  assert logged(ORBAX)
  assert sys.unraisablehook is before


def test_contexts_may_be_nested(seen):
  before = sys.unraisablehook
  with library_noise.quiet():
    for _ in range(2):
      with library_noise.quiet():
        assert not logged(ORBAX)
      assert not logged(ORBAX)
      raise_late()
  assert not seen
  assert logged(ORBAX)
  assert sys.unraisablehook is before


@pytest.mark.parametrize("inner", [False, True])
def test_late_failures_are_silent_after_the_context_too(seen, inner):
  with library_noise.quiet():
    if inner:
      with library_noise.quiet():
        library_noise.expect_late_failures()
    else:
      library_noise.expect_late_failures()
  raise_late()
  raise_late(other := ValueError("of something else"))
  assert seen == [other]
  assert not logged(ORBAX) and not left_by(ORBAX)
  assert logged(OTHER) and left_by(OTHER)
  hook = sys.unraisablehook
  with library_noise.quiet():
    assert sys.unraisablehook is hook, "one is enough"
