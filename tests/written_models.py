"""One text, and models of all kinds that go on with it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_attention.config import ModelConfig
from adaptive_attention.model import Transformer
from tests import drawn

LENGTH = 90


CONFIG = ModelConfig(
  n_layer=2,
  n_head=4,
  width=32,
  context_tokens=LENGTH,
  max_span=64,
  ramp=4.0,
  position="rotary",
  attention="span",
  implementation="reference",
)


TEXT = np.random.default_rng(0).integers(0, 256, (3, LENGTH))


SPANS = np.array([0.001, 2.0, 11.5, 30.25])


def changed(**changes):
  return dataclasses.replace(CONFIG, **changes)


def parameters(config):
  """Returns parameters, none at zero, with spans from short to long.

  The spans have another order in each layer.
  """
  params = drawn.parameters(config, scale=0.3)
  if config.attention == "dense":
    return params
  for i in range(config.n_layer):
    attention = params[f"block_{i}"]["attention"]
    share_H = np.roll(SPANS, i) / config.max_span
    attention["span_logit"] = jnp.asarray(
      np.log(share_H / (1 - share_H)), jnp.float32
    )
    if config.attention == "span_wave":
      # Waves of one, two and all residues, and of three periods.
      attention["period_logit"] = jnp.array([-9.0, 0.7, -0.7, 0.2])
      attention["ratio_logit"] = jnp.array([-2.0, -1.0, -9.0, 9.0])
  return params


def all_logits(config, params, text=TEXT):
  apply = jax.jit(Transformer(config).apply)
  return np.asarray(apply({"params": params}, text))


CLOSED = {
  "attention": "span_wave",
  "harmonics": 5,
  "period_min": 30.0,
  "period_max": 64.0,
}


MODELS = {
  "dense": {"attention": "dense"},
  "dense, relative": {"attention": "dense", "position": "relative"},
  "span": {},
  "span, relative": {"position": "relative"},
  "span, learned": {"position": "learned"},
  "real waves": {"attention": "span_wave"},
  "integer waves": {"attention": "span_wave", "period": "integer"},
  "integer waves, relative": {
    "attention": "span_wave",
    "period": "integer",
    "position": "relative",
    "harmonics": 0,
  },
  # Heads of keys serve two heads, or all four.
  "grouped integer waves": {
    "attention": "span_wave",
    "period": "integer",
    "position": "relative",
    "n_kv_head": 2,
  },
  "grouped spans": {"n_kv_head": 1},
  "grouped, dense": {"attention": "dense", "n_kv_head": 2},
  # Texts that are longer than the context of layers without spans.
  "long, dense": {"attention": "dense", "context_tokens": 24},
  "long, dense, relative": {
    "attention": "dense",
    "position": "relative",
    "context_tokens": 20,
    "memory_tokens": 7,
  },
  # The series of a long period hides a query even from itself.
  "closed waves": CLOSED,
  "closed integer waves": CLOSED | {"period": "integer", "vocab_size": 300},
}


@functools.cache
def model_of(name):
  """Returns (config, params, logits of TEXT) of one of MODELS."""
  config = changed(**MODELS[name])
  params = parameters(config)
  return config, params, all_logits(config, params)
