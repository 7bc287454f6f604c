"""Logits over a segment memory are those of one long sequence."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_attention.config import ModelConfig
from adaptive_attention.model import Transformer
from adaptive_attention.segment_memory import ring_rows, tokens_before
from adaptive_attention.state import init_memory
from adaptive_attention.training.steps import cross_entropy
from tests import drawn
from tests.attention.cases import mostly_blocked

T = 24
CONFIG = ModelConfig(
  n_layer=2,
  n_head=2,
  width=16,
  context_tokens=T,
  memory_tokens=5 * T,
  max_span=6 * T,
  ramp=4.0,
  attention="span",
  position="rotary",
  implementation="reference",  # soon compiled
)
# Two streams of six segments.
STREAM = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 6 * T + 1)))


def changed(**changes):
  return dataclasses.replace(CONFIG, **changes)


def parameters(config):
  return drawn.parameters(config, scale=0.3)


def with_spans(params, config, span):
  """Returns the parameters with this span in every head."""
  logit = math.log(span / (config.max_span - span))
  return jax.tree_util.tree_map_with_path(
    lambda path, x: (
      jnp.full_like(x, logit) if path[-1].key == "span_logit" else x
    ),
    params,
  )


def rows(memory):
  """Returns the keys of all layers and the values of all layers."""
  return [x.k[0] for x in memory.layers], [x.v[0] for x in memory.layers]


def with_rows(memory, keys, values):
  layers = zip(memory.layers, keys, values, strict=True)
  return memory.replace(
    layers=tuple(layer.replace(k=(k,), v=(v,)) for layer, k, v in layers)
  )


@functools.cache
def applied(config):
  """Returns a compiled function of (variables, tokens, state=...)."""
  return jax.jit(Transformer(config).apply)


def by_segments(config, params, stream=STREAM, tokens_read=0):
  """Returns (segments, B, T) nats of streams that are read by segments."""
  memory = init_memory(config, len(stream), T)
  memory = memory.replace(tokens_read=jnp.uint32(tokens_read))
  nats = []
  for start in range(0, stream.shape[1] - 1, T):
    tokens = stream[:, start : start + T + 1]
    logits, memory = applied(config)(
      {"params": params}, tokens[:, :-1], state=memory
    )
    nats.append(cross_entropy(logits, tokens[:, 1:]))
  return np.stack(nats)


def at_once(config, params, stream):
  """Returns (B, length - 1) nats of streams that are read at once."""
  logits = applied(config)({"params": params}, stream[:, :-1])
  return np.asarray(cross_entropy(logits, stream[:, 1:]))


# The reference serves segments as it serves one sequence.


@mostly_blocked
@pytest.mark.parametrize(
  ("attention", "position"),
  [
    # Spans and rotary positions are in the others too.
    pytest.param("span", "rotary", marks=pytest.mark.every_case),
    ("span", "relative"),
    ("span_wave", "rotary"),
    pytest.param("dense", "relative", marks=pytest.mark.every_case),
  ],
)
def test_every_segment_is_the_end_of_one_sequence(
  attention, position, implementation
):
  config = changed(
    n_kv_head=1,
    attention=attention,
    position=position,
    implementation=implementation,
  )
  params = parameters(config)
  found = by_segments(config, params)
  one = at_once(config, params, STREAM)
  for i, nats_BT in enumerate(found):
    np.testing.assert_allclose(nats_BT, one[:, i * T : (i + 1) * T], atol=1e-5)
  # The logits of the segment alone are others.
  alone = at_once(config, params, STREAM[:, -T - 1 :])
  assert np.abs(found[-1] - alone).max() > 1e-2


@pytest.mark.parametrize(
  "memory_tokens",
  [1, 37, pytest.param(2 * T, marks=pytest.mark.every_case)],
)
@mostly_blocked
def test_memory_of_any_length_ends_where_it_is_said_to(
  memory_tokens, implementation
):
  """There is one layer, as keys of a deeper one depend on older tokens."""
  config = changed(
    memory_tokens=memory_tokens,
    attention="dense",
    n_layer=1,
    implementation=implementation,
  )
  params = parameters(config)
  for i, nats_BT in enumerate(by_segments(config, params)):
    start = max(0, i * T - memory_tokens)
    one = at_once(config, params, STREAM[:, start : (i + 1) * T + 1])
    np.testing.assert_allclose(nats_BT, one[:, -T:], atol=1e-5)


@pytest.mark.parametrize("position", ["rotary", "relative"])
def test_memory_that_holds_the_spans_is_enough(position):
  config = changed(memory_tokens=20, position=position)
  params = with_spans(parameters(config), config, 15.0)  # 15 + R < 20
  found = by_segments(config, params).swapaxes(0, 1).reshape(2, -1)
  np.testing.assert_allclose(found, at_once(config, params, STREAM), atol=1e-5)


@pytest.mark.parametrize("reaches", [[99], [99, 99, 99], [3, 99, 1, 5], [1]])
@pytest.mark.parametrize("memory_tokens", [1, 5, 7, 30])
def test_how_far_logits_depend_on_what_was_before(memory_tokens, reaches):
  """It is found by trying every visible pair of each layer, T = 7."""
  start = needed = 700
  for reach in reversed(reaches):
    needed = min(
      key
      for query in range(needed, start + 7)
      for key in range(query + 1)
      if query - key < reach and key >= query // 7 * 7 - memory_tokens
    )
  found = tokens_before(reaches, memory_tokens, 7)
  assert found == start - needed


@mostly_blocked
@pytest.mark.parametrize("tokens_read", [2**24, 2**26 + 5 * T, 2**31])
def test_positions_stay_exact_however_long_the_stream(
  tokens_read, implementation
):
  config = changed(implementation=implementation)
  params = parameters(config)
  tokens_read = tokens_read // (6 * T) * 6 * T
  far = by_segments(config, params, tokens_read=tokens_read)
  # Then all of the memory is visible. Here it holds zeros.
  near = by_segments(config, params, tokens_read=6 * T)
  np.testing.assert_allclose(far, near, atol=1e-5)


def test_a_stream_starts_again_by_its_count_alone():
  config, params = CONFIG, parameters(CONFIG)
  apply = applied(config)
  memory = init_memory(config, 2, T)
  keys, values = rows(memory)
  spoiled = with_rows(
    memory,
    [jnp.full_like(k, 9.0) for k in keys],
    [jnp.full_like(v, -9.0) for v in values],
  )
  tokens = STREAM[:, :T]
  for state in (memory, spoiled):
    logits, after = apply({"params": params}, tokens, state=state)
    alone = apply({"params": params}, tokens)
    np.testing.assert_allclose(logits, alone, atol=1e-5)
    assert after.tokens_read == T


def test_a_call_changes_the_memory_of_its_own_streams_alone():
  config, params = CONFIG, parameters(CONFIG)
  apply = applied(config)
  memory = init_memory(config, 5, T)
  logits, after = apply(
    {"params": params}, STREAM[:, :T], state=memory.of_streams(2)
  )
  held = (jax.tree.leaves(rows(x)) for x in (memory, after))
  for before, now in zip(*held, strict=True):
    np.testing.assert_array_equal(now[:2], before[:2])
    np.testing.assert_array_equal(now[4:], before[4:])
    assert np.abs(now[2:4, :T]).min() > 0
    assert not now[2:4, T:].any()
  own = init_memory(config, 2, T)
  expected, _ = apply({"params": params}, STREAM[:, :T], state=own)
  np.testing.assert_allclose(logits, expected, atol=1e-6)


@mostly_blocked
def test_earlier_segments_are_visible_but_get_no_gradient(implementation):
  config = changed(implementation=implementation)
  params = parameters(config)
  apply = applied(config)
  _, memory = apply(
    {"params": params}, STREAM[:, :T], state=init_memory(config, 2, T)
  )

  def loss(params, k, v):
    logits, _ = apply(
      {"params": params},
      STREAM[:, T : 2 * T],
      state=with_rows(memory, k, v),
    )
    return logits[:, 0].sum()

  to_keys, to_values = jax.grad(loss, (1, 2))(params, *rows(memory))
  for gradient in (*to_keys, *to_values):
    assert not np.asarray(gradient).any()
  # The first token of a segment does attend to the last of the one before.
  keys, values = rows(memory)
  other = [v.at[:, T - 1].add(1.0) for v in values]
  assert abs(loss(params, keys, other) - loss(params, keys, values)) > 1e-3


def test_a_memory_for_other_calls_is_refused():
  config, params = CONFIG, parameters(CONFIG)
  memory = init_memory(config, 2, T)
  assert memory.layers[0].k[0].shape[1] == ring_rows(5 * T, T) == 6 * T
  with pytest.raises(ValueError, match="144 rows do not serve calls with 23"):
    Transformer(config).apply(
      {"params": params}, STREAM[:, : T - 1], state=memory
    )
  with pytest.raises(ValueError, match="rotary or relative, as learned"):
    changed(position="learned")


def test_one_token_at_a_time():
  """A program that generates would call it so."""
  config = changed(memory_tokens=30)
  params = with_spans(parameters(config), config, 20.0)
  memory = init_memory(config, 2, 1)
  assert memory.layers[0].k[0].shape[1] == 31

  logits = []
  for t in range(60):
    out, memory = applied(config)(
      {"params": params}, STREAM[:, t : t + 1], state=memory
    )
    logits.append(out[:, 0])
  whole = applied(config)({"params": params}, STREAM[:, :60])
  np.testing.assert_allclose(np.stack(logits, 1), whole, atol=1e-4)
