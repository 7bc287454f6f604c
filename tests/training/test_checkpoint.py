"""Checkpoints are restored to the bit, or refused with advice on what to do."""

import json
import re
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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
    monkeypatch.setattr(saved, "_restored", lost)
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
  write = Checkpoints._write

  def write_badly(self, step, *args):
    write(self, step, *args)
    damage(tmp_path / "checkpoints" / str(step))

  monkeypatch.setattr(Checkpoints, "_write", write_badly)
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

  monkeypatch.setattr(Checkpoints, "_write", failing)
  expected = (
    (CheckpointError, rf"written to .* \({told}\); make room")
    if told
    else (ValueError, error)
  )
  with pytest.raises(expected[0], match=expected[1]):
    save(tmp_path, [2])


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
