"""Attention of one query to the KV cache of each head.

The keys and values of a head stand in a ring of at least as many rows as its
reach; `head_groups` says how many. Under a wave of an integer period P the rows
are dealt into P residue classes by position, and only those at an open
distance are read. That is exact: the weight of what is not read is zero.

Axes: G heads of keys of one group, Q heads of queries that each of them serves,
P residue classes, Y rows of each, r open residues.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adaptive_attention import masks
from adaptive_attention.attention import reference
from adaptive_attention.attention.head_groups import Group


def biases(mask: masks.Mask, groups) -> tuple[jax.Array, ...]:
  """Returns, for each group, (G, Q, r, Y) log m + log w by distance."""

  def of_group(group):
    distance_rY = group.distances()
    bias = masks.log_weight(mask, distance_rY)[group.query_heads]
    return bias.reshape(len(group.heads), group.queries, *distance_rY.shape)

  return tuple(map(of_group, groups))


def put(group: Group, ring_BGPYK, new_BTGK, tokens_read):
  """Returns the ring with T tokens written over its oldest.

  The tokens have the positions from `tokens_read` on. One token is written in
  place where the ring is donated.
  """
  first = jnp.asarray(tokens_read).astype(jnp.int32)
  new_BGTK = new_BTGK.swapaxes(1, 2).astype(ring_BGPYK.dtype)
  if new_BGTK.shape[2] == 1:
    return _put_one(group, ring_BGPYK, new_BGTK, first)
  P, Y, T = group.period, group.rows, new_BGTK.shape[2]
  # The newest position of each residue class and row, counted from the first
  # new token.
  c_P1, y_1Y = (np.arange(n, dtype=np.int32) for n in (P, Y))
  c_P1, y_1Y = c_P1[:, None], y_1Y[None]
  newest_P1 = (first + T - 1 - c_P1) // P
  t_PY = P * (newest_P1 - (newest_P1 - y_1Y) % Y) + c_P1 - first
  rows = new_BGTK[:, :, jnp.maximum(t_PY, 0)]
  return jnp.where((t_PY >= 0)[..., None], rows, ring_BGPYK)


def _put_one(group, ring_BGPYK, new_BG1K, position):
  """Returns the ring with the token at `position` written over its oldest."""
  P, Y = group.period, group.rows
  at = (0, 0, position % P, (position // P) % Y, 0)
  return lax.dynamic_update_slice(
    ring_BGPYK,
    new_BG1K[:, :, None],
    [jnp.asarray(i, jnp.int32) for i in at],
  )


def in_order(group: Group, ring_BGPYK, tokens_read):
  """Returns (B, P Y, G, K), the rows of the ring from the oldest to the newest.

  What rows of positions before the text hold means nothing.
  """
  P, Y = group.period, group.rows
  first = jnp.asarray(tokens_read).astype(jnp.int32)
  position_L = first + np.arange(-P * Y, 0, dtype=np.int32)
  rows = ring_BGPYK[:, :, position_L % P, (position_L // P) % Y]
  return rows.swapaxes(1, 2)


def attend_one(groups, q_B1HK, k, v, bias, tokens_read, relative_RK=None):
  """Returns out_B1HK of one query a sequence, whose key is in the rings.

  out = softmax(q (k + p) / sqrt(K) + log m + log w) v over the open keys in the
  rings. The output is zero where no key is open.

  Args:
    groups: the groups of the layer's heads.
    q_B1HK: the queries of the token at the position `tokens_read`.
    k, v, bias: for each group, as in `kv_cache.KVCache`.
    tokens_read: how many tokens came before this one.
    relative_RK: p, a vector for each distance 0 .. R - 1; zero beyond.
  """
  B, _, H, K = q_B1HK.shape
  position = jnp.asarray(tokens_read).astype(jnp.int32)
  out_BHK = jnp.zeros((B, H, K), jnp.float32)
  for group, *arrays in zip(groups, k, v, bias, strict=True):
    heads = group.query_heads
    shape = B, len(group.heads), group.queries, K
    q_BGQK = q_B1HK[:, 0, heads].reshape(shape)
    out_BGQK = _read(group, q_BGQK, *arrays, position, relative_RK)
    out_BHK = out_BHK.at[:, heads].set(out_BGQK.reshape(B, len(heads), K))
  return out_BHK[:, None].astype(q_B1HK.dtype)


def _read(group, q_BGQK, k, v, bias_GQrY, position, relative_RK):
  """Returns (B, G, Q, K) of queries at `position`, whose key is in the ring."""
  P, K = group.period, q_BGQK.shape[-1]
  q_BGQK = q_BGQK.astype(jnp.float32) / np.sqrt(K).astype(np.float32)
  distance = group.distances()
  exists = distance <= position
  logits, values = [], []
  for i, rho in enumerate(group.residues):
    # A residue class that no token has come to yet holds no key that exists.
    newest = jnp.maximum(position - rho, 0)
    c = newest % P
    k_BGYK = lax.dynamic_index_in_dim(k, c, axis=2, keepdims=False)
    values.append(lax.dynamic_index_in_dim(v, c, axis=2, keepdims=False))
    logits_BGQY = jnp.einsum(
      "bgqk,bgyk->bgqy", q_BGQK, k_BGYK, preferred_element_type=jnp.float32
    )
    by_age = jnp.where(exists[i], bias_GQrY[:, :, i], -jnp.inf)[None]
    if relative_RK is not None:
      by_age += _of_distances(q_BGQK, relative_RK, distance[i])
    logits.append(logits_BGQY + _by_row(by_age, newest // P))
  weights_BGQY = reference.softmax(jnp.concatenate(logits, axis=-1))
  return jnp.einsum(
    "bgqy,bgyk->bgqk",
    weights_BGQY,
    values[0] if len(values) == 1 else jnp.concatenate(values, axis=2),
    preferred_element_type=jnp.float32,
  )


def _of_distances(q_BGQK, relative_RK, distance_Y):
  """Returns (B, G, Q, Y) q p, p the vector of each distance; zero beyond R."""
  R = len(relative_RK)
  vectors_YK = relative_RK[np.minimum(distance_Y, R - 1)].astype(jnp.float32)
  vectors_YK = jnp.where((distance_Y < R)[:, None], vectors_YK, 0.0)
  return jnp.einsum("bgqk,yk->bgqy", q_BGQK, vectors_YK)


def _by_row(by_age, newest):
  """Returns (..., Y) by row of the ring, from (..., Y) by age.

  An age is how many rows of its residue class a row is older than the `newest`.
  """
  Y = by_age.shape[-1]
  # back[i] = by_age[-i mod Y]; row r is (newest - r) mod Y rows back.
  back = jnp.concatenate([by_age[..., :1], by_age[..., :0:-1]], axis=-1)
  twice = jnp.concatenate([back, back], axis=-1)
  return lax.dynamic_slice_in_dim(twice, -newest % Y, Y, axis=-1)
