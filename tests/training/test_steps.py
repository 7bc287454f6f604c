"""One training step: on any number of devices, in any number of parts."""

import functools
import json
import math
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from adaptive_attention.config import ModelConfig
from adaptive_attention.model import Transformer
from adaptive_attention.training import (
  batches,
  optimizer,
  parallel,
  settings,
  steps,
)

ROOT = pathlib.Path(__file__).parents[2]
DATA = np.random.default_rng(0).integers(97, 123, 5_000, np.uint8)


def parts(config):
  """Makes (model, optimizer, seed) from the settings."""
  taken = settings.training_config(settings.check(config))
  rule = optimizer.make(taken.optimizer, taken.steps)
  return Transformer(taken.model), rule, taken.seed


def init_state(config):
  """Returns the train state of step 0, on the host."""
  return _init_state(FrozenConfigDict(config))


@functools.cache
def _init_state(config):
  state = steps.init_state(*parts(ConfigDict(config)))
  return jax.device_get(state)


def make_train_step(config):
  """Makes the step of these settings, once for all tests."""
  return _make_train_step(FrozenConfigDict(config))


@functools.cache
def _make_train_step(config):
  return steps.make_train_step(*parts(ConfigDict(config)))


def batch_shapes(config):
  return batches.shapes(
    *(config.batch_size, config.accumulation_steps),
    config.model.context_tokens,
  )


def windows(config, step, draw=batches.train_batch):
  """Returns (B, T + 1), the batch of all devices and accumulation steps."""
  return draw(
    DATA,
    seed=0,
    step=step,
    shard_index=0,
    batch_size=config.batch_size,
    context_tokens=config.model.context_tokens,
  )


def train(config, count, draw=windows):
  """Returns (train state, metrics) of `count` steps.

  The rows of a step do not depend on how they are dealt out.
  """
  N, A = parallel.local_device_count(), config.accumulation_steps
  T = config.model.context_tokens
  state = parallel.replicate(init_state(config))
  step = make_train_step(config)
  memory = start_memory(config)
  history = []
  for i in range(count):
    batch = make_batch(draw(config, i).reshape(N, A, -1, T + 1))
    state, memory, metrics = step(state, memory, batch)
    metrics.pop("masks")
    history.append({name: float(value) for name, value in metrics.items()})
  return state, history


def start_memory(config):
  return steps.start_memory(
    ModelConfig(**config.model), batches.per_device(config.batch_size)
  )


def make_batch(tokens_NABT, restart=False):
  N = len(tokens_NABT)
  return batches.Batch(tokens_NABT, np.zeros(N, np.int32), np.full(N, restart))


def empty_batch(config):
  shapes = batch_shapes(config)
  return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)


