"""However a run ends, it keeps the steps that it has finished."""

import errno
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import types

import jax
import pytest

from adaptive_attention import accounting, generation
from adaptive_attention.training import (
  evaluator,
  logbook,
  loop,
  milestones,
)
from adaptive_attention.training import run as training
from adaptive_attention.training.checkpoint import Checkpoints
from adaptive_attention.training.signals import Stopped
from tests.conftest import ROOT
from tests.modes.test_train import final, metrics


def figures(workdir):
  with Checkpoints(workdir) as saved:
    return {s: saved.read_meta(s)["bits"] for s in saved.steps()}


class Killed(BaseException):
  """Stands for the kill of a process, which cannot act on it."""


def die():
  raise Killed


def before_call(monkeypatch, owner, name, number, act):
  """Replaces a function, so that `act()` runs before its call of a number."""
  function, calls = getattr(owner, name), []

  def changed(*args, **kwargs):
    calls.append(None)
    if len(calls) == number:
      act()
    return function(*args, **kwargs)

  monkeypatch.setattr(owner, name, changed)


@pytest.mark.parametrize(
  ("owner", "name", "number"),
  [
    (evaluator.Evaluator, "__call__", 2),  # of the last step
    *(
      pytest.param(*before, marks=pytest.mark.every_case)
      for before in (
        (evaluator.Evaluator, "__call__", 1),
        (logbook.Logbook, "write", 3),
        (Checkpoints, "record_evaluation", 1),
      )
    ),
  ],
)
def test_killed_in_validation(
  run, whole, tmp_path, monkeypatch, owner, name, number
):
  """The step is saved, and its evaluation is done when the run goes on."""
  with monkeypatch.context() as changed:
    before_call(changed, owner, name, number, die)
    with pytest.raises(Killed):
      run(tmp_path)
  step = 12 if number == 2 else 6
  assert list(figures(tmp_path).items())[-1] == (step, None)
  run(tmp_path)
  assert metrics(tmp_path) == metrics(whole)
  assert final(tmp_path) == final(whole)
  assert figures(tmp_path) == figures(whole)


@pytest.mark.parametrize(
  ("owner", "name", "number", "step"),
  [
    (evaluator.Evaluator, "__call__", signal.SIGTERM, 6),
    (Checkpoints, "save", signal.SIGINT, 3),
    *(
      pytest.param(*before, marks=pytest.mark.every_case)
      for before in (
        (generation, "generate", signal.SIGHUP, 4),
        (training, "_compile", signal.SIGINT, 1),
      )
    ),
  ],
)
def test_a_signal_whatever_is_being_done(
  run, tmp_path, monkeypatch, owner, name, number, step
):
  """Work that may take long is given up once its step is saved."""

  def signalled():
    os.kill(os.getpid(), number)
    if name in ("__call__", "generate"):
      time.sleep(60)

  before_call(monkeypatch, owner, name, 1, signalled)
  start = time.monotonic()
  with pytest.raises(Stopped, match=f"after step {step}, ") as stopped:
    run(tmp_path, sample_every_steps=4)
  assert time.monotonic() - start < 60
  assert stopped.value.exit_code == 128 + number
  assert signal.Signals(number).name in str(stopped.value)
  assert list(figures(tmp_path))[-1] == step


class ClosedAfter(io.StringIO):
  """A console whose reader leaves after a line."""

  def __init__(self, last):
    super().__init__()
    self._last = last

  def write(self, text):
    if self._last in self.getvalue():
      raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
    return super().write(text)


@pytest.mark.parametrize(
  ("last", "step"), [("workdir", 1), ("step      2", 4), ("valid     6", 8)]
)
def test_a_closed_pipe_saves_as_a_signal_does(
  run, tmp_path, monkeypatch, last, step
):
  monkeypatch.setattr(sys, "stdout", ClosedAfter(last))
  with pytest.raises(Stopped, match="a closed pipe") as stopped:
    run(tmp_path, log_every_steps=2)
  assert stopped.value.exit_code == 141
  assert final(tmp_path)[0] == step


def test_a_record_that_takes_no_more_is_told_after_a_save(
  run, tmp_path, monkeypatch
):
  def full():
    raise OSError(28, "No space left on device")

  before_call(monkeypatch, json, "dumps", 2 + 2 * 2, full)
  with pytest.raises(Stopped) as stopped:
    run(tmp_path, log_every_steps=1)
  assert "metrics.jsonl cannot be written (No space left" in str(stopped.value)
  assert stopped.value.exit_code == 1
  assert final(tmp_path)[0] == 2


