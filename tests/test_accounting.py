"""Counts agree with counting one by one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_attention import accounting, masks
from adaptive_attention.attention.layout import BLOCK
from adaptive_attention.config import ModelConfig
from adaptive_attention.mask_parameters import mask_params
from adaptive_attention.model import Transformer
from adaptive_attention.training import console
from tests import drawn

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
  config = dataclasses.replace(CONFIG, implementation="reference")
  macs = accounting.attention_macs_per_token([mask] * 3, config, T)
  K = 8
  assert macs == {
    "dense": 3 * 2 * 2 * K * (T + 1) / 2,
    "open": 3 * 2 * K * (1 + (T + 1) / 2),
    "computed": 3 * 2 * 2 * K * T,
  }


@pytest.mark.parametrize(
  ("implementation", "T", "reason"),
  [
    ("blocked", 20, "whole blocks of 64 x 64"),
    ("reference", 20, "pairs with later keys too"),
    ("blocked", 1024, None),
  ],
)
def test_the_text_says_why_more_is_computed_than_dense(
  implementation, T, reason
):
  config = dataclasses.replace(CONFIG, implementation=implementation)
  masks_ = [masks.Mask(jnp.array([0.0, 9.5]), 4.0)] * 3
  macs = accounting.attention_macs_per_token(masks_, config, T)
  text = console.macs_text(macs, accounting.attention_choice(config))
  assert (macs["computed"] > macs["dense"]) == (reason is not None)
  assert ("more than dense" in text) == (reason is not None)
  assert (reason or "multiply-adds") in text


@pytest.mark.parametrize("attention", ["dense", "span", "span_wave"])
def test_parameters_are_those_of_the_model(attention):
  config = dataclasses.replace(CONFIG, attention=attention)
  params = drawn.parameters(config)
  D, V, T, L, H = 16, 256, 20, 3, 2
  logits = {"dense": 0, "span": 1, "span_wave": 3}[attention]
  expected = V * D + D + L * (12 * D**2 + 2 * D + T * D + logits * H)
  assert accounting.parameter_count(params) == expected
  assert len(mask_params(params, config)) == L


def test_flops_are_those_the_compiler_counts():
  """They may differ by what norms, activations and the loss add."""
  config = dataclasses.replace(
    CONFIG,
    width=128,
    context_tokens=64,
    attention="dense",
    implementation="reference",
  )
  model = Transformer(config)
  tokens = jnp.zeros((2, 64), int)
  params = {"params": drawn.parameters(config)}
  cost = jax.jit(model.apply).lower(params, tokens).compile().cost_analysis()
  # The reference computes all T^2 pairs where the formula counts half.
  extra = 2 * 128 * 3 * (64 - 65 / 2)
  forward = accounting.train_flops_per_token(config) / 3 + 2 * extra
  assert 1.0 < cost["flops"] / (forward * 2 * 64) < 1.15


def blocks_with_open_pairs(mask, T, block):
  """Returns (H,) the pairs of all blocks of the band that hold an open pair.

  They are found by checking every pair.
  """
  d_TS = np.arange(T)[:, None] - np.arange(T)
  open_HTS = np.asarray(masks.is_open(mask, np.abs(d_TS))) & (d_TS >= 0)
  padded = -(-T // block) * block
  whole = np.zeros((len(open_HTS), padded, padded), bool)
  whole[:, :T, :T] = open_HTS
  cut = whole.reshape(
    len(whole), padded // block, block, padded // block, block
  )
  return cut.any((2, 4)).sum((1, 2)) * block**2


@pytest.mark.parametrize("T", [1, 64, 200, 700])
def test_the_band_computes_just_the_blocks_that_hold_an_open_pair(T):
  spans = jnp.array([0.0, 3.0, 50.0, 100.0, 333.3, 1e4])
  mask = masks.Mask(spans, 8.0)
  np.testing.assert_array_equal(
    accounting.computed_pairs(mask, T, "blocked"),
    blocks_with_open_pairs(mask, T, BLOCK),
  )


@pytest.mark.parametrize("T", [24, 130])
@pytest.mark.parametrize("memory", [1, 100, 300])
def test_with_a_memory_both_are_counted_one_by_one(T, memory):
  """Keys stand at x = -memory .. T - 1, and blocks begin at multiples of 64."""
  mask = masks.Mask(jnp.array([0.0, 30.0, 250.5, 1e4]), 8.0)
  x_S = np.arange(-memory, T)
  d_TS = np.arange(T)[:, None] - x_S
  open_HTS = np.asarray(masks.is_open(mask, np.abs(d_TS))) & (d_TS >= 0)
  np.testing.assert_array_equal(
    accounting.open_pairs(mask, T, memory), open_HTS.sum((1, 2))
  )
  block = BLOCK
  touched = np.zeros((4, 1 + T // block, 20), bool)
  for h, t, s in np.argwhere(open_HTS):
    touched[h, t // block, 10 + x_S[s] // block] = True
  np.testing.assert_array_equal(
    accounting.computed_pairs(mask, T, "blocked", memory),
    touched.sum((1, 2)) * block**2,
  )
  # The multiply-adds of a token: 2 K a pair.
  macs = accounting.attention_macs_per_token([mask], CONFIG, T, memory)
  assert macs["open"] == 16 * open_HTS.sum() / T
  assert macs["computed"] == 16 * touched.sum() * block**2 / T
  config = dataclasses.replace(CONFIG, n_layer=1, n_head=4, width=32)
  dense = accounting.attention_macs_per_token([mask], config, T, memory)
  assert dense["dense"] == 16 * 4 * (d_TS >= 0).sum() / T


@pytest.mark.parametrize("T", [700, 1025, 1500])
def test_the_stride_computes_just_the_blocks_that_hold_an_open_pair(T):
  """Queries and keys of each residue class have blocks of their own."""
  block, P = BLOCK, 4
  wave = masks.Wave(jnp.array([4.0]), jnp.array([-0.2]), integer=True)
  mask = masks.Mask(jnp.array([1e4]), 8.0, wave)
  d_TS = np.arange(T)[:, None] - np.arange(T)
  open_TS = np.asarray(masks.is_open(mask, np.abs(d_TS)))[0] & (d_TS >= 0)
  expected = 0
  for a in range(P):
    for c in range(P):
      part = open_TS[a::P, c::P]
      size = -(-max(part.shape) // block) * block
      whole = np.zeros((size, size), bool)
      whole[: part.shape[0], : part.shape[1]] = part
      cut = whole.reshape(size // block, block, size // block, block)
      expected += cut.any((1, 3)).sum() * block**2
  computed = accounting.computed_pairs(mask, T, "blocked")
  assert computed[0] < blocks_with_open_pairs(mask, T, block)[0]
  assert computed[0] == expected