def flat(tree):
  return {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def check_equal(found, expected, **tolerance):
  found, expected = flat(found), flat(expected)
  assert found.keys() == expected.keys()
  for name, value in found.items():
    np.testing.assert_allclose(value, expected[name], err_msg=name, **tolerance)


def test_all_replicas_stay_equal_with_dropout_on(tiny):
  state, _ = train(tiny, 5)
  for name, leaf in [*jax.tree_util.tree_leaves_with_path(state)]:
    shards = [np.asarray(s.data) for s in leaf.addressable_shards]
    assert len(shards) == 2
    np.testing.assert_array_equal(shards[0], shards[1], err_msg=str(name))


def test_devices_draw_their_dropout_apart(tiny):
  """If two devices drew alike, it would not matter which has which rows."""
  tiny.model.context_tokens = 12
  rows = windows(tiny, 0).reshape(2, 1, 2, -1)
  losses = {}
  for dropout in (0.0, 0.3):
    tiny.model.dropout = dropout
    step = make_train_step(tiny)
    for name, tokens in (("dealt", rows), ("swapped", rows[::-1])):
      state = parallel.replicate(init_state(tiny))
      *_, metrics = step(state, start_memory(tiny), make_batch(tokens))
      losses[dropout, name] = float(metrics["cross_entropy"])
  assert losses[0.0, "dealt"] == losses[0.0, "swapped"]
  assert losses[0.3, "dealt"] != losses[0.3, "swapped"]


def test_accumulation_is_the_whole_batch(tiny):
  tiny.model.dropout = 0.0
  tiny.batch_size = 8
  whole, whole_history = train(tiny, 3)
  tiny.accumulation_steps = 4
  parts, parts_history = train(tiny, 3)
  check_equal(parts.params, whole.params, rtol=1e-4, atol=1e-6)
  check_equal(parts_history, whole_history, rtol=1e-5, atol=1e-6)


def remembering(tiny):
  """Returns the config with a memory and positions that go on in segments."""
  tiny.model.update(
    memory_tokens=30, position="rotary", max_span=48, dropout=0.0
  )
  return tiny


def stream(config, step):
  return windows(config, step, batches.stream_batch)


def test_accumulation_keeps_memories_apart(tiny):
  config = remembering(tiny)
  config.batch_size = 8
  whole, whole_history = train(config, 3, draw=stream)
  config.accumulation_steps = 4
  parts, parts_history = train(config, 3, draw=stream)
  check_equal(parts.params, whole.params, rtol=1e-4, atol=1e-6)
  check_equal(parts_history, whole_history, rtol=1e-5, atol=1e-6)
  # The losses of the last segments alone are others.
  config.model.memory_tokens = 0
  _, alone = train(config, 3, draw=stream)
  assert alone[0]["loss"] == pytest.approx(whole_history[0]["loss"], rel=1e-5)
  assert alone[2]["loss"] != pytest.approx(whole_history[2]["loss"], rel=1e-5)


def test_a_restart_forgets(tiny):
  config = remembering(tiny)
  step = make_train_step(config)
  shape = batch_shapes(config).tokens.shape

  def loss(memory, restart):
    state = parallel.replicate(init_state(config))
    tokens = stream(config, 1).reshape(shape)
    *_, metrics = step(state, memory, make_batch(tokens, restart))
    return float(metrics["loss"])

  def after_a_segment():
    state = parallel.replicate(init_state(config))
    first = make_batch(stream(config, 0).reshape(shape), restart=True)
    return step(state, start_memory(config), first)[1]

  assert loss(after_a_segment(), True) == loss(start_memory(config), False)
  assert loss(after_a_segment(), False) != loss(start_memory(config), False)


def test_a_step_that_is_not_finite_is_not_remembered(tiny):
  config = remembering(tiny)
  state = init_state(config)
  embed = state.params["embed"]["embedding"]
  spoiled = state.replace(
    params={**state.params, "embed": {"embedding": embed * np.nan}}
  )
  step = make_train_step(config)
  shape = batch_shapes(config).tokens.shape
  batch = make_batch(stream(config, 0).reshape(shape))
  _, memory, _ = step(parallel.replicate(spoiled), start_memory(config), batch)
  assert not np.asarray(memory.tokens_read).any()
  *_, after = step(parallel.replicate(state), memory, batch)
  *_, fresh = step(parallel.replicate(state), start_memory(config), batch)
  assert float(after["loss"]) == float(fresh["loss"])


def test_the_memory_stays_in_its_place(tiny):
  """No array of its size is copied or returned as a new one."""
  config = remembering(tiny)
  config.model.attention = "span"
  config.model.implementation = "blocked"
  config.model.memory_tokens = 24 * 1000
  memory = start_memory(config)
  _, sizes = parallel.compile_step(
    make_train_step(config),
    jax.eval_shape(lambda: steps.init_state(*parts(config))),
    memory,
    batch_shapes(config),
  )
  layer = memory.layers[0].k[0].nbytes / 2
  assert sizes["outputs that are not aliased"] < layer / 100
  config.model.memory_tokens = 24 * 100
  _, short = parallel.compile_step(
    make_train_step(config),
    jax.eval_shape(lambda: steps.init_state(*parts(config))),
    start_memory(config),
    batch_shapes(config),
  )
  # The keys and values of one head at a time are brought together. With H = 2
  # they take as much as the keys of one layer.
  assert sizes["temporary"] - short["temporary"] < 1.5 * layer


@pytest.mark.parametrize(
  ("remat", "most"),
  [
    pytest.param("mlp", 0.7, marks=pytest.mark.every_case),
    ("block", 0.45),
  ],
)
def test_what_is_computed_again_is_the_same_and_takes_less(tiny, remat, most):
  config = remembering(tiny) if remat == "mlp" else tiny
  config.model.update(n_layer=3, width=32, context_tokens=16, dropout=0.3)
  config.batch_size = 64
  found = []
  for config.model.remat in ("none", remat):
    state = parallel.replicate(init_state(config))
    step, sizes = parallel.compile_step(
      make_train_step(config),
      *(state, start_memory(config), batch_shapes(config)),
    )
    tokens = stream(config, 0).reshape(batch_shapes(config).tokens.shape)
    state, memory, _ = step(
      state, start_memory(config), make_batch(tokens, restart=True)
    )
    found.append(((state.params, memory), sizes["temporary"]))
  (plain, plain_bytes), (again, again_bytes) = found
  check_equal(again, plain, rtol=1e-5, atol=1e-7)
  assert again_bytes < most * plain_bytes


ONE_DEVICE = """
import sys, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 1)
from ml_collections import ConfigDict
import json
from tests.training import test_steps
config = ConfigDict(json.loads(sys.argv[1]))
state, history = test_steps.train(config, 3)
np.savez(sys.argv[2], **test_steps.flat(state.params))
print(json.dumps(history))
"""


def test_two_devices_do_what_one_does(tiny, tmp_path):
  tiny.model.dropout = 0.0
  two, two_history = train(tiny, 3)
  out = subprocess.run(
    [
      sys.executable,
      "-c",
      ONE_DEVICE,
      json.dumps(tiny.to_dict()),
      str(tmp_path / "one.npz"),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  with np.load(tmp_path / "one.npz") as one:
    for name, value in flat(two.params).items():
      np.testing.assert_allclose(
        value, one[name], rtol=1e-4, atol=1e-6, err_msg=name
      )
  check_equal(two_history, json.loads(out), rtol=1e-5, atol=1e-6)


def test_golden_steps(tiny):
  """The numbers are those that this program computed when they were stored."""
  golden = json.loads((ROOT / "tests" / "golden" / "steps.json").read_text())
  for attention, expected in golden.items():
    tiny.model.update(attention=attention, n_layer=2)
    _, history = train(tiny, len(expected))
    check_equal(history, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("spoil", [np.nan, np.inf, 3e38])
def test_a_step_that_is_not_finite_is_not_made(tiny, spoil):
  state = init_state(tiny)
  params = dict(state.params)
  params["position_0"] = np.full_like(params["position_0"], spoil)
  state = parallel.replicate(state.replace(params=params))
  before = flat(state)
  state, _, metrics = make_train_step(tiny)(
    state, start_memory(tiny), empty_batch(tiny)
  )
  assert not math.isfinite(float(metrics["loss"] + metrics["grad_norm"]))
  for name, value in flat(state).items():
    np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_a_signal_on_one_device_is_seen_by_all(tiny):
  state = parallel.replicate(init_state(tiny))
  batch = empty_batch(tiny)._replace(stop=np.array([0, 1], np.int32))
  *_, metrics = make_train_step(tiny)(state, start_memory(tiny), batch)
  assert metrics["stop"] == 1


def test_metrics_are_those_of_the_parameters(tiny):
  from adaptive_attention import masks
  from adaptive_attention.mask_parameters import mask_params

  state, history = train(tiny, 1)
  layers = mask_params(state.params, ModelConfig(**tiny.model))
  spans = np.concatenate([mask.span for mask in layers])
  np.testing.assert_allclose(history[0]["span_mean"], spans.mean(), rtol=1e-6)
  T = tiny.model.context_tokens
  counted = np.mean([masks.is_open(mask, np.arange(T)) for mask in layers])
  np.testing.assert_allclose(history[0]["open_share"], counted, rtol=1e-6)


@pytest.mark.parametrize(
  "period", [pytest.param("real", marks=pytest.mark.every_case), "integer"]
)
def test_blocked_trains_as_the_reference_does(tiny, period):
  tiny.model.update(context_tokens=96, n_layer=1, period=period)
  histories = []
  for implementation in ("blocked", "reference"):
    tiny.model.implementation = implementation
    histories.append(train(tiny, 20)[1])
  losses = [[step["loss"] for step in history] for history in histories]
  np.testing.assert_allclose(*losses, rtol=1e-5)
