"""Runs that end well, are stopped, killed, damaged, and go on."""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from adaptive_attention import mask_parameters
from adaptive_attention.config import ModelConfig
from adaptive_attention.training.checkpoint import Checkpoints
from tests.training.test_checkpoint import flip

ROOT = pathlib.Path(__file__).parents[2]
# Equal runs may differ in these, and in which line tells of a save.
CLOCKED = re.compile("tokens_per_second|seconds|save_.*")


def metrics(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [
    {k: v for k, v in json.loads(line).items() if not CLOCKED.fullmatch(k)}
    for line in lines
  ]


def masks(workdir):
  lines = (workdir / "masks.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def final(workdir):
  """Returns the last step and its digests of parameters and optimizer."""
  with Checkpoints(workdir) as saved:
    meta = saved.read_meta(saved.resolve("latest"))
  return meta["step"], meta["sha256"]


def flags_with(flags, **changes):
  changed = [f"--config.{k.replace('__', '.')}={v}" for k, v in changes.items()]
  return [*flags, *changed]


@pytest.fixture(scope="module")
def whole_run(main, text, tmp_path_factory):
  """Returns (workdir, stdout) of a run that ended well, with dropout on."""
  from tests.conftest import TINY

  workdir = tmp_path_factory.mktemp("runs") / "whole[1]*"
  flags = [f"--config.{name}={value}" for name, value in TINY.items()]
  code, out, err = main(
    "--config=configs/base.py",
    f"--config.data.path={os.path.relpath(text, ROOT)}",
    *flags,
    f"--workdir={workdir}",
  )
  assert code == 0, err
  return workdir, out


def start(flags, workdir, *, is_killed=True):
  """Starts main.py; it reads what others have compiled.

  One that is killed does not write what it compiles.
  """
  least = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}
  return subprocess.Popen(
    [sys.executable, "main.py", *flags, f"--workdir={workdir}"],
    cwd=ROOT,
    env=os.environ | (least if is_killed else {}),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def wait_for_step(workdir, step, process):
  """Waits until metrics.jsonl has a line of this step or a later one."""
  path = workdir / "metrics.jsonl"
  while process.poll() is None:
    if path.exists():
      steps = re.findall(r'"step": (\d+)', path.read_text())
      if steps and int(steps[-1]) >= step:
        return
    time.sleep(0.01)
  raise AssertionError(process.communicate()[1])


def test_what_a_run_leaves_and_prints(whole_run, text):
  workdir, out = whole_run
  assert {p.name for p in workdir.iterdir()} == {
    "checkpoints",
    "config.json",
    "environment.json",
    "masks.jsonl",
    "metrics.jsonl",
    "lock",
  }
  config = json.loads((workdir / "config.json").read_text())
  assert config["model"]["n_layer"] == 1
  data = pathlib.Path(config["data"]["path"])
  assert data.is_absolute()  # though a relative one was given
  assert data.samefile(text)
  environment = json.loads((workdir / "environment.json").read_text())
  assert environment["packages"]["jax"]
  lines = metrics(workdir)
  assert [(m["step"], m["split"]) for m in lines] == [
    (3, "train"),
    (6, "train"),
    (6, "valid"),
    (9, "train"),
    (12, "train"),
    (12, "valid"),
  ]
  assert lines[0].keys() >= {
    "loss",
    "bits_per_char",
    "learning_rate",
    "grad_norm",
    "span_mean",
    "open_share",
  }
  # masks.jsonl has each head, at the same steps.
  rows = masks(workdir)
  assert [row["step"] for row in rows] == [3, 6, 9, 12]
  for row, line in zip(rows, (m for m in lines if m["split"] == "train")):
    assert row.keys() == {"step", "span", "period", "ratio", "open_share"}
    for name in row.keys() - {"step"}:
      assert np.shape(row[name]) == (1, 2)  # layers, heads
    np.testing.assert_allclose(np.mean(row["span"]), line["span_mean"])
    np.testing.assert_allclose(
      np.mean(row["open_share"]), line["open_share"], rtol=1e-6
    )
  # The header tells versions, changed settings, data, size, and no made-up MFU.
  assert "model.n_layer=1 (was 12)" in out
  assert "sha256" in out
  assert "parameters" in out
  assert "\nattention  reference\n" in out
  assert "order-0 entropy" in out
  assert "lzma" in out
  assert "mfu" not in out.lower()
  for field in ("loss", "bpc", "lr", "grad", "span", "open", "tok/s", "eta"):
    assert re.search(rf"step +12 100.0% .*{field}", out), field


def test_what_saving_took_is_recorded(whole_run):
  """Each save is told of in the line that is next when it has ended."""
  workdir, _ = whole_run
  rows = (workdir / "metrics.jsonl").read_text().splitlines()
  told = [x for x in map(json.loads, rows) if "save_seconds" in x]
  assert {x["save_step"] for x in told} >= {6, 12}
  for line in told:  # an evaluation waits for its own save
    assert line["split"] == "train" or line["save_step"] == line["step"]
  with Checkpoints(workdir) as saved:
    params, opt_state, _ = saved.restore_items(12)
  arrays = [*jax.tree.leaves(params), *opt_state.values()]
  for line in told:
    assert line["save_bytes"] == sum(x.nbytes for x in arrays)
    assert line["save_seconds"] > 0
    assert line["save_stall_seconds"] > 0


def test_spans_are_summed_up_as_they_are_recorded(whole_run):
  workdir, _ = whole_run
  trained = [x for x in metrics(workdir) if x["split"] == "train"]
  for line, of_heads in zip(trained, masks(workdir), strict=True):
    spans_LH = np.array(of_heads["span"])
    assert line["span_max"] == spans_LH.max()
    assert line["span_by_layer"] == spans_LH.mean(axis=1).tolist()


def test_a_finished_run_says_so_and_changes_nothing(
  main, whole_run, tiny_flags
):
  workdir, _ = whole_run
  before = (workdir / "metrics.jsonl").read_bytes()
  code, out, _ = main(*tiny_flags, f"--workdir={workdir}")
  assert code == 0
  assert out.count("already trained for 12 of 12 steps") == 1
  assert (workdir / "metrics.jsonl").read_bytes() == before


def test_it_learns(main, tiny_flags, tmp_path):
  flags = flags_with(
    tiny_flags,
    steps=150,
    model__dropout=0.0,
    optimizer__learning_rate=0.01,
    log_every_steps=50,
    eval_every_steps=150,
    checkpoint_every_steps=150,
  )
  code, _, err = main(*flags, f"--workdir={tmp_path / 'w'}")
  assert code == 0, err
  # One of 7 words has under 3 bits, and with its space about 5 bytes. The
  # entropy of single bytes is above 3.
  assert metrics(tmp_path / "w")[-1]["bits_per_char"] < 2.0


@pytest.mark.parametrize(
  ("number", "code"),
  [
    (signal.SIGTERM, 143),
    pytest.param(signal.SIGINT, 130, marks=pytest.mark.every_case),
  ],
)
def test_a_signal_saves_and_the_run_goes_on_to_the_bit(
  whole_run, main, tiny_flags, tmp_path, number, code
):
  workdir = tmp_path / "w"
  process = start(tiny_flags, workdir)
  wait_for_step(workdir, 3, process)
  process.send_signal(number)
  _, err = process.communicate()
  stopped, _ = final(workdir)
  if stopped < 12:  # otherwise the run had ended already
    assert process.returncode == code, err
    # On a slow machine an earlier line says that a step is being finished.
    said = [x for x in err.splitlines() if "finishing the step" not in x]
    assert len(said) == 1, err
    assert f"stopped by {signal.Signals(number).name} after step" in said[0]
  code, _, err = main(*tiny_flags, f"--workdir={workdir}")
  assert code == 0, err
  assert final(workdir) == final(whole_run[0])
  assert metrics(workdir) == metrics(whole_run[0])
  assert masks(workdir) == masks(whole_run[0])


def test_kill_9_three_times_at_random_moments(main, tiny_flags, tmp_path):
  flags = flags_with(
    tiny_flags, steps=80, checkpoint_every_steps=4, eval_every_steps=40
  )
  code, _, err = main(*flags, f"--workdir={tmp_path / 'whole'}")
  assert code == 0, err
  moments = random.Random(0)
  killed = 0
  while killed < 3:
    process = start(flags, tmp_path / "w")
    path = tmp_path / "w" / "metrics.jsonl"
    size = path.stat().st_size if path.exists() else 0
    while process.poll() is None and (
      not path.exists() or path.stat().st_size <= size
    ):
      time.sleep(0.002)
    time.sleep(moments.uniform(0, 0.5))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    killed += 1
  code, _, err = main(*flags, f"--workdir={tmp_path / 'w'}")
  assert code == 0, err
  assert final(tmp_path / "w") == final(tmp_path / "whole")
  assert metrics(tmp_path / "w") == metrics(tmp_path / "whole")
  assert masks(tmp_path / "w") == masks(tmp_path / "whole")


def copy_of(whole_run, tmp_path):
  import shutil

  return pathlib.Path(shutil.copytree(whole_run[0], tmp_path / "copy"))


def test_damage_stops_the_run_and_an_older_step_goes_on(
  main, whole_run, tiny_flags, tmp_path
):
  workdir = copy_of(whole_run, tmp_path)
  flip(workdir / "checkpoints" / "12")
  flags = [*tiny_flags, f"--workdir={workdir}"]
  code, _, err = main(*flags)
  assert code == 1
  assert err.count("\n") == 1
  assert "step 12" in err
  assert "--step=9" in err
  code, out, err = main(*flags, "--step=9")
  assert code == 0, err
  assert "set aside: the later checkpoints [12]" in out
  assert final(workdir) == final(whole_run[0])
  assert metrics(workdir) == metrics(whole_run[0])
  assert masks(workdir) == masks(whole_run[0])
  assert (workdir / "set_aside" / "12").exists()


def test_a_checkpoint_of_another_run_is_refused(
  main, whole_run, tiny_flags, tmp_path
):
  workdir = copy_of(whole_run, tmp_path)
  flags = [*tiny_flags, f"--workdir={workdir}", "--config.steps=15"]
  before = final(workdir)
  code, _, err = main(*flags, "--config.model.ramp=8")
  assert code == 2
  assert "config.model.ramp=8.0 does not fit" in err
  other = tmp_path / "other.txt"
  other.write_bytes(b"another text " * 1000)
  code, _, err = main(*flags, f"--config.data.path={other}")
  assert code == 1
  assert "not on other.txt" in err
  assert final(workdir) == before
  code, out, err = main(*flags, "--config.model.dropout=0.1")
  assert code == 0, err
  assert "steps=15 (was 12)" in out
  assert "model.dropout=0.1 (was 0.3)" in out
  assert final(workdir)[0] == 15


def test_another_number_of_devices_goes_on(
  main, whole_run, tiny_flags, tmp_path
):
  workdir = copy_of(whole_run, tmp_path)
  code, _, err = main(
    *tiny_flags,
    f"--workdir={workdir}",
    "--config.steps=15",
    "--config.cpu_devices=1",
  )
  assert code == 0, err
  assert final(workdir)[0] == 15


def test_a_second_writer_is_refused(main, tiny_flags, tmp_path):
  flags = flags_with(tiny_flags, steps=100_000, checkpoint_every_steps=50_000)
  process = start(flags, tmp_path)
  wait_for_step(tmp_path, 3, process)
  code, _, err = main(*tiny_flags, f"--workdir={tmp_path}")
  process.kill()
  process.communicate()
  assert code == 1
  assert f"is being written by process {process.pid}" in err


def test_a_loss_that_is_not_finite_stops_the_run(main, tiny_flags, tmp_path):
  flags = flags_with(tiny_flags, steps=50, eval_every_steps=50)
  stable = flags_with(flags, optimizer__learning_rate=1e-3)
  code, _, err = main(*stable, f"--workdir={tmp_path}", "--config.steps=3")
  assert code == 0, err
  kept = final(tmp_path)
  code, _, err = main(
    *flags,
    f"--workdir={tmp_path}",
    "--config.optimizer.learning_rate=1e30",
    "--config.optimizer.warmup_steps=0",
  )
  assert code == 1
  assert re.search(r"(loss|grad_norm)=(nan|inf) at step \d+", err), err
  assert "the checkpoint of step" in err
  assert err.count("\n") == 1
  with Checkpoints(tmp_path) as saved:
    assert kept[0] in saved.steps()
    params, _ = saved.restore_params(saved.resolve("latest"))
  assert all(
    np.isfinite(x).all() for x in params["block_0"]["mlp"]["up"].values()
  )


@pytest.fixture
def run(whole_run):
  return whole_run[0]


def memory_lines(out):
  """Returns what is said of the memory that follows the spans."""
  return [line for line in out.splitlines() if "follows the spans" in line]


def memory_groups(workdir, step):
  with Checkpoints(workdir) as saved:
    return saved.read_meta(step)["memory_groups"]


@pytest.mark.parametrize("step", [3, 9])
def test_streams_and_their_memory_go_on_to_the_bit(
  main, memory_run, memory_flags, tmp_path, step
):
  """The run goes on from the middle of its streams, and from their end.

  On the way its memory is made anew for other spans.
  """
  import shutil

  workdir = shutil.copytree(memory_run, tmp_path / "copy")
  for path in (workdir / "checkpoints").iterdir():
    if path.name.isdigit() and int(path.name) > step:
      shutil.rmtree(path)
  code, out, err = main(*memory_flags, f"--workdir={workdir}")
  assert code == 0, err
  assert "restart" not in out
  assert f"step {step} of 12 (resumed)" in out
  digests = final(workdir)
  assert digests == final(memory_run)
  assert digests[1].keys() == {"params", "opt_state", "memory"}
  assert metrics(workdir) == metrics(memory_run)
  assert masks(workdir) == masks(memory_run)
  before, after, same = (
    memory_groups(*at)
    for at in ((workdir, step), (workdir, 12), (memory_run, 12))
  )
  assert after == same
  assert (after != before) == bool(memory_lines(out))
  assert step == 9 or after != before


def test_a_memory_lets_go_of_what_is_not_needed(main, memory_flags, tmp_path):
  """It does after a step that is saved, if it is worth a compilation.

  It changes nothing, beside a memory that holds all for all heads.
  """
  changes = {
    "model.span_init": 0.6,
    "model.span_coef": 1.0,
    "optimizer.mask_lr_multiplier": 500.0,
    "checkpoint_every_steps": 4,
  }
  flags = flags_with(memory_flags, **changes)
  part, whole = tmp_path / "part", tmp_path / "whole"
  code, out, err = main(*flags, f"--workdir={part}")
  assert code == 0, err
  (line,) = memory_lines(out)
  assert re.search(r": 2\d(.\d+)? KiB -> 1\d(.\d+)? KiB per device", line)
  # It is not worth it at step 4, and is at step 6, whose line comes before.
  lines = out.splitlines()
  before = [x.split()[1] for x in lines[: lines.index(line)] if " lr " in x]
  assert before == ["3", "6"]
  flags = flags_with(flags, **{"model.memory_margin": 1e6})
  code, out, err = main(*flags, f"--workdir={whole}")
  assert code == 0, err
  assert not memory_lines(out)
  assert memory_groups(whole, 12) == [[[[0, 1, 2, 3], 120 - 23]]]
  for found, exact in zip(*map(metrics, (part, whole)), strict=True):
    assert found["loss"] == pytest.approx(exact["loss"], rel=1e-6)


def test_streams_start_again_at_their_ends(memory_run):
  """A stream has nine segments, so three of twelve steps are a second pass."""
  with Checkpoints(memory_run) as saved:
    leaves = saved.read_meta(12)["leaves"]["memory"]
    memory = saved.restore_memory(
      12,
      {path: jax.ShapeDtypeStruct(*entry) for path, entry in leaves.items()},
    )
  np.testing.assert_array_equal(memory["tokens_read"], [3 * 24] * 2)


@pytest.mark.parametrize(
  "change",
  [
    {"cpu_devices": 1},
    pytest.param(
      {"batch_size": 8, "accumulation_steps": 4}, marks=pytest.mark.every_case
    ),
  ],
)
def test_other_streams_start_again_and_say_so(
  main, memory_run, memory_flags, tmp_path, change
):
  import shutil

  workdir = shutil.copytree(memory_run, tmp_path / "copy")
  flags = flags_with(memory_flags, steps=15, **change)
  code, out, err = main(*flags, f"--workdir={workdir}")
  assert code == 0, err
  assert out.count("the streams restart") == 1
  assert final(workdir)[0] == 15
  # The saved memory is now that of these streams.
  code, out, err = main(*flags_with(flags, steps=18), f"--workdir={workdir}")
  assert code == 0, err
  assert "restart" not in out


def test_memory_is_evaluated_as_a_stream(main, memory_run, text):
  """One stream gives the figure of several, which are warmed up before."""
  figures = []
  for devices, batch_size in ((1, 1), (1, 8), (2, 8)):
    code, out, err = main(
      "--mode=eval",
      f"--workdir={memory_run}",
      f"--config.data.path={text}",
      f"--config.cpu_devices={devices}",
      f"--config.eval_batch_size={batch_size}",
    )
    assert code == 0, err
    assert "other data: text.txt" in out
    record = json.loads((memory_run / "eval_valid.json").read_text())
    assert record["protocol"] == "memory"
    assert record["bytes"] == 999
    figures.append(record["bits_per_char"])
  np.testing.assert_allclose(figures[1:], figures[0], rtol=1e-6)


def test_training_and_evaluation_say_the_same(main, memory_run):
  code, _, err = main("--mode=eval", f"--workdir={memory_run}")
  assert code == 0, err
  record = json.loads((memory_run / "eval_valid.json").read_text())
  assert (record["protocol"], record["bytes"]) == ("memory", 49)
  valid = [m for m in metrics(memory_run) if m["split"] == "valid"][-1]
  for name in ("bits_per_char", "stderr"):
    np.testing.assert_allclose(valid[name], record[name], rtol=1e-6)


def test_a_shard_shorter_than_its_streams_is_refused(
  main, memory_flags, tmp_path
):
  code, _, err = main(
    *flags_with(memory_flags, batch_size=40), f"--workdir={tmp_path / 'w'}"
  )
  assert code == 2
  assert "config.batch_size=40 is not possible" in err
  assert "at most 18 on each of 2 device(s)" in err
  assert not (tmp_path / "w").exists()


def test_tensorboard_and_wandb(main, tiny_flags, tmp_path):
  flags = flags_with(tiny_flags, steps=3, eval_every_steps=3)
  code, _, err = main(
    *flags, "--config.tensorboard=True", f"--workdir={tmp_path / 'a'}"
  )
  assert code == 0, err
  assert list((tmp_path / "a" / "tensorboard").rglob("events.out.*"))
  try:
    import wandb  # noqa: F401
  except ImportError:
    code, _, err = main(
      *flags, "--config.wandb=True", f"--workdir={tmp_path / 'b'}"
    )
    assert code == 1
    assert "needs the package wandb" in err


def test_a_dense_run_learns_masks_alone(main, tiny_flags, tmp_path):
  dense, adaptive = tmp_path / "dense", tmp_path / "adaptive"
  flags = flags_with(tiny_flags, steps=2, model__attention="dense")
  assert main(*flags, f"--workdir={dense}")[0] == 0
  flags = flags_with(
    tiny_flags,
    steps=2,
    model__attention="span_wave",
    model__ratio_max=0.5,
    model__span_coef=1e-3,
    init_from=dense,
    train_only="masks",
    optimizer__warmup_steps=0,
  )
  code, out, err = main(*flags, f"--workdir={adaptive}")
  assert code == 0, err
  assert f"parameters of step 2 of {dense}" in out
  with Checkpoints(dense) as before, Checkpoints(adaptive) as after:
    expected, _ = before.restore_params(2)
    found, _ = after.restore_params(2)
  masks = found["block_0"]["attention"]
  learned = {name: masks.pop(name) for name in list(masks) if "logit" in name}
  assert len(learned) == 3
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  opened = mask_parameters.open_logits(
    ModelConfig(
      n_head=len(learned["span_logit"]),
      context_tokens=expected["position_0"].shape[0],
      ratio_max=0.5,
    ).mask_bounds,
    expected["position_0"].shape[0],
  )
  for name, logit_H in learned.items():
    assert (logit_H != opened[name]).all()
  # Without masks there is nothing to train.
  flags = flags_with(tiny_flags, train_only="masks", model__attention="dense")
  code, _, err = main(*flags, f"--workdir={tmp_path / 'none'}")
  assert code == 2
  assert "train_only='masks' is not possible" in err


def test_start_from_other_parameters(main, tiny_flags, tmp_path):
  """At rate 0 nothing is learned: the parameters stay those of the file."""

  from configs import base
  from tests.conftest import TINY
  from tests.test_weights import published

  config = base.get_config()
  config.update_from_flattened_dict(TINY | {"model.n_layer": 2})
  named = published(ModelConfig(**config.model))
  np.savez(tmp_path / "them.npz", **named)
  code, _, err = main(
    *flags_with(
      tiny_flags,
      steps=1,
      model__n_layer=2,
      optimizer__learning_rate=0.0,
      optimizer__min_learning_rate=0.0,
      init_from=tmp_path / "them.npz",
    ),
    f"--workdir={tmp_path / 'w'}",
  )
  assert code == 0, err
  with Checkpoints(tmp_path / "w") as saved:
    params, _ = saved.restore_params(1)
  np.testing.assert_array_equal(
    params["block_1"]["attention"]["qkv"]["kernel"],
    named["transformer.h.1.attn.c_attn.weight"].T,
  )
  code, _, err = main(
    *flags_with(tiny_flags, init_from=tmp_path / "none.npz"),
    f"--workdir={tmp_path / 'v'}",
  )
  assert code == 1
  assert "does not exist" in err
