"""A run that is stopped and killed at random ends as one that was not.

On two cores it takes twenty minutes.
"""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT, TINY
from tests.modes.test_train import final, metrics

# Dropout, accumulation, a memory, two devices, and much that is written.
CHANGES = {
  "steps": 36_000,
  "accumulation_steps": 2,
  "log_every_steps": 100,
  "checkpoint_every_steps": 500,
  "eval_every_steps": 2_000,
  "sample_every_steps": 10_000,
  "tensorboard": True,
  "model.n_layer": 2,
  "model.memory_tokens": 40,
  "model.max_span": 64,
  "model.position": "rotary",
  "model.implementation": "auto",
}
SETTLED_SECONDS = 120  # after which a process takes no more memory
STOPS = signal.SIGTERM, signal.SIGINT, signal.SIGKILL
SAID = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}


@pytest.fixture
def begin(text, tmp_path):
  """begin(workdir): starts the run, or goes on; it prints into a file."""
  settings = TINY | CHANGES | {"data.path": text}
  flags = [f"--config.{name}={value}" for name, value in settings.items()]

  def begun(workdir):
    command = ["main.py", "--config=configs/base.py", *flags]
    with (tmp_path / f"{workdir.name}.txt").open("ab") as said:
      return subprocess.Popen(
        [sys.executable, *command, f"--workdir={workdir}"],
        cwd=ROOT,
        stdout=said,
        stderr=said,
      )

  return begun


def resident_bytes(process) -> int:
  pages = pathlib.Path(f"/proc/{process.pid}/statm").read_text().split()[1]
  return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.long_run
def test_a_long_run(begin, tmp_path):
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  process, began, used = begin(whole), time.monotonic(), []
  while process.poll() is None:
    used.append((time.monotonic() - began, resident_bytes(process)))
    time.sleep(1)
  assert process.returncode == 0, (tmp_path / "whole.txt").read_text()[-2000:]
  seconds = used[-1][0]

  drawn, stopped = random.Random(0), []
  while True:
    process = begin(cut)
    try:
      code = process.wait(drawn.uniform(0.02, 0.15) * seconds)
      break
    except subprocess.TimeoutExpired:
      stopped.append(drawn.choice(STOPS))
      process.send_signal(stopped[-1])
      assert process.wait(120) == SAID[stopped[-1]]
  assert code == 0, (tmp_path / "cut.txt").read_text()[-2000:]
  assert set(stopped) == set(STOPS)
  assert final(cut) == final(whole)
  assert metrics(cut) == metrics(whole)

  settled = [size for at, size in used if at > SETTLED_SECONDS]
  first, last = settled[: len(settled) // 4], settled[-len(settled) // 4 :]
  print(f"{seconds:.0f} s, {len(stopped)} stops, {max(settled):,} bytes")
  assert max(last) < 1.02 * max(first), (max(first), max(last))
