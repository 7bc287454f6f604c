"""Attention weights against distance, against weights of all pairs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_attention.attention import attend
from adaptive_attention.masks import Mask, Wave, log_weight
from adaptive_attention.model import Transformer
from adaptive_attention.report import attention_mass
from adaptive_attention.report.attention_mass import Watched
from tests import drawn
from tests.pairs import in_turn
from tests.report.test_ablation import CONFIG
from tests.training.test_evaluator import DATA

SPAN = Mask(jnp.array([3.0, 60.0, 0.0, 17.5]), 8.0)
WAVE = Mask(
  SPAN.span,
  8.0,
  Wave(jnp.array([2.0, 4.0, 8.0, 3.0]), jnp.array([0, -0.25, 0.1, 0.2])),
)


def all_weights(q_THK, k_TGK, mask, relative_RK):
  """Returns weights_HTS in float64, of all pairs."""
  T, H, K = q_THK.shape
  k_THK = np.repeat(k_TGK, H // k_TGK.shape[1], axis=1)
  logits = np.einsum("thk,shk->hts", *np.float64((q_THK, k_THK)))
  distance = np.arange(T)[:, None] - np.arange(T)
  if relative_RK is not None:
    of_R = np.einsum("thk,rk->htr", *map(np.float64, (q_THK, relative_RK)))
    for t, s in np.argwhere((distance >= 0) & (distance < len(relative_RK))):
      logits[:, t, s] += of_R[:, t, t - s]
  logits /= K**0.5
  if mask is not None:
    bias_HS = np.float64(log_weight(mask, jnp.arange(T)))
    logits += bias_HS[:, np.abs(distance)]
  weights = np.where(distance >= 0, np.exp(logits), 0)
  return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)


@pytest.mark.parametrize(
  ("T", "kind"),
  in_turn(
    [1, 2, 63, 64, 65, 130], [(WAVE, 200, 1), (SPAN, 9, 2), (None, 0, 4)]
  ),
)
def test_mass_is_that_of_all_pairs(T, kind):
  mask, R, G = kind
  random = np.random.default_rng(T)
  q, k, v = (random.normal(size=(1, T, n, 8)) for n in (4, G, G))
  q, k, v = (jnp.asarray(x, jnp.float32) for x in (2 * q, k, v))
  relative = jnp.asarray(random.normal(size=(R, 8)), jnp.float32) if R else None
  empty = Watched(jnp.zeros((4, T)), jnp.zeros((4, T)))
  out, found = jax.jit(
    lambda q, k, v, mask: empty.attend(
      q, k, v, mask, tokens_read=0, relative_RK=relative
    )
  )(q, k, v, mask)
  plain = jax.jit(
    lambda q, k, v, mask: attend(q, k, v, mask, relative_RK=relative)
  )(q, k, v, mask)
  np.testing.assert_allclose(out, plain, atol=1e-5)
  weights = all_weights(q[0], k[0], mask, relative)
  np.testing.assert_allclose(found.last_HS, weights[:, -1], atol=1e-5)
  expected = np.zeros((4, T))
  for t in range(T // 2, T):
    expected[:, : t + 1] += weights[:, t, t::-1]
  expected /= T - T // 2
  np.testing.assert_allclose(found.by_distance_HS, expected, atol=1e-5)
  np.testing.assert_allclose(found.by_distance_HS.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"attention": "dense", "position": "learned"},
    {"attention": "span", "position": "relative", "memory_tokens": 20},
  ],
  ids=str,
)
def test_a_model_is_watched_and_not_changed(changes):
  config = dataclasses.replace(CONFIG, **changes)
  params = drawn.parameters(config, scale=0.25)
  T = config.max_context_tokens
  mass = attention_mass.measure(params, config, DATA[: 3 * T + 5])
  assert mass.tokens == 3 * T
  assert mass.by_distance_LHS.shape == mass.last_LHS.shape == (2, 2, T)
  for sums in (mass.by_distance_LHS.sum(-1), mass.last_LHS.sum(-1)):
    np.testing.assert_allclose(sums, 1, atol=1e-5)
  state = attention_mass.State(
    (Watched(jnp.zeros((2, T)), jnp.zeros((2, T))),) * 2, np.uint32(0)
  )
  tokens = jnp.asarray(DATA[None, :T], jnp.int32)
  apply = jax.jit(Transformer(config).apply)
  watched, _ = apply({"params": params}, tokens, state=state)
  plain = apply({"params": params}, tokens)
  np.testing.assert_allclose(watched, plain, atol=1e-5)


def test_a_text_shorter_than_a_context_is_one_sequence():
  params = drawn.parameters(CONFIG, scale=0.25)
  assert attention_mass.measure(params, CONFIG, DATA[:7]).tokens == 7
