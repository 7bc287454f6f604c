"""A model with masks starts as the one without them that it is made from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_attention import fitted, masks, weights
from adaptive_attention.config import ModelConfig
from adaptive_attention.mask_parameters import mask_params
from adaptive_attention.model import Transformer
from adaptive_attention.weights import WeightsError
from tests import drawn

PLAIN = ModelConfig(
  n_layer=2,
  n_head=4,
  n_kv_head=2,
  width=16,
  context_tokens=20,
  vocab_size=11,
  position="rotary",
  attention="dense",
  implementation="reference",
)
TEXT = np.random.default_rng(0).integers(0, 11, (2, 20))
OPEN = {"ramp": 4.0, "ratio_max": 0.5}


def logits_of(params, config):
  return jax.jit(Transformer(config).apply)({"params": params}, TEXT)


@pytest.fixture(scope="module")
def plain():
  """Returns random parameters of the plain model, and its logits."""
  params = drawn.parameters(PLAIN, scale=0.2)
  return params, logits_of(params, PLAIN)


@pytest.mark.parametrize(
  "changes",
  [
    {"attention": "span"},
    {"attention": "span", "max_span": 400},
    {"attention": "span_wave"},
    {"attention": "span_wave", "harmonics": 0},
    {
      "attention": "span_wave",
      "period": "integer",
      "period_max": 17.0,
      "harmonics": 0,
    },
  ],
)
def test_masks_that_are_added_are_fully_open(plain, changes):
  config = dataclasses.replace(PLAIN, **OPEN | changes)
  settings = dataclasses.asdict(PLAIN)
  params = fitted.adapted(plain[0], settings, config)
  np.testing.assert_array_equal(logits_of(params, config), plain[1])
  shapes = jax.tree.map(jnp.shape, params)
  expected = drawn.shapes(Transformer(config), TEXT)
  assert shapes == jax.tree.map(jnp.shape, expected)
  for mask in mask_params(params, config):
    assert masks.is_open(mask, np.arange(20)).all()
    # A span that is moved by a little more than half a token hides something.
    shorter = masks.Mask(mask.span - 0.6, mask.ramp, mask.wave)
    assert masks.log_weight(shorter, np.arange(20)).min() < 0


def test_masks_that_are_there_stay(plain):
  span = dataclasses.replace(PLAIN, attention="span", **OPEN)
  params = fitted.adapted(plain[0], dataclasses.asdict(PLAIN), span)
  params["block_1"]["attention"]["span_logit"] -= 1.5
  both = dataclasses.replace(span, attention="span_wave")
  found = fitted.adapted(params, dataclasses.asdict(span), both)
  np.testing.assert_array_equal(logits_of(found, both), logits_of(params, span))
  np.testing.assert_array_equal(
    found["block_1"]["attention"]["span_logit"],
    params["block_1"]["attention"]["span_logit"],
  )


@pytest.mark.parametrize(
  ("theirs", "ours", "told"),
  [
    ({}, {"attention": "span", "width": 32}, "model.width=16"),
    ({}, {"attention": "span", "n_kv_head": 4}, "model.n_kv_head=2"),
    ({}, {"attention": "span", "max_span": 19}, "max_span=19"),
    ({}, {"attention": "span_wave"}, "ratio_max=0.25"),
    ({"attention": "span"}, {}, "model.attention='span'"),
    (
      {"attention": "span"},
      {"attention": "span_wave", "ratio_max": 0.5, "ramp": 2.0},
      "model.ramp=32.0",
    ),
  ],
)
def test_models_that_differ_otherwise_are_refused(plain, theirs, ours, told):
  saved = dataclasses.replace(PLAIN, **theirs)
  params = plain[0]
  if theirs:
    params = fitted.adapted(params, dataclasses.asdict(PLAIN), saved)
  with pytest.raises(WeightsError, match=told) as error:
    fitted.adapted(
      params, dataclasses.asdict(saved), dataclasses.replace(PLAIN, **ours)
    )
  assert "\n" not in str(error.value)


def test_a_file_without_masks_serves_too(plain, tmp_path):
  weights.save(tmp_path / "a.safetensors", plain[0], PLAIN, 3)
  config = dataclasses.replace(PLAIN, attention="span", **OPEN)
  params = weights.load(tmp_path / "a.safetensors", config)
  np.testing.assert_array_equal(logits_of(params, config), plain[1])
