"""The modules are causal and local, serve other models, and refuse nonsense."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_attention import masks
from adaptive_attention.config import ModelConfig
from adaptive_attention.layer import AdaptiveSelfAttention
from adaptive_attention.mask_bounds import WaveBounds
from adaptive_attention.mask_parameters import mask_params, regularizer
from adaptive_attention.model import Transformer
from adaptive_attention.parameters import MASK_PARAMETERS
from adaptive_attention.training.steps import cross_entropy
from tests import drawn

SMALL = ModelConfig(
  n_layer=2,
  n_head=2,
  width=16,
  context_tokens=24,
  max_span=24,
  ramp=4.0,
  span_coef=1e-3,
  implementation="reference",
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 24)))


def small(**changes):
  return dataclasses.replace(SMALL, **changes)


def init(config, tokens=TOKENS):
  return jax.jit(Transformer(config).init)(jax.random.key(0), tokens)["params"]


@pytest.mark.parametrize(
  ("attention", "position"),
  [
    ("dense", "learned"),
    ("span", "learned"),
    ("span_wave", "learned"),
    ("span_wave", "rotary"),
  ],
)
def test_no_logit_depends_on_a_later_token(attention, position):
  config = small(attention=attention, position=position)
  params = drawn.parameters(config)
  model = Transformer(config)
  logits = model.apply({"params": params}, TOKENS)
  for t in (1, 12, 23):
    changed = TOKENS.at[:, t].set((TOKENS[:, t] + 1) % 256)
    after = model.apply({"params": params}, changed)
    np.testing.assert_array_equal(after[:, :t], logits[:, :t])
    assert not np.array_equal(after[:, t:], logits[:, t:])


def test_no_gradient_flows_to_tokens_beyond_the_reach():
  module = AdaptiveSelfAttention(num_heads=2, max_span=24, ramp=4.0)
  x_BTD = jax.random.normal(jax.random.key(0), (1, 24, 16))
  params = drawn.normal(drawn.shapes(module, x_BTD))
  # z = 24 sigmoid(logit) = 6 for both heads; with R = 4, d = 9 is the last.
  params["span_logit"] = jnp.full(2, math.log(6 / 18))

  def last(x_BTD):
    return module.apply({"params": params}, x_BTD)[0, -1].sum()

  reached = np.abs(jax.grad(last)(x_BTD))[0].max(-1) > 0
  np.testing.assert_array_equal(np.flatnonzero(reached), np.arange(14, 24))


def test_dense_is_what_the_masks_leave_when_all_is_open():
  config = small(attention="span_wave", ratio_max=0.5, period_max=8.0)
  params = drawn.parameters(config, scale=0.3)
  wide_open = jax.tree_util.tree_map_with_path(
    lambda path, x: (
      jnp.full_like(x, 40.0) if path[-1].key in MASK_PARAMETERS else x
    ),
    params,
  )
  dense = jax.tree.map(lambda x: x, wide_open)
  for i in range(config.n_layer):
    for name in MASK_PARAMETERS:
      del dense[f"block_{i}"]["attention"][name]
  adaptive = Transformer(config).apply({"params": wide_open}, TOKENS)
  plain = Transformer(small(attention="dense")).apply({"params": dense}, TOKENS)
  np.testing.assert_allclose(adaptive, plain, atol=1e-5)


def test_initial_parameters():
  config = small(n_layer=8, n_head=16, width=64)
  params = init(config)
  layers = mask_params(params, config)
  assert len(layers) == 8
  for mask in layers:
    np.testing.assert_allclose(mask.span, 12.0)
    np.testing.assert_allclose(mask.wave.ratio, 0.0, atol=1e-7)
  periods = np.concatenate([mask.wave.period for mask in layers])
  # Uniform in (2, 8): the mean of 128 draws is 5 to 4 standard errors.
  assert abs(periods.mean() - 5) < 4 * 6 / math.sqrt(12 * 128)
  assert periods.min() > 2
  assert periods.max() < 8
  block = params["block_0"]
  for kernel, std in (
    (block["attention"]["qkv"]["kernel"], 0.02),
    (block["attention"]["out"]["kernel"], 0.02 / 4),
    (block["mlp"]["down"]["kernel"], 0.02 / 4),
    (params["position_3"], 0.02),
  ):
    np.testing.assert_allclose(kernel.std(), std, rtol=0.1)


def test_the_ratio_starts_at_zero_between_unequal_bounds():
  config = small(ratio_max=0.5)
  mask = mask_params(init(config), config)[0]
  np.testing.assert_allclose(mask.wave.ratio, 0.0, atol=1e-7)


def test_dropout_needs_train_and_a_key_and_follows_it():
  config = small(dropout=0.3)
  params = {"params": init(config)}
  apply = jax.jit(Transformer(config).apply, static_argnames="train")
  plain = apply(params, TOKENS)
  np.testing.assert_array_equal(plain, apply(params, TOKENS))
  drawn = [
    apply(params, TOKENS, train=True, rngs={"dropout": jax.random.key(i)})
    for i in (0, 0, 1)
  ]
  np.testing.assert_array_equal(drawn[0], drawn[1])
  assert not np.array_equal(drawn[0], drawn[2])
  assert not np.array_equal(drawn[0], plain)


def test_bfloat16_computes_near_float32_and_returns_float32():
  """They differ by a few roundings, each of 2^-9 of the largest logit."""
  params = {"params": drawn.parameters(SMALL, scale=0.3)}
  exact = Transformer(SMALL).apply(params, TOKENS)
  rounded = Transformer(small(dtype="bfloat16")).apply(params, TOKENS)
  assert rounded.dtype == jnp.float32
  error = np.abs(rounded - exact).max() / np.abs(exact).max()
  assert 2**-12 < error < 6 * 2**-9


def test_biases():
  config = small(bias=True)
  params = init(config)
  assert params["block_0"]["mlp"]["up"]["bias"].shape == (64,)
  assert params["norm"]["bias"].shape == (16,)
  assert "bias" not in init(SMALL)["norm"]


LAYER = AdaptiveSelfAttention(
  num_heads=2, max_span=100, ramp=4.0, span_coef=1e-3, wave=WaveBounds()
)


class SomebodysModel(nn.Module):
  """A model that is not ours, with attention layers that are."""

  @nn.compact
  def __call__(self, x_BTD):
    for _ in range(12):
      x_BTD += LAYER.copy()(nn.LayerNorm()(x_BTD))
    return nn.Dense(3)(x_BTD)


def test_the_module_and_the_penalty_serve_other_models():
  x_BTD = jnp.ones((1, 7, 32))
  params = drawn.normal(drawn.shapes(SomebodysModel(), x_BTD))
  for i in range(12):
    params[f"AdaptiveSelfAttention_{i}"]["span_logit"] = jnp.full(2, i / 10)
  spans = [float(mask.span[0]) for mask in mask_params(params, LAYER)]
  assert spans == sorted(spans)  # layer 2 before layer 10
  assert len(spans) == 12
  expected = sum(masks.penalty(m) for m in mask_params(params, LAYER))
  np.testing.assert_allclose(
    regularizer(params, LAYER), 1e-3 * expected, rtol=1e-6
  )
  grads = jax.grad(regularizer)(params, LAYER)
  assert (grads["AdaptiveSelfAttention_3"]["span_logit"] > 0).all()


def test_dense_layers_have_open_masks_and_no_penalty():
  config = small(attention="dense")
  params = init(config)
  layers = mask_params(params, config)
  assert len(layers) == 2
  assert all(masks.open_share(mask, 24).min() == 1 for mask in layers)
  assert regularizer(params, config) == 0


def test_rotary_positions_are_relative_and_have_no_longest_context():
  """Two parts of a text agree on tokens whose whole reach is in both."""
  config = small(attention="span", position="rotary", n_layer=1)
  params = drawn.parameters(config)
  assert not [name for name in params if name.startswith("position")]
  # With z = 6 and R = 4 a query attends over nine earlier bytes.
  params["block_0"]["attention"]["span_logit"] = jnp.full(2, math.log(6 / 18))
  tokens = jnp.tile(TOKENS, (1, 2))[:, :40]
  apply = jax.jit(Transformer(config).apply)
  whole = apply({"params": params}, tokens)
  tail = apply({"params": params}, tokens[:, 15:])
  np.testing.assert_allclose(tail[:, 9:], whole[:, 24:], atol=1e-4)
  assert np.abs(tail[:, :8] - whole[:, 15:23]).max() > 0.1
  # Positions do act: the order of earlier bytes matters.
  swapped = tokens.at[:, 30].set(tokens[:, 31]).at[:, 31].set(tokens[:, 30])
  other = apply({"params": params}, swapped)
  assert np.abs(other[:, 33] - whole[:, 33]).max() > 1e-2


def test_spans_start_at_their_share():
  config = small(span_init=0.125)
  for mask in mask_params(init(config), config):
    np.testing.assert_allclose(mask.span, 3.0, rtol=1e-6)


def test_longer_than_the_context_is_refused():
  with pytest.raises(ValueError, match="25 tokens are more than"):
    Transformer(SMALL).init(jax.random.key(0), jnp.zeros((1, 25), int))


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("n_layer", 0),
    ("n_head", -1),
    ("n_kv_head", -1),
    ("n_kv_head", 3),
    ("width", 15),
    ("context_tokens", 0),
    ("attention", "sparse"),
    ("period", "rational"),
    ("dtype", "float16"),
    ("implementation", "fast"),
    ("max_span", -1),
    ("ramp", 0.0),
    ("ramp", math.nan),
    ("span_coef", -1.0),
    ("span_coef", math.inf),
    ("dropout", 1.0),
    ("harmonics", -1),
    ("period_min", 0.5),
    ("period_max", 2.0),
    ("ratio_min", -0.3),
    ("ratio_max", 0.6),
    ("position", "absolute"),
    ("span_init", 0.0),
    ("span_init", 1.0),
  ],
)
def test_impossible_settings_are_named(name, value):
  with pytest.raises(ValueError, match=rf"model\.{name}=.* expected") as error:
    small(**{name: value})
  assert "\n" not in str(error.value)


def test_heads_of_an_odd_width_cannot_be_turned():
  with pytest.raises(ValueError, match="odd width"):
    small(width=18, n_head=2, position="rotary")


def test_cross_entropy_is_in_nats():
  logits = jnp.zeros((1, 2, 256), jnp.bfloat16)
  nats = cross_entropy(logits, jnp.array([[1, 200]]))
  np.testing.assert_allclose(nats, math.log(256), rtol=1e-6)
  assert nats.dtype == jnp.float32
