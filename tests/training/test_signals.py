"""Signals end the program at once, or after a save; two of them always."""

import os
import signal
import subprocess
import sys
import time

import pytest

from adaptive_attention.training.signals import Interrupted, Signals

# This holds the main thread as a compiler does: no handler of Python runs.
HELD = """
import hashlib, sys
from adaptive_attention.training.signals import Signals
with Signals(saving={saving}) as ends:
  print("ready", flush=True)
  hashlib.pbkdf2_hmac("sha256", b"a", b"b", {rounds})
  print(ends.reason, ends.exit_code)
"""


@pytest.fixture
def held():
  """held(saving, rounds) -> a process whose main thread is in C code."""
  processes = []

  def run(saving, rounds=10**9):
    code = HELD.format(saving=saving, rounds=rounds)
    process = subprocess.Popen(
      [sys.executable, "-c", code],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    processes.append(process)
    assert process.stdout.readline() == "ready\n"
    return process

  yield run
  for process in processes:
    process.kill()
    process.communicate()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_at_once_with_one_sentence(held, name):
  number = getattr(signal, name)
  process = held(saving=False)
  process.send_signal(number)
  _, err = process.communicate(timeout=20)
  assert process.returncode == 128 + number
  assert err == f"-c: stopped by {name}\n"


def test_while_saving_it_is_told_what_is_awaited_and_a_second_one_ends(held):
  process = held(saving=True)
  process.send_signal(signal.SIGINT)
  assert "a second signal ends the program" in process.stderr.readline()
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=20)
  assert process.returncode == 130
  assert err.startswith("-c: ended by a second signal, SIGINT; ")
  assert err.count("\n") == 1


def test_one_that_is_sent_twice_at_once_is_one(held):
  """`timeout` and closing terminals send a signal twice."""
  process = held(saving=True, rounds=3_000_000)
  process.send_signal(signal.SIGTERM)
  process.send_signal(signal.SIGHUP)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 0
  assert out in ("SIGTERM 143\n", "SIGHUP 129\n")


def test_what_nohup_ignores_stays_ignored():
  previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with Signals(saving=True) as ends:
      os.kill(os.getpid(), signal.SIGHUP)
      assert ends.reason is None
  finally:
    signal.signal(signal.SIGHUP, previous)


def test_handlers_are_as_they_were():
  numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
  before = [signal.getsignal(number) for number in numbers]
  with Signals(saving=False), Signals(saving=True) as ends:
    os.kill(os.getpid(), signal.SIGTERM)
    assert (ends.reason, ends.exit_code) == ("SIGTERM", 143)
  assert [signal.getsignal(number) for number in numbers] == before
  descriptor = signal.set_wakeup_fd(-1)
  signal.set_wakeup_fd(descriptor)
  assert descriptor == -1


def test_the_first_to_ask_is_kept():
  with Signals(saving=True) as ends:
    ends.stop("a closed pipe", 141)
    os.kill(os.getpid(), signal.SIGTERM)
  assert (ends.reason, ends.exit_code) == ("a closed pipe", 141)


def test_what_can_be_done_again_is_interrupted():
  start = time.monotonic()
  with Signals(saving=True) as ends:
    with ends.interrupting():
      pass
    with pytest.raises(Interrupted), ends.interrupting():
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(20)
    # A signal that came before is not forgotten.
    with pytest.raises(Interrupted), ends.interrupting():
      raise AssertionError
  assert time.monotonic() - start < 10
