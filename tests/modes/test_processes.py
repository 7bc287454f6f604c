"""Several processes that train one model, each with a disk of its own."""

import json
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.modes.test_train import (
  ROOT,
  final,
  flags_with,
  metrics,
  start,
  wait_for_step,
)
from tests.training.test_checkpoint import flip

by_hand = pytest.mark.processes
LONG = {"steps": 10_000, "eval_every_steps": 10_000}


def free_port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def together(flags, folders, changes=(), options=(), is_killed=True):
  """Starts a process for each folder; the settings of some may be changed."""
  flags = flags_with(
    flags,
    cpu_devices=1,
    distributed=True,
    coordinator_address=f"127.0.0.1:{free_port()}",
    process_count=len(folders),
  )
  return [
    start(
      [
        *flags_with(flags, process_index=i, **dict(changes).get(i, {})),
        *options,
      ],
      folder,
      is_killed=is_killed,
    )
    for i, folder in enumerate(folders)
  ]


def ends(processes, seconds=60):
  """Returns (exit code, stdout, stderr) of each; none may last longer."""
  try:
    said = [process.communicate(timeout=seconds) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(p.returncode, *s) for p, s in zip(processes, said, strict=True)]


def check_ended(processes, code=0):
  """Checks how all have ended; returns what each wrote to stderr."""
  found = ends(processes)
  assert [end[0] for end in found] == [code] * len(found), found
  # All but the first are silent and write nothing.
  for _, out, _ in found[1:]:
    assert not [x for x in out.splitlines() if not x.startswith("[Gloo]")]
  return [err for _, _, err in found]


def check_equal(workdir, one_run):
  """Checks that the record is that of one process, but for the rounding."""
  assert len(metrics(workdir)) == len(metrics(one_run))
  for found, exact in zip(metrics(workdir), metrics(one_run)):
    assert found.pop("split") == exact.pop("split")
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6),
      found,
      exact,
    )


def test_two_do_what_one_does_and_go_on_to_the_bit(
  memory_run, memory_flags, tmp_path
):
  """The second one's folder is never there: it is sent all that it needs."""
  folders = tmp_path / "w", tmp_path / "other"
  flags = flags_with(memory_flags, eval_batch_size=4)  # on each of the two
  check_ended(together(flags, folders, is_killed=False))
  check_equal(folders[0], memory_run)
  before = final(folders[0]), metrics(folders[0])
  check_ended(together(flags, folders, options=["--step=6"]))
  assert (final(folders[0]), metrics(folders[0])) == before
  assert not folders[1].exists()


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"seed": 5}, "process 1 has config.seed=5 where process 0 has 0"),
    pytest.param(
      {"data.path": "README.md"},
      "process 1 has data sha256=",
      marks=by_hand,
    ),
  ],
)
def test_what_differs_is_named_by_all(tiny_flags, tmp_path, changes, said):
  folders = [tmp_path / "w"] * 2
  for err in check_ended(together(tiny_flags, folders, {1: changes}), 2):
    assert said in err and err.count("\n") == 1
  assert not folders[0].exists()


def killed(process):
  process.send_signal(signal.SIGKILL)


@by_hand
@pytest.mark.parametrize("number", [0, 1])
def test_one_is_killed(tiny_flags, tmp_path, number):
  """The other one ends by itself, and the same command goes on."""
  folders = tmp_path / "w", tmp_path / "other"
  flags = flags_with(tiny_flags, eval_batch_size=4, heartbeat_seconds=10)
  processes = together(flags_with(flags, **LONG), folders)
  wait_for_step(folders[0], 6, processes[0])
  killed(processes[number])
  code, _, err = ends(processes)[1 - number]
  assert code == 75
  assert "another process has ended" in err
  assert "the same command goes on from the newest checkpoint" in err
  assert "Traceback" not in err
  step, _ = final(folders[0])
  (code, out, err), _ = ends(
    together(flags_with(flags, steps=step + 1), folders)
  )
  assert code == 0, err
  assert f"start      step {step} of {step + 1} (resumed)" in out


@by_hand
@pytest.mark.parametrize("number", [0, 1])
def test_a_signal_to_one_ends_all(tiny_flags, tmp_path, number):
  folders = tmp_path / "w", tmp_path / "other"
  processes = together(flags_with(tiny_flags, **LONG), folders)
  wait_for_step(folders[0], 3, processes[0])
  processes[number].terminate()
  for err in check_ended(processes, 143):
    assert "stopped by SIGTERM after step" in err


