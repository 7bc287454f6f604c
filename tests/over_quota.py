"""Runs main.py as for a user whose disk quota is used up in a run.

python -m tests.over_quota OWNER NAME NUMBER FLAG...: before the call of that
number of Checkpoints.save or the like, Linux is asked to answer write and
pwrite of 64 bytes or more to a file with EDQUOT in all threads, as a filter of
system calls (seccomp) does. No disk need have quotas. Arrays are written by
writev, which is let through, so that what fails is written by Python.
"""

import ctypes
import errno
import importlib
import runpy
import struct
import sys

import pytest

from tests.modes.test_ends import before_call

_SECCOMP, _SET_FILTER, _ALL_THREADS = 317, 1, 1  # of x86-64
_NO_NEW_PRIVILEGES = 38
_LOAD, _EQUAL, _MORE, _AT_LEAST, _ANSWER = 0x20, 0x15, 0x25, 0x35, 0x06
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000
_NUMBER, _FILE, _COUNT = 0, 16, 32  # where the kernel puts what is called
_WRITE, _PWRITE = 1, 18


def use_up():
  """Lets no thread of this process write to a file any more."""
  steps = [
    (_LOAD, 0, 0, _NUMBER),
    (_EQUAL, 1, 0, _WRITE),
    (_EQUAL, 0, 5, _PWRITE),
    (_LOAD, 0, 0, _FILE),
    (_MORE, 0, 3, 2),  # not to stdout or stderr
    (_LOAD, 0, 0, _COUNT),
    (_AT_LEAST, 0, 1, 64),  # not what wakes up a thread
    (_ANSWER, 0, 0, _FAIL | errno.EDQUOT),
    (_ANSWER, 0, 0, _ALLOW),
  ]
  code = b"".join(struct.pack("HBBI", *step) for step in steps)
  kept = ctypes.create_string_buffer(code, len(code))
  program = struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(kept))
  libc = ctypes.CDLL(None, use_errno=True)
  assert libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0
  refused = libc.syscall(_SECCOMP, _SET_FILTER, _ALL_THREADS, program)
  assert refused == 0, ctypes.get_errno()


if __name__ == "__main__":
  owner, name, number, *flags = sys.argv[1:]
  module, _, kind = owner.rpartition(".")
  owner = getattr(importlib.import_module(module), kind)
  before_call(pytest.MonkeyPatch(), owner, name, int(number), use_up)
  sys.argv = ["main.py", *flags]
  runpy.run_path("main.py", run_name="__main__")
