"""Attention under learned masks, dense and obvious: the definition.

All T x S pairs are computed, then hidden. It is what the other
implementations are held against, and its time and memory are what they save.
"""

import math

import jax
import jax.numpy as jnp

from adaptive_attention import masks
from adaptive_attention.attention import dropout
from adaptive_attention.attention.ring import in_order


def attend(
  q_BTHK,
  k_BSHK,
  v_BSHK,
  mask,
  *,
  memory,
  first_key,
  dropout_rate,
  dropout_seed,
  ring,
  relative_RK,
):
  """softmax(q (k + p) / sqrt(K) + log m + log w) v; see `attention.attend`."""
  B, T, H, K = q_BTHK.shape
  if ring is not None:
    k_BSHK, v_BSHK = (
      jnp.concatenate([in_order(old, ring, B)[:, :-T], new], axis=1)
      for old, new in ((ring.k_NSHK, k_BSHK), (ring.v_NSHK, v_BSHK))
    )
    memory = k_BSHK.shape[1] - T
  S = k_BSHK.shape[1]

  s_S = jnp.arange(S, dtype=jnp.int32)
  # A key that does not exist may hold anything, and 0 * nan is nan.
  k_BSHK, v_BSHK = (
    _existing(x_BSHK, s_S >= first_key, memory) for x_BSHK in (k_BSHK, v_BSHK)
  )
  t_T1 = jnp.arange(T, dtype=jnp.int32)[:, None]
  distance_TS = S - T + t_T1 - s_S[None]
  exists_TS = (distance_TS >= 0) & (s_S >= first_key)[None]
  if mask is None:
    bias_HTS = jnp.zeros((1, T, S), jnp.float32)
  else:
    bias_HTS = masks.log_weight(mask, distance_TS)
  bias_HTS = jnp.where(exists_TS[None], bias_HTS, -jnp.inf)

  logits_BHTS = jnp.einsum(
    "bthk,bshk->bhts", q_BTHK, k_BSHK, preferred_element_type=jnp.float32
  )
  if relative_RK is not None:
    logits_BHTS += _of_distances(q_BTHK, relative_RK, distance_TS)
  logits_BHTS = logits_BHTS / math.sqrt(K) + bias_HTS[None]
  # A row without any open key has only -inf: its weights are zero, not nan.
  highest_BHT1 = jnp.max(logits_BHTS, axis=-1, keepdims=True)
  highest_BHT1 = jnp.where(jnp.isfinite(highest_BHT1), highest_BHT1, 0.0)
  weights_BHTS = jnp.exp(logits_BHTS - jax.lax.stop_gradient(highest_BHT1))
  total_BHT1 = jnp.sum(weights_BHTS, axis=-1, keepdims=True)
  weights_BHTS = weights_BHTS / jnp.where(total_BHT1 > 0, total_BHT1, 1.0)
  if dropout_rate:
    b_B111 = jnp.arange(B)[:, None, None, None]
    h_1H11 = jnp.arange(H)[None, :, None, None]
    t_11T1, s_111S = t_T1[None, None], s_S[None, None, None]
    kept_BHTS = dropout.keep(
      dropout_seed, b_B111, h_1H11, t_11T1, s_111S, dropout_rate
    )
    weights_BHTS = jnp.where(kept_BHTS, weights_BHTS / (1 - dropout_rate), 0.0)
  # In float32 for the gradient's sake: of a product that gives bfloat16 the
  # weights' gradient is one too, and XLA's CPU backend may sum it in bfloat16.
  return jnp.einsum(
    "bhts,bshk->bthk",
    weights_BHTS.astype(v_BSHK.dtype),
    v_BSHK,
    preferred_element_type=jnp.float32,
  ).astype(q_BTHK.dtype)


def _existing(x_BSHK, exists_S, memory):
  """Keys or values, zero where none exist; the memory takes no gradient."""
  if memory:
    older = jax.lax.stop_gradient(x_BSHK[:, :memory])
    x_BSHK = jnp.concatenate([older, x_BSHK[:, memory:]], axis=1)
  exists_1S11 = exists_S[None, :, None, None]
  return jnp.where(exists_1S11, x_BSHK, jnp.zeros((), x_BSHK.dtype))


def _of_distances(q_BTHK, relative_RK, distance_TS):
  """(B, H, T, S) q p of the vector p of each distance; 0 beyond the last."""
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
