"""Weights that a GPU's kernel computes, far from the first token."""

import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_attention.attention.pallas_gpu_weights import Pairs, Spans
from adaptive_attention.masks import Mask

RAMP = 32.0


@pytest.mark.parametrize("span", [0.0, 7.3, 50.25, 1e9, np.inf])
@pytest.mark.parametrize("start", [0, 100_000, 8_000_000])
def test_spans_weigh_the_same_at_any_position(span, start):
  x_q, x_k = np.ogrid[start : start + 64, start - 64 : start + 64]
  exists = x_k >= start - 60
  pairs = Pairs(*map(jnp.asarray, (x_q, x_k, exists)), rho=0, is_full=False)
  mask = Mask(span=None, ramp=RAMP)
  weights = Spans(None, mask, 0, [jnp.float32([[span]])], h=0)
  logits, share = weights.weigh(jnp.full((64, 128), 3.0), pairs)

  distance = (x_q - x_k).astype(np.float64)
  left = np.float32(RAMP + span) - distance  # rounded once, as in masks.py
  exact = np.clip(left / RAMP, 0, 1)
  is_open = (distance >= 0) & (exact > 1e-6) & exists
  np.testing.assert_array_equal(logits, np.where(is_open, 3.0, -np.inf))
  np.testing.assert_allclose(share[is_open], exact[is_open], rtol=1e-6)

  (slope,) = weights.slopes(pairs)
  falls = is_open & (left <= RAMP)
  expected = np.divide(1, left, where=falls, out=0 * exact)
  np.testing.assert_allclose(slope[is_open], expected[is_open], rtol=1e-5)
