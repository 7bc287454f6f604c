"""The reference: attention under learned masks by its definition.

All T x S pairs are computed, and those that are not open are then hidden. The
other implementations are tested against it, and save its time and memory.
"""

import math

import jax
import jax.numpy as jnp

from adaptive_attention import masks
from adaptive_attention.attention import dropout
from adaptive_attention.attention.heads_and_segments import for_each_query_head
from adaptive_attention.attention.ring import in_order


def attend(
  q_BTHK,
  k_BSGK,
  v_BSGK,
  mask,
  *,
  ring,
  memory,
  first_key,
  segments,
  relative_RK,
  dropout_rate,
  dropout_seed,
  dropout_heads,
):
  """Returns softmax(q (k + p) / sqrt(K) + log m + log w) v; see `attend`."""
  del memory  # the gradient is stopped already
  T, H, K = q_BTHK.shape[1:]
  if ring is not None:
    k_BSGK, v_BSGK = _after_older(ring, k_BSGK, v_BSGK)
  k_BSHK, v_BSHK = (for_each_query_head(x, H) for x in (k_BSGK, v_BSGK))
  S = k_BSHK.shape[1]
  x_S = jnp.arange(T - S, T, dtype=jnp.int32)  # relative to the first query
  # A key that does not exist may hold anything, and 0 * nan is nan.
  exists_S = x_S >= first_key - (S - T)
  k_BSHK, v_BSHK = (
    jnp.where(exists_S[None, :, None, None], x, jnp.zeros((), x.dtype))
    for x in (k_BSHK, v_BSHK)
  )
  distance_TS = jnp.arange(T, dtype=jnp.int32)[:, None] - x_S[None]
  logits_BHTS = jnp.einsum(
    "bthk,bshk->bhts", q_BTHK, k_BSHK, preferred_element_type=jnp.float32
  )
  if relative_RK is not None:
    logits_BHTS += of_distances(q_BTHK, relative_RK, distance_TS)
  bias_BHTS = _bias(mask, distance_TS, exists_S, segments)
  weights_BHTS = softmax(logits_BHTS / math.sqrt(K) + bias_BHTS)
  if dropout_rate:
    drawn = dropout_seed, dropout_heads, x_S, dropout_rate
    weights_BHTS = _dropped(weights_BHTS, *drawn)
  # The product gives float32 for the gradient's sake: the weights' gradient is
  # a product of the same dtype, and XLA's CPU may sum bfloat16 in bfloat16.
  return jnp.einsum(
    "bhts,bshk->bthk",
    weights_BHTS.astype(v_BSHK.dtype),
    v_BSHK,
    preferred_element_type=jnp.float32,
  ).astype(q_BTHK.dtype)


def _after_older(ring, k_BTGK, v_BTGK):
  """Returns (B, S, G, K) keys and values: those of a ring, then new ones."""
  B, T = k_BTGK.shape[:2]
  return [
    jnp.concatenate([in_order(old, ring, B)[:, :-T], new], axis=1)
    for old, new in ((ring.k_NSHK, k_BTGK), (ring.v_NSHK, v_BTGK))
  ]


def _dropped(weights_BHTS, seed, h_H, x_S, rate):
  """Returns the weights with a share of them dropped and the rest scaled up."""
  b_B, t_T = (
    jnp.arange(n, dtype=jnp.int32)
    for n in (weights_BHTS.shape[0], weights_BHTS.shape[2])
  )
  kept_BHTS = dropout.keep(
    seed,
    b_B[:, None, None, None],
    h_H[None, :, None, None],
    t_T[None, None, :, None],
    x_S[None, None, None],
    rate,
  )
  return jnp.where(kept_BHTS, weights_BHTS / (1 - rate), 0.0)


def _bias(mask, distance_TS, exists_S, segments):
  """Returns (B or 1, H or 1, T, S) log m + log w.

  It is -inf for later and missing keys, and for those of other segments.
  """
  exists_TS = (distance_TS >= 0) & exists_S[None]
  if mask is None:
    bias_HTS = jnp.zeros((1, *distance_TS.shape), jnp.float32)
  else:
    bias_HTS = masks.log_weight(mask, distance_TS)
  bias_BHTS = jnp.where(exists_TS[None], bias_HTS, -jnp.inf)[None]
  if segments is None:
    return bias_BHTS
  alike_BTS = segments.query_BT[:, :, None] == segments.key_BS[:, None]
  return jnp.where(alike_BTS[:, None], bias_BHTS, -jnp.inf)


def softmax(logits):
  """Returns the weights of each row; zeros where all its logits are -inf."""
  highest = jnp.max(logits, axis=-1, keepdims=True)
  highest = jnp.where(jnp.isfinite(highest), highest, 0.0)
  weights = jnp.exp(logits - jax.lax.stop_gradient(highest))
  total = jnp.sum(weights, axis=-1, keepdims=True)
  return weights / jnp.where(total > 0, total, 1.0)


def of_distances(q_BTHK, relative_RK, distance_TS):
  """Returns (B, H, T, S) q p, p the vector of each distance; zero beyond R."""
  R = len(relative_RK)
  products_BHTR = jnp.einsum(
    "bthk,rk->bhtr",
    q_BTHK.astype(jnp.float32),
    relative_RK.astype(jnp.float32),
  )
  shape_BHTS = (*products_BHTR.shape[:2], *distance_TS.shape)
  products_BHTS = jnp.take_along_axis(
    products_BHTR,
    jnp.broadcast_to(jnp.clip(distance_TS, 0, R - 1)[None, None], shape_BHTS),
    axis=-1,
  )
  return jnp.where((distance_TS < R)[None, None], products_BHTS, 0.0)