@by_hand
@pytest.mark.parametrize(
  ("limit", "code", "said"),
  [
    ({"stop_seconds": 3}, 143, "in 3 s (config.stop_seconds)"),
    ({"heartbeat_seconds": 10}, 75, "not been heard of for 10 s"),
  ],
)
def test_one_that_stands_still_is_not_waited_for(
  tiny_flags, tmp_path, limit, code, said
):
  """A signal ends the other one in stop_seconds, or the missed heartbeats."""
  folders = tmp_path / "w", tmp_path / "other"
  processes = together(flags_with(tiny_flags, **LONG, **limit), folders)
  wait_for_step(folders[0], 3, processes[0])
  processes[1].send_signal(signal.SIGSTOP)
  if code == 143:
    processes[0].terminate()
  _, err = processes[0].communicate(timeout=30)
  killed(processes[1])
  assert processes[0].returncode == code
  assert said in err


ARRAYS = """
import sys
import ml_dtypes
import numpy as np
from adaptive_attention.training import parallel, processes

port, index = sys.argv[1:]
processes.join(
  distributed=True, coordinator_address=f"127.0.0.1:{port}", process_count=2,
  process_index=int(index))
parallel.start(1, cpu_devices=1)
tree = {
  "zeros": np.float32([0.0, -0.0]),
  "nan": np.uint32([0x7FC01234, 0xFF800001]).view(np.float32),
  "half": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3).T,
  "count": np.int32(-7),
  "key": np.uint64([2**63 + 1]),
  "flag": np.array([True, False]),
  "none": np.zeros((0, 3), np.float32),
}
like = {n: np.ones(x.shape, x.dtype) for n, x in tree.items()}
sent = parallel.from_primary(tree if index == "0" else None, like)
for name, x in tree.items():
  assert sent[name].dtype == x.dtype and sent[name].shape == x.shape, name
  assert sent[name].tobytes() == x.tobytes(), name
"""


@by_hand
def test_arrays_are_sent_to_the_bit():
  """Of every kind, and also those that a sum would change."""
  port = str(free_port())
  sides = [
    subprocess.Popen(
      [sys.executable, "-c", ARRAYS, port, str(index)],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  check_ended(sides)


@by_hand
def test_one_that_no_other_joins_says_so():
  program = """
import sys
from adaptive_attention.training import processes
processes._JOIN_SECONDS = 3
processes.join(
  distributed=True, coordinator_address="127.0.0.1:" + sys.argv[1],
  process_count=2, process_index=0)
"""
  run = subprocess.run(
    [sys.executable, "-c", program, str(free_port())],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert run.returncode == 75
  assert "the other processes did not come within 3 s" in run.stderr


@by_hand
def test_what_only_the_first_one_sees_is_told_to_all(tiny_flags, tmp_path):
  """It is its error that they end with: here its newest checkpoint's."""
  folders = tmp_path / "w", tmp_path / "other"
  flags = flags_with(tiny_flags, eval_batch_size=4)
  check_ended(together(flags, folders))
  flip(folders[0] / "checkpoints" / "12")
  first, second = ends(together(flags_with(flags, steps=15), folders))
  assert (first[0], second[0]) == (1, 75)
  assert "the checkpoint of step 12" in first[2]
  assert "process 0 has ended (the checkpoint of step 12" in second[2]
  assert "is damaged" in second[2]


@by_hand
def test_four_and_then_two_and_one(memory_flags, tmp_path, main):
  """Streams are those of the devices: on fewer of them they start again."""
  folders = [tmp_path / name for name in "abcd"]
  slow = {"optimizer.mask_lr_multiplier": 1.0}  # so that they compile once
  flags = flags_with(memory_flags, accumulation_steps=1, **slow)
  four = flags_with(flags, cpu_devices=4, eval_batch_size=8)
  code, _, err = main(*four, f"--workdir={tmp_path / 'one'}")
  assert code == 0, err
  each = flags_with(flags, eval_batch_size=2)
  check_ended(together(each, folders))
  check_equal(folders[0], tmp_path / "one")
  before = final(folders[0])
  check_ended(together(each, folders, options=["--step=9"]))
  assert final(folders[0]) == before
  (code, out, err), _ = ends(together(flags_with(flags, steps=13), folders[:2]))
  assert code == 0, err
  assert "the streams restart" in out
  code, out, err = main(*flags_with(flags, steps=14), f"--workdir={folders[0]}")
  assert code == 0, err
  assert "start      step 13 of 14" in out


@by_hand
def test_one_evaluation_is_shared_by_all(memory_run, tmp_path):
  """Also by one that does not see the run."""
  flags = ["--mode=eval", "--config.eval_batch_size=4"]
  for count in (2, 3):
    folders = [memory_run, *(tmp_path / str(i) for i in range(1, count))]
    check_ended(together(flags, folders))
    found = json.loads((memory_run / "eval_valid.json").read_text())
    exact = [x for x in metrics(memory_run) if x["split"] == "valid"][-1]
    assert found["bytes"] == 49  # of all the split
    assert found["bits_per_char"] == pytest.approx(
      exact["bits_per_char"], rel=2e-6
    )
