"""Logits become lengths, and lengths become logits again."""

import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_attention import ModelConfig, mask_params
from adaptive_attention.mask_parameters import (
  hardened,
  to_length,
  to_logit,
  with_lengths,
)
from tests import drawn

CONFIG = ModelConfig(n_layer=2, n_head=3, width=12, context_tokens=40)


def parameters(config=CONFIG):
  return drawn.parameters(config)


@pytest.mark.parametrize(("low", "high"), [(0, 512), (2, 8), (-0.25, 0.25)])
def test_lengths_come_back(low, high):
  inside = np.linspace(low, high, 9)[1:-1]
  found = to_length(jnp.asarray(to_logit(inside, low, high)), low, high)
  np.testing.assert_allclose(found, inside, rtol=1e-5, atol=1e-6)
  logit = np.array([-4.0, 0.0, 2.5], np.float32)
  back = to_logit(
    np.asarray(to_length(jnp.asarray(logit), low, high)), low, high
  )
  np.testing.assert_allclose(back, logit, atol=1e-4)


def test_lengths_at_and_beyond_their_bounds_have_logits():
  logit = to_logit(np.array([-3.0, 0.0, 100.0, 200.0]), 0, 100)
  assert logit.dtype == np.float32
  assert np.isfinite(logit).all()
  np.testing.assert_allclose(
    to_length(jnp.asarray(logit), 0, 100), [0, 0, 100, 100], atol=1e-4
  )


def test_other_lengths_are_set_by_name():
  changed = with_lengths(
    parameters(),
    CONFIG,
    lambda name, length: length + 3 if name == "span_logit" else length,
  )
  for before, after in zip(
    mask_params(parameters(), CONFIG), mask_params(changed, CONFIG)
  ):
    np.testing.assert_allclose(after.span, before.span + 3, rtol=1e-5)
    np.testing.assert_array_equal(after.wave.period, before.wave.period)


def test_hardened_masks_are_whole():
  whole, config = hardened(parameters(), CONFIG)
  assert config.period == "integer"
  for mask in mask_params(whole, config):
    for length in (mask.span, mask.wave.period):
      np.testing.assert_allclose(length, np.round(length), atol=1e-4)


def test_parameters_of_other_settings_are_named():
  with pytest.raises(ValueError, match=r"span_logit of the shape \(3,\)"):
    mask_params(parameters(), ModelConfig(n_head=4, width=12))
  spans = parameters(ModelConfig(n_head=3, width=12, attention="span"))
  with pytest.raises(ValueError, match="period_logit of the shape None"):
    mask_params(spans, ModelConfig(n_head=3, width=12))
  with pytest.raises(ValueError, match="hold no attention layer with spans"):
    mask_params({"norm": {"scale": jnp.ones(3)}}, CONFIG)


def test_the_longest_span_is_the_context_unless_it_is_given():
  assert ModelConfig().max_span == ModelConfig().context_tokens
  assert ModelConfig(context_tokens=96).max_span == 96
  assert ModelConfig(context_tokens=96, max_span=7).max_span == 7
  zero = drawn.normal(parameters(), scale=0.0)
  for mask in mask_params(zero, CONFIG):
    np.testing.assert_allclose(mask.span, 20.0)  # half of the context
