"""One process writes into a workdir at a time."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import types

import pytest

from adaptive_attention.training import resume
from adaptive_attention.training.checkpoint import CheckpointError


def test_one_writer(tmp_path):
  code = textwrap.dedent(
    """
    import sys, time
    from adaptive_attention.training import resume
    with resume.lock(sys.argv[1]):
      print("held", flush=True)
      time.sleep(60)
    """
  )
  holder = subprocess.Popen(
    [sys.executable, "-c", code, str(tmp_path)],
    stdout=subprocess.PIPE,
    cwd=pathlib.Path(__file__).parents[2],
  )
  assert holder.stdout.readline() == b"held\n"
  with (
    pytest.raises(CheckpointError, match=f"by process {holder.pid}"),
    resume.lock(tmp_path),
  ):
    pass
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  with resume.lock(tmp_path):
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_one_writer_in_this_process_too(tmp_path):
  with resume.lock(tmp_path):
    for _ in range(2):
      with (
        pytest.raises(CheckpointError, match=f"by process {os.getpid()}"),
        resume.lock(tmp_path / "." / "../" / tmp_path.name),
      ):
        pass
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
  with resume.lock(tmp_path):
    pass


def test_the_lock_of_windows(tmp_path, monkeypatch):
  """A double of msvcrt locks a byte at the position of the file."""
  held = []

  def locking(descriptor, mode, count):
    place = os.lseek(descriptor, 0, os.SEEK_CUR), count
    if mode != msvcrt.LK_NBLCK or place in held:
      raise PermissionError(13, "Permission denied")
    held.append(place)

  msvcrt = types.ModuleType("msvcrt")
  msvcrt.LK_NBLCK, msvcrt.locking = 2, locking
  monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)
  monkeypatch.delattr(os, "lockf")
  with resume.lock(tmp_path):
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
  # As if another process had it: what it wrote can be read.
  assert held[0][0] > 1 << 20
  (tmp_path / "lock").write_text("123\n")
  with (
    pytest.raises(CheckpointError, match="by process 123;"),
    resume.lock(tmp_path),
  ):
    pass