def test_only_training_is_timed(run, tmp_path, monkeypatch):
  """A thousand seconds of everything else change no rate, but `seconds`."""
  skipped = [0.0]
  clock = types.SimpleNamespace(
    perf_counter=lambda: time.perf_counter() + skipped[0]
  )
  for module in (loop, milestones, training):
    monkeypatch.setattr(module, "time", clock)

  def slowed(owner, name):
    function = getattr(owner, name)

    def slow(*args, **kwargs):
      skipped[0] += 1000.0
      return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, slow)

  slowed(accounting, "attention_macs_per_token")
  slowed(logbook.Logbook, "write")
  slowed(evaluator.Evaluator, "__call__")
  slowed(generation, "generate")
  slowed(Checkpoints, "save")
  slowed(training, "_compile")
  compiled = training._compile

  def slow_at_first(*args):
    step, calls = compiled(*args), []

    def call(*args):
      if not calls:  # where several processes compile
        calls.append(None)
        skipped[0] += 1000.0
      return jax.block_until_ready(step(*args))

    return call

  monkeypatch.setattr(training, "_compile", slow_at_first)
  changes = {"log_every_steps": 2, "sample_every_steps": 4}
  with monkeypatch.context() as changed:
    before_call(changed, logbook.Logbook, "write", 5, die)  # line of step 8
    with pytest.raises(Killed):
      run(tmp_path, **changes)
  run(tmp_path, **changes)
  lines = [
    json.loads(line)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
  ]
  lines = [line for line in lines if line["split"] == "train"]
  assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
  for line in lines:
    assert 4 * 24 / line["tokens_per_second"] < 100
  seconds = [line["seconds"] for line in lines]
  assert seconds[0] > 2000
  for before, after in itertools.pairwise(seconds):
    assert 1000 < after - before < 10_000


def test_no_rate_is_printed_before_a_step_was_timed(run, tmp_path, capsys):
  """The first step is not timed, as it sets up what later steps use."""
  run(tmp_path, log_every_steps=1, tensorboard=True)  # which has no None
  said = [x for x in capsys.readouterr().out.splitlines() if "  loss " in x]
  for name in ("tok/s", "eta", " ms "):
    assert name not in said[0]
    assert name in said[1]
  first, second, *_ = [
    json.loads(line)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
  ]
  assert first["tokens_per_second"] is None
  assert second["tokens_per_second"] > 0


def test_a_closed_pipe_costs_no_evaluation(whole):
  """The result is written, though nobody has read it."""
  reading, writing = os.pipe()
  os.close(reading)
  process = subprocess.run(
    [sys.executable, "main.py", "--mode=eval", f"--workdir={whole}"],
    cwd=ROOT,
    stdout=writing,
    stderr=subprocess.PIPE,
    text=True,
  )
  os.close(writing)
  assert process.returncode == 141, process.stderr
  assert process.stderr == "main.py: stopped by a closed pipe\n"
  record = json.loads((whole / "eval_valid.json").read_text())
  assert record["step"] == 12


def test_a_console_of_ascii(whole, tmp_path):
  """Characters that it cannot show are escaped; files are UTF-8."""
  prompt = tmp_path / "prompt"
  prompt.write_bytes("caf\xe9".encode())
  environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
  flags = [f"--workdir={whole}", f"--prompt_file={prompt}", "--tokens=2"]
  process = subprocess.run(
    [sys.executable, "main.py", "--mode=sample", *flags],
    cwd=ROOT,
    env=os.environ | environment,
    capture_output=True,
  )
  assert process.returncode == 0, process.stderr
  assert process.stdout.startswith(b"caf\\xe9")
  assert "caf\xe9" in (whole / "sample.txt").read_text(encoding="utf-8")


def test_results_are_printed_before_a_write_that_fails(main, whole, tmp_path):
  """A folder in the file's place refuses everyone, root too."""
  import shutil

  workdir = shutil.copytree(whole, tmp_path / "w")
  for mode, name, said in (
    ("eval", "eval_valid.json", "bits per character"),
    ("sample", "sample.txt", "keys read per token"),
    ("export", "model.safetensors", ""),
  ):
    (workdir / name).unlink(missing_ok=True)
    (workdir / name).mkdir()
    flags = ["--prompt=a", "--tokens=2"] if mode == "sample" else []
    code, out, err = main(f"--mode={mode}", f"--workdir={workdir}", *flags)
    assert code == 1
    assert said in out
    assert err.startswith(f"main.py: {workdir / name} cannot be written (")
    assert err.count("\n") == 1
    assert not list(workdir.glob("*.part"))


@pytest.mark.parametrize(
  "name", ["lock", "config.json", "metrics.jsonl", "masks.jsonl"]
)
def test_a_run_that_cannot_be_written_is_reported(
  main, tiny_flags, tmp_path, name
):
  """A folder in the file's place makes the write fail.

  A workdir that is a file is a wrong flag; see tests/test_main.py.
  """
  path = tmp_path / "w" / name
  path.mkdir(parents=True)
  code, _, err = main(*tiny_flags, f"--workdir={tmp_path / 'w'}")
  assert code == 1
  assert err.startswith(f"main.py: {path} cannot be ")
  assert err.count("\n") == 1
