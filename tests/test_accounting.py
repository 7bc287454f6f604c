"""Counts against counting."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_attention import accounting, masks
from adaptive_attention.model import ModelConfig, Transformer, mask_params

CONFIG = ModelConfig(
  n_layer=3, n_head=2, width=16, context_tokens=20, max_span=20, ramp=4.0
)


@pytest.mark.parametrize("T", [1, 7, 20])
@pytest.mark.parametrize("integer", [False, True])
def test_open_pairs_are_counted_one_by_one(T, integer):
  wave = masks.Wave(
    jnp.array([2.0, 3.7]), jnp.array([0.0, -0.2]), integer=integer
  )
  mask = masks.Mask(jnp.array([0.0, 9.5]), 4.0, wave)
  counted = np.zeros(2, int)
  for t in range(T):
    for s in range(t + 1):
      counted += np.asarray(masks.is_open(mask, t - s))
  np.testing.assert_array_equal(accounting.open_pairs(mask, T), counted)


def test_multiply_adds_per_token():
  T = 20
  mask = masks.Mask(jnp.array([0.0, 1e6]), 1.0)  # itself alone, and all
  macs = accounting.attention_macs_per_token([mask] * 3, CONFIG, T)
  K = 8
  assert macs == {
    "dense": 3 * 2 * 2 * K * (T + 1) / 2,
    "open": 3 * 2 * K * (1 + (T + 1) / 2),
    "computed": 3 * 2 * 2 * K * T,
  }


@pytest.mark.parametrize("attention", ["dense", "span", "span_wave"])
def test_parameters_are_those_of_the_model(attention):
  config = dataclasses.replace(CONFIG, attention=attention)
  params = Transformer(config).init(jax.random.key(0), jnp.zeros((1, 3), int))
  D, V, T, L, H = 16, 256, 20, 3, 2
  logits = {"dense": 0, "span": 1, "span_wave": 3}[attention]
  expected = V * D + D + L * (12 * D**2 + 2 * D + T * D + logits * H)
  assert accounting.parameter_count(params["params"]) == expected
  assert len(mask_params(params["params"], config)) == L


def test_flops_are_those_the_compiler_counts():
  """Within what norms, activations and the loss add to the products."""
  config = dataclasses.replace(
    CONFIG, width=128, context_tokens=64, attention="dense"
  )
  model = Transformer(config)
  tokens = jnp.zeros((2, 64), int)
  params = jax.jit(model.init)(jax.random.key(0), tokens)
  cost = jax.jit(model.apply).lower(params, tokens).compile().cost_analysis()
  # The reference computes all T^2 pairs where the formula counts half.
  extra = 2 * 128 * 3 * (64 - 65 / 2)
  forward = accounting.train_flops_per_token(config, 64) / 3 + 2 * extra
  assert 1.0 < cost["flops"] / (forward * 2 * 64) < 1.15
