"""Checkpoints are restored to the bit, or refused with advice on what to do."""

import errno
import json
import os
import pathlib
import re
import shutil
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptive_attention.training import (
  checkpoint,
  checkpoint_items,
  library_noise,
)
from adaptive_attention.training.checkpoint import CheckpointError, Checkpoints
from tests.conftest import files_of_at_most

PARAMS = {
  "block_0": {
    "kernel": np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32),
    "scale": jnp.array([1.5, -0.0, 3.0e-39, np.inf], jnp.bfloat16),
  },
  "span_logit": np.zeros(4, np.float32),
}
OPTIMIZER = optax.chain(
  optax.clip_by_global_norm(1.0),
  optax.adamw(1e-3, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
  optax.masked(optax.scale(2.0), {"block_0": False, "span_logit": True}),
)
STATE = jax.device_get(OPTIMIZER.init(PARAMS))


def save(workdir, steps, figures=None, keep=9):
  with Checkpoints(workdir, keep=keep) as saved:
    for i, step in enumerate(steps):
      params = {**PARAMS, "span_logit": np.full(4, step, np.float32)}
      figure = figures[i] if figures else None
      saved.save(step, params, STATE, {"config": {"a": 1}}, figure)


def read(workdir, step):
  with Checkpoints(workdir) as saved:
    return saved.restore(step, PARAMS, STATE)


def refused(workdir, step, *parts):
  with pytest.raises(CheckpointError) as error:
    read(workdir, step)
  message = str(error.value)
  for part in (*parts, str(step)):
    assert part in message
  assert "\n" not in message
  return message


def test_everything_comes_back_to_the_bit(tmp_path):
  save(tmp_path, [7])
  params, state, meta = read(tmp_path, 7)
  assert jax.tree.structure(params) == jax.tree.structure(PARAMS)
  assert jax.tree.structure(state) == jax.tree.structure(STATE)
  expected = {**PARAMS, "span_logit": np.full(4, 7, np.float32)}
  for found, wanted in zip(
    jax.tree.leaves((params, state)), jax.tree.leaves((expected, STATE))
  ):
    wanted = np.asarray(wanted)
    assert isinstance(found, np.ndarray)
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert found.tobytes() == wanted.tobytes()
  assert meta["config"] == {"a": 1}
  assert meta["step"] == 7
  assert meta["leaves"]["params"]["block_0.kernel"] == [[8, 3], "float32"]


def test_parameters_come_alone(tmp_path):
  save(tmp_path, [7])
  shutil.rmtree(tmp_path / "checkpoints" / "7" / "opt_state")
  with Checkpoints(tmp_path) as saved:
    params, meta = saved.restore_params(7)
  assert params["span_logit"][0] == 7
  assert meta["step"] == 7


def test_the_newest_and_the_best_are_kept(tmp_path):
  save(tmp_path, [1, 2, 3, 4, 5], [3.0, 1.0, None, 2.0, None], keep=2)
  with Checkpoints(tmp_path, keep=2) as saved:
    assert saved.steps() == [2, 4, 5]
    assert saved.resolve("best") == 2
    assert saved.resolve("latest") == 5
    assert saved.resolve("4") == 4
  # Another process knows the best one too.
  save(tmp_path, [6, 7], [1.5, 0.5], keep=2)
  with Checkpoints(tmp_path) as saved:
    assert saved.steps() == [6, 7]
    assert saved.resolve("best") == 7


def test_a_step_is_not_saved_twice(tmp_path):
  save(tmp_path, [7])
  with pytest.raises(CheckpointError, match="step 7 was not written"):
    save(tmp_path, [7])


@pytest.mark.parametrize("which", ["3", "first", "-1", "1.5", ""])
def test_a_step_that_is_not_there(tmp_path, which):
  save(tmp_path, [7])
  with Checkpoints(tmp_path) as saved, pytest.raises(CheckpointError) as error:
    saved.resolve(which)
  assert "one of 7" in str(error.value)


def test_best_needs_an_evaluation(tmp_path):
  save(tmp_path, [7])
  with (
    Checkpoints(tmp_path) as saved,
    pytest.raises(CheckpointError, match="choose latest"),
  ):
    saved.resolve("best")


def test_reading_an_empty_workdir_makes_nothing(tmp_path):
  with (
    Checkpoints(tmp_path / "none") as saved,
    pytest.raises(CheckpointError, match="holds no checkpoint"),
  ):
    saved.resolve("latest")
  assert not list(tmp_path.iterdir())


def data_files(folder):
  """Returns the files that hold the bytes of the parameters."""
  return [p for p in (folder / "params").rglob("d/*") if p.is_file()]


def flip(folder):
  """Flips one bit in the middle of each file of the arrays."""
  for path in data_files(folder):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(folder):
  for path in data_files(folder):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(folder):
  shutil.rmtree(folder)
  folder.mkdir()


def forget_item(folder):
  shutil.rmtree(folder / "opt_state")


def other_item(folder):
  """Puts the parameters of another step in place of these."""
  shutil.rmtree(folder / "params")
  shutil.copytree(folder.parent / "1" / "params", folder / "params")


def spoil_meta(folder):
  (folder / "meta" / "metadata").write_text('{"step": 3')


def change_meta(folder):
  """Changes a number, as a flipped bit can; the file stays JSON."""
  path = folder / "meta" / "metadata"
  text = path.read_text()
  changed = re.sub(r'"bits": ?\S+?([,}])', r'"bits": 0.5\1', text)
  assert changed != text
  path.write_text(changed)


def forget_digests(folder):
  path = folder / "meta" / "metadata"
  meta = json.loads(path.read_text())
  del meta["sha256"]
  path.write_text(json.dumps(meta))


def copy_older(folder):
  shutil.rmtree(folder)
  shutil.copytree(folder.parent / "1", folder)


@pytest.mark.parametrize(
  ("damage", "said"),
  [
    (flip, "params"),
    (truncate, "params"),
    (empty, "meta"),
    (forget_item, "opt_state"),
    (other_item, "params"),
    (spoil_meta, "meta"),
    (forget_digests, "meta: 'sha256'"),
    (change_meta, "meta: its sha256 differs"),
    (copy_older, "it belongs to step 1"),
  ],
)
def test_damage_is_said_with_the_older_ones_that_are_intact(
  tmp_path, damage, said
):
  save(tmp_path, [1, 2, 3])
  damage(tmp_path / "checkpoints" / "3")
  empty(tmp_path / "checkpoints" / "2")
  message = refused(tmp_path, 3, said, "intact: 1;", "--step=1")
  assert "2" not in message.split("intact:")[1]
  assert read(tmp_path, 1)[2]["step"] == 1


def test_late_reads_of_a_damaged_one_are_ignored(tmp_path, monkeypatch):
  """Such reads end after the context, when their event loop is closed."""
  seen = []
  monkeypatch.setattr(sys, "unraisablehook", seen.append)
  save(tmp_path, [3])
  assert sys.unraisablehook == seen.append
  truncate(tmp_path / "checkpoints" / "3")
  refused(tmp_path, 3)
  error = RuntimeError("Event loop is closed")
  sys.unraisablehook(types.SimpleNamespace(exc_value=error))
  assert not seen


def test_what_fails_on_a_device_is_no_damage(tmp_path, monkeypatch):
  save(tmp_path, [3])

  def lost(*_):
    raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed")

  with Checkpoints(tmp_path) as saved:
    monkeypatch.setattr(checkpoint_items, "_restored", lost)
    with pytest.raises(jax.errors.JaxRuntimeError, match="all-reduce"):
      saved.restore_params(saved.resolve("latest"))


def test_damage_of_the_only_one(tmp_path):
  save(tmp_path, [3])
  flip(tmp_path / "checkpoints" / "3")
  refused(tmp_path, 3, "no older one is intact", "--workdir")


@pytest.mark.parametrize(
  ("params", "state", "said"),
  [
    ({**PARAMS, "span_logit": np.zeros(5, np.float32)}, STATE, "float32[5]"),
    ({**PARAMS, "more": np.zeros(5, np.float32)}, STATE, "nothing at more"),
    ({"span_logit": PARAMS["span_logit"]}, STATE, "block_0"),
    (PARAMS, optax.sgd(0.1, momentum=0.9).init(PARAMS), "trace"),
  ],
)
def test_another_model_or_optimizer_is_named(tmp_path, params, state, said):
  save(tmp_path, [3])
  with Checkpoints(tmp_path) as saved, pytest.raises(CheckpointError) as error:
    saved.restore(3, params, state)
  assert said in str(error.value)
  assert "damaged" not in str(error.value)


def test_later_checkpoints_are_set_aside_not_lost(tmp_path):
  for _ in range(2):
    save(
      tmp_path, [1, 2, 3] if not (tmp_path / "checkpoints").exists() else [2, 3]
    )
    with Checkpoints(tmp_path) as saved:
      assert saved.set_aside_after(1) == [2, 3]
      assert saved.steps() == [1]
  assert sorted(p.name for p in (tmp_path / "set_aside").iterdir()) == [
    "2",
    "2-2",
    "3",
    "3-2",
  ]


def test_half_written_steps_do_not_count_and_are_cleaned_up(tmp_path):
  save(tmp_path, [1])
  half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
  shutil.copytree(tmp_path / "checkpoints" / "1", half)
  with Checkpoints(tmp_path) as saved:
    assert saved.resolve("latest") == 1
  save(tmp_path, [2])
  assert not half.exists()
  assert read(tmp_path, 2)[2]["step"] == 2


@pytest.mark.parametrize("name", ["2.removed", "2.orbax-checkpoint-tmp-17"])
def test_nor_do_half_removed_ones(tmp_path, name):
  save(tmp_path, [1])
  (tmp_path / "checkpoints" / "2.mine").mkdir()
  shutil.copytree(tmp_path / "checkpoints/1", tmp_path / "checkpoints" / name)
  save(tmp_path, [2])
  assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {
    "1",
    "2",
    "2.mine",
  }


@pytest.mark.parametrize("damage", [flip, truncate, spoil_meta, empty])
def test_what_cannot_be_read_back_drives_no_older_one_out(
  tmp_path, monkeypatch, damage
):
  save(tmp_path, [1, 2], [1.0, 2.0])
  write = checkpoint_items.write

  def write_badly(workdir, step, *args):
    write(workdir, step, *args)
    damage(tmp_path / "checkpoints" / str(step))

  monkeypatch.setattr(checkpoint_items, "write", write_badly)
  with pytest.raises(CheckpointError, match=r"intact: 1, 2; .*--step=2"):
    save(tmp_path, [3], [0.5], keep=1)
  for step in (1, 2):
    read(tmp_path, step)


def test_one_whose_meta_cannot_be_read_is_left_alone(tmp_path):
  save(tmp_path, [1, 2])
  spoil_meta(tmp_path / "checkpoints" / "1")
  save(tmp_path, [3, 4], keep=1)
  with Checkpoints(tmp_path) as saved:
    assert saved.steps() == [1, 4]


def test_a_disk_that_is_full_costs_no_older_one(tmp_path):
  save(tmp_path, [1], [2.0])
  with (
    files_of_at_most(400),
    pytest.raises(
      CheckpointError,
      # Which of the arrays that are written at once is told of is not known.
      match=r"step 2 cannot be written .*\((File too large|a file that was "
      r"just written is gone)\).*\(1 is kept",
    ),
  ):
    save(tmp_path, [2], [1.0])
  with Checkpoints(tmp_path) as saved:
    assert saved.steps() == [1]
  assert read(tmp_path, 1)[2]["step"] == 1
  save(tmp_path, [2], [1.0])
  assert read(tmp_path, 2)[2]["step"] == 2
  names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
  assert names == ["1", "2"]


def test_no_thread_of_a_failed_save_goes_on(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint_items, "_PATIENCE_SECONDS", 60)
  trees = {
    name: {f"{name}{i}": np.random.rand(1000) for i in range(8)}
    for name in ("params", "opt_state")
  }
  (tmp_path / "checkpoints").mkdir()
  before = set(threading.enumerate())
  for step in range(1, 6):
    with (
      library_noise.quiet(),
      files_of_at_most(400),
      pytest.raises((OSError, ValueError)),
    ):
      checkpoint_items.write(tmp_path, step, trees, {})
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize(
  ("error", "told"),
  [
    ("UNKNOWN: x [os_error_code='28'] [y]", "No space left on device"),
    ("NOT_FOUND: Error opening zarr", "a file that was just written is gone"),
    ("NOT_FOUND: x [os_error_code='5']", "Input/output error"),
    ("an array of strings cannot be written", None),
  ],
)
def test_errors_of_tensorstore_are_told_in_a_few_words(
  tmp_path, monkeypatch, error, told
):
  def failing(*_):
    raise ValueError(error)

  monkeypatch.setattr(checkpoint_items, "write", failing)
  expected = (
    (CheckpointError, rf"written to .* \({told}\); make room")
    if told
    else (ValueError, error)
  )
  with pytest.raises(expected[0], match=expected[1]):
    save(tmp_path, [2])


class Slow:
  """Holds up the writing of checkpoints until it is let go on."""

  def __init__(self, monkeypatch):
    self.begun, self.may_go_on = [], threading.Event()
    write = checkpoint_items.write

    def slow(workdir, step, *args):
      self.begun.append(step)
      assert self.may_go_on.wait(60)
      write(workdir, step, *args)

    monkeypatch.setattr(checkpoint_items, "write", slow)


@pytest.fixture
def slow(monkeypatch):
  return Slow(monkeypatch)


def test_what_comes_after_a_save_does_not_change_it(tmp_path, slow):
  """A donated array of a CPU is overwritten by the next step."""
  weights = jax.device_put({"w": np.arange(64, dtype=np.float32)})
  counts = {"count": np.zeros(4, np.int32)}
  streams = {"k": np.ones(3, np.float32)}
  step = jax.jit(lambda w: jax.tree.map(lambda x: x + 1, w), donate_argnums=0)
  with Checkpoints(tmp_path) as saved:
    saved.save(1, weights, counts, {}, memory=streams)
    for _ in range(3):
      weights = step(weights)
    counts["count"] += 1
    streams["k"] += 1
    assert saved.finish(wait=False) is None
    assert saved.steps() == []
    slow.may_go_on.set()
    saved.finish()
    params, opt_state, _ = saved.restore_items(1)
    np.testing.assert_array_equal(params["w"], np.arange(64))
    np.testing.assert_array_equal(opt_state["count"], np.zeros(4))
    found = saved.restore_memory(1, streams)
    np.testing.assert_array_equal(found["k"], np.ones(3))


def test_what_a_save_took_is_told_once(tmp_path, slow):
  with Checkpoints(tmp_path) as saved:
    assert saved.finish() is None
    began = time.perf_counter()
    saved.save(1, {"w": np.zeros(10, np.float32)}, {"n": np.zeros(2, int)}, {})
    called = time.perf_counter() - began
    time.sleep(0.2)
    slow.may_go_on.set()
    done = saved.finish()
    took = time.perf_counter() - began
    assert saved.finish() is None
  assert (done.step, done.bytes) == (1, 56)
  assert 0.2 <= done.seconds <= took
  assert 0 < done.stall_seconds <= took - 0.2
  assert called < 0.2


def test_a_save_waits_for_the_one_before_it(tmp_path, slow):
  with Checkpoints(tmp_path) as saved:
    saved.save(1, PARAMS, STATE, {})
    threading.Timer(0.1, slow.may_go_on.set).start()
    saved.save(2, PARAMS, STATE, {})
    assert saved.steps()[0] == 1
    saved.finish()
    assert saved.steps() == [1, 2]
  assert slow.begun == [1, 2]


def test_an_evaluation_waits_for_its_save(tmp_path, slow):
  with Checkpoints(tmp_path) as saved:
    saved.save(1, PARAMS, STATE, {})
    threading.Timer(0.1, slow.may_go_on.set).start()
    saved.record_evaluation(1, 2.5)
    assert saved.read_meta(1)["bits"] == 2.5


def test_a_slow_disk_is_named_while_it_is_waited_for(
  tmp_path, slow, monkeypatch, capsys
):
  monkeypatch.setattr(checkpoint, "_PATIENCE_SECONDS", 0.05)
  with Checkpoints(tmp_path) as saved:
    saved.save(7, PARAMS, STATE, {})
    threading.Timer(0.3, slow.may_go_on.set).start()
    saved.finish()
  said = capsys.readouterr().out
  assert re.fullmatch(
    r"waiting    for the checkpoint of step 7, [\d,]+ bytes, which is being "
    rf"written to {re.escape(str(tmp_path / 'checkpoints'))}\n",
    said,
  )


@pytest.mark.parametrize("where", ["finish", "next save", "evaluation", "end"])
def test_a_save_that_failed_is_told_at_the_next_chance(
  tmp_path, monkeypatch, where
):
  save(tmp_path, [1], [2.0])

  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(checkpoint_items, "write", full)
  with (
    pytest.raises(
      CheckpointError, match=r"step 2 cannot .*No space.*1 is kept"
    ),
    Checkpoints(tmp_path) as saved,
  ):
    saved.save(2, PARAMS, STATE, {})
    if where == "finish":
      saved.finish()
    elif where == "next save":
      saved.save(3, PARAMS, STATE, {})
    elif where == "evaluation":
      saved.record_evaluation(1, 2.5)
    if where != "end":
      raise AssertionError("nothing was told")


def test_what_vanished_is_not_made_anew(tmp_path):
  """A disk that is gone leaves the folder that it was mounted on."""
  workdir, gone = tmp_path / "w", tmp_path / "gone"
  workdir.mkdir()
  with Checkpoints(workdir) as saved:
    saved.save(1, PARAMS, STATE, {})
    saved.finish()
    workdir.rename(gone)
    told = "is not the folder any more that the run began in"
    with pytest.raises(CheckpointError, match=told):
      saved.save(2, PARAMS, STATE, {})
    workdir.mkdir()
    for act in (
      lambda: saved.save(2, PARAMS, STATE, {}),
      lambda: saved.record_evaluation(1, 2.5),
    ):
      with pytest.raises(CheckpointError, match=told):
        act()
    assert list(workdir.iterdir()) == []
    workdir.rmdir()
    gone.rename(workdir)
    saved.save(2, PARAMS, STATE, {})
    saved.finish()
    assert saved.steps() == [1, 2]


@pytest.mark.parametrize("item", ["meta", "params"])
def test_what_a_disk_does_not_give_is_no_damage(tmp_path, monkeypatch, item):
  save(tmp_path, [1, 2])

  def of_tensorstore(workdir, step, name):
    raise ValueError("UNKNOWN: Error reading x [os_error_code='5'] [y]")

  def of_system(path, **_):
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

  if item == "params":
    monkeypatch.setattr(checkpoint_items, "_restored", of_tensorstore)
  else:
    monkeypatch.setattr(pathlib.Path, "read_text", of_system)
  message = refused(
    tmp_path, 2, f"cannot be read ({item}: Input/output error); ", "mend the"
  )
  assert "damaged" not in message
  assert "no older one is intact" in message


def test_an_evaluation_may_come_after_the_save(tmp_path):
  save(tmp_path, [1, 2])
  with Checkpoints(tmp_path) as saved:
    saved.record_evaluation(1, 2.5)
    assert saved.resolve("best") == 1
    assert saved.read_meta(1)["bits"] == 2.5
  save(tmp_path, [3, 4, 5], keep=2)
  with Checkpoints(tmp_path) as saved:
    assert saved.steps() == [1, 4, 5]
    assert saved.resolve("best") == 1
    saved.restore_items(1)


def test_outside_tools_read_the_parameters_alone(tmp_path):
  import orbax.checkpoint as ocp

  save(tmp_path, [7])
  with ocp.StandardCheckpointer() as checkpointer:
    params = checkpointer.restore(tmp_path / "checkpoints" / "7" / "params")
  np.testing.assert_array_equal(
    params["block_0"]["kernel"], PARAMS["block_0"]["kernel"]
  )
  meta = tmp_path / "checkpoints" / "7" / "meta" / "metadata"
  assert json.loads(meta.read_text())["step"] == 7
