"""A memory of what each head reaches, beside one that holds all for all."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_attention.mask_parameters import mask_params, with_lengths
from adaptive_attention.model import Transformer
from adaptive_attention.segment_memory import full_groups, memory_groups
from adaptive_attention.state import init_memory
from adaptive_attention.training.steps import cross_entropy
from tests import drawn, test_state
from tests.test_state import T

CONFIG = dataclasses.replace(
  test_state.CONFIG,
  n_layer=1,
  n_head=4,
  n_kv_head=4,
  dropout=0.3,
)
SHORT_AND_LONG = [[20.5, 0.0, 90.0, 3.0]]
STREAM = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 8 * T + 1)))


def parameters(config, spans_LH):
  """Returns parameters with these spans."""
  layers = iter(spans_LH)

  def change(name, length):
    return np.array(next(layers)) if name == "span_logit" else length

  return with_lengths(drawn.parameters(config, scale=0.3), config, change)


def groups_of(params, config, held=None):
  return memory_groups(mask_params(params, config), config, T, held)


@functools.cache
def step(config):
  """Returns a compiled function of (params, state, tokens, key).

  It returns ((loss, state), gradient).
  """

  def loss(params, state, tokens, key):
    logits, state = Transformer(config).apply(
      {"params": params},
      tokens[:, :-1],
      train=True,
      state=state,
      rngs={"dropout": key},
    )
    return cross_entropy(logits, tokens[:, 1:]).mean(), state

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def read(config, params, state, segments):
  """Returns (losses and gradients of segments, the state after them)."""
  found = []
  for i in segments:
    tokens = STREAM[:, i * T : (i + 1) * T + 1]
    key = jax.random.key(i)
    (loss, state), gradient = step(config)(params, state, tokens, key)
    found.append((loss, gradient))
  return found, state


def check_equal(found, expected):
  for (loss, gradient), (other, exact) in zip(found, expected, strict=True):
    np.testing.assert_allclose(loss, other, rtol=1e-6)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(exact))
    for x, y in zip(*map(jax.tree.leaves, (gradient, exact)), strict=True):
      np.testing.assert_allclose(x, y, atol=1e-6 * scale)


@pytest.mark.parametrize(
  "changes",
  [
    {"implementation": "auto", "n_kv_head": 2, "position": "relative"},
    *(
      pytest.param(changes, marks=pytest.mark.every_case)
      for changes in (
        {},
        {"implementation": "auto"},
        {"implementation": "auto", "attention": "span_wave"},
        {"implementation": "auto", "attention": "span_wave"}
        | {"period": "integer"},
      )
    ),
  ],
)
def test_it_is_that_of_full_rings(changes):
  """Losses, gradients and draws of dropout are the same."""
  config = dataclasses.replace(CONFIG, **changes)
  params = parameters(config, SHORT_AND_LONG * config.n_layer)
  groups = groups_of(params, config)
  assert all(len(layer) > 1 for layer in groups)
  whole = init_memory(config, 2, T)
  assert whole.groups == full_groups(config, T)
  part = init_memory(config, 2, T, groups)
  assert part.nbytes < 0.75 * whole.nbytes
  expected, _ = read(config, params, whole, range(8))
  found, _ = read(config, params, part, range(8))
  check_equal(found, expected)


def test_dense_attention_keeps_all():
  config = dataclasses.replace(CONFIG, attention="dense")
  params = drawn.parameters(config)
  assert groups_of(params, config) == full_groups(config, T)


GROWN = [[21.0, 20.0, 110.0, 3.0]]


@pytest.mark.parametrize(
  ("before", "after"), [(SHORT_AND_LONG, GROWN), (GROWN, SHORT_AND_LONG)]
)
def test_rings_made_anew_hold_what_they_held(before, after):
  """A ring has room for a segment more than its heads reach, so that a head
  which reaches up to T tokens further misses nothing."""
  before, after = (parameters(CONFIG, spans) for spans in (before, after))
  whole = init_memory(CONFIG, 2, T)
  part = init_memory(CONFIG, 2, T, groups_of(before, CONFIG))
  for params, segments in ((before, range(5)), (after, range(5, 8))):
    read_so_far = int(part.tokens_read)
    held = [layer.held(read_so_far) for layer in part.layers]
    groups = groups_of(params, CONFIG, held)
    part = part.regrouped(groups, T)
    expected, whole = read(CONFIG, params, whole, segments)
    found, part = read(CONFIG, params, part, segments)
    check_equal(found, expected)
    for layer in part.layers:
      assert not any(layer.first_kept)


def test_what_was_not_kept_does_not_exist_until_as_much_is_read():
  """For a head that suddenly reaches far a text began with what it held."""
  config = dataclasses.replace(CONFIG, memory_margin=0.0, dropout=0.0)
  short = parameters(config, [[0.5, 0.5, 0.5, 90.0]])
  long = parameters(config, [[0.5, 110.0, 0.5, 90.0]])
  state = init_memory(config, 2, T, groups_of(short, config))
  _, state = read(config, short, state, range(4))
  (held,) = [layer.held(4 * T) for layer in state.layers]
  assert held[:3] == [5 + T - 1] * 3  # ceil(z + R) + T - 1
  groups = groups_of(long, config, [held])
  state = state.regrouped(groups, T)
  # A group of its own for what it lacks, which no other head has to.
  (alone,) = [i for i, group in enumerate(groups[0]) if group.heads == (1,)]
  assert int(state.layers[0].first_kept[alone]) == 4 * T - held[1]
  assert sum(map(int, state.layers[0].first_kept)) == 4 * T - held[1]

  def oracle(first):
    """Returns the loss if tokens before `first` do not exist for head 1."""
    whole = init_memory(config, 2, T)
    _, whole = read(config, long, whole, range(4))
    (layer,) = whole.layers
    apart = tuple(
      groups[0][0]._replace(heads=heads, rows=layer.groups[0].rows)
      for heads in ((0, 2, 3), (1,))
    )
    whole = whole.regrouped((apart,), T)
    (layer,) = whole.layers
    layer = layer.replace(first_kept=(jnp.uint32(0), jnp.uint32(first)))
    return read(config, long, whole.replace(layers=(layer,)), range(4, 6))[0]

  found, after = read(config, long, state, range(4, 6))
  check_equal(found, oracle(4 * T - held[1]))
  assert abs(found[0][0] - oracle(0)[0][0]) > 1e-4
  # Streams that start again have all that they then read.
  _, after = read(config, long, after.at(jnp.uint32(0)), range(1))
  assert not any(map(int, after.layers[0].first_kept))


def test_first_key_of_a_head_by_a_text_that_begins_there():
  """The oracle above, in turn: one head of one layer, no keys before."""
  config = dataclasses.replace(
    CONFIG, n_head=1, n_kv_head=1, memory_margin=0.0, dropout=0.0
  )
  params = parameters(config, [[110.0]])
  state = init_memory(config, 2, T)
  _, state = read(config, params, state, range(4))
  (layer,) = state.layers
  first = 4 * T - 30
  layer = layer.replace(first_kept=(jnp.uint32(first),))
  state = state.replace(layers=(layer,))
  tokens = STREAM[:, 4 * T : 5 * T]
  apply = jax.jit(Transformer(config).apply)
  found, _ = apply({"params": params}, tokens, state=state)
  whole = apply({"params": params}, STREAM[:, first : 5 * T])
  np.testing.assert_allclose(found, whole[:, -T:], atol=1e-5)
