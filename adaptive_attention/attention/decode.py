"""Attention of one query to the KV cache of each head.

The keys and values of a head stand in a ring of at least as many rows as its
reach, ceil(z + R) tokens. Where a head of keys serves several heads of queries
its ring reaches as far as the farthest of these. Under a wave of an integer
period P the rows are dealt into P residue classes by position, and only the
classes at an open distance are read. That is exact: the weight of what is not
read is zero.

Axes: G heads of keys of one group, Q heads of queries that each of them serves,
P residue classes, Y rows of each, r open residues.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adaptive_attention import masks

_WASTE = 1.08  # rings have at most so many times the rows that reaches need


class Group(NamedTuple):
  """Heads whose rings are of one size; static.

  Attributes:
    heads: their indices among the layer's heads of keys.
    queries: Q.
    period: P; 1 where all keys of a ring are read.
    rows: Y.
    residues: the open residues of distances mod P, the same for all its heads.
  """

  heads: tuple[int, ...]
  queries: int
  period: int
  rows: int
  residues: tuple[int, ...]

  @property
  def query_heads(self) -> np.ndarray:
    """The indices of the query heads, (G Q,)."""
    first_G1 = self.queries * np.array(self.heads)[:, None]
    return (first_G1 + np.arange(self.queries)).ravel()

  @property
  def ring_rows(self) -> int:
    """Rows of a head's ring."""
    return self.period * self.rows

  @property
  def reads(self) -> int:
    """Rows of a head's ring that a query reads."""
    return len(self.residues) * self.rows

  def distances(self) -> np.ndarray:
    """Returns (r, Y) the distances that are read, ascending along Y."""
    row_Y = np.arange(self.rows, dtype=np.int32)
    return np.add.outer(np.array(self.residues, np.int32), self.period * row_Y)


def reach(mask: masks.Mask, longest: int) -> np.ndarray:
  """Returns (H,) the reach of each head in tokens, the query itself included.

  It is ceil(z + R), as m(d) > 0 where d < z + R, and at most `longest`. A last
  token whose weight is hidden, m(d) <= 1e-6, does not count.
  """
  spans = masks.Mask(mask.span, mask.ramp)
  return np.asarray(masks.is_open(spans, np.arange(longest))).sum(axis=1)


def key_reach(mask: masks.Mask, longest: int, key_heads: int) -> np.ndarray:
  """Returns for each head of keys the longest reach of its query heads."""
  return reach(mask, longest).reshape(key_heads, -1).max(axis=1)


def groups_of(
  mask: masks.Mask, longest: int, key_heads: int
) -> tuple[Group, ...]:
  """Returns a layer's heads of keys in as few groups as _WASTE allows.

  Args:
    mask: concrete, of the heads of queries.
    longest: the longest reach that a head gets.
    key_heads: how many heads of keys the layer has.
  """
  queries = len(mask.span) // key_heads
  reach_H = key_reach(mask, longest, key_heads)
  strides = [(1, (0,))] * key_heads
  if mask.wave is not None and mask.wave.integer:
    strides = _strides(mask.wave, key_heads)
  groups = []
  for stride in sorted(set(strides)):
    heads = [h for h, other in enumerate(strides) if other == stride]
    period, residues = stride
    rows = {h: -(-int(reach_H[h]) // period) for h in heads}
    for part in _parted(sorted(heads, key=rows.get), rows):
      groups.append(Group(part, queries, period, rows[part[-1]], residues))
  return tuple(groups)


def dense_groups(heads: int, longest: int, key_heads: int) -> tuple[Group, ...]:
  """Returns one group of all heads, whose rings are of the `longest` reach."""
  every = tuple(range(key_heads))
  return (Group(every, heads // key_heads, 1, longest, (0,)),)


def _strides(wave, key_heads):
  """Returns (P, open residues) of each head of keys.

  A residue is open if it is to any of its query heads. It is (1, (0,)) where
  all residues are open, or none, or where the periods of these differ.
  """
  period_H = np.round(np.asarray(wave.period)).astype(int)
  open_HR = np.asarray(
    masks.wave_weight(np.arange(period_H.max()), wave) > masks.HIDDEN
  )
  strides = []
  for period_Q, open_QR in zip(
    np.split(period_H, key_heads), np.split(open_HR, key_heads), strict=True
  ):
    P = int(period_Q[0])
    residues = tuple(np.flatnonzero(open_QR.any(axis=0)[:P]).tolist())
    strided = (period_Q == P).all() and 0 < len(residues) < P
    strides.append((P, residues) if strided else (1, (0,)))
  return strides


def _parted(heads, rows):
  """Returns heads, ascending by rows, cut into the fewest parts.

  Each head of a part takes as many rows as the part's last one. Altogether they
  take at most _WASTE times the rows that are needed. Of all cuts into as many
  parts the one with the fewest rows is taken.
  """
  needed = sum(rows[h] for h in heads)

  @functools.cache
  def cheapest(first, parts):
    """Returns (rows, cuts) of the heads from `first` on in so many parts."""
    if parts == 1:
      return (len(heads) - first) * rows[heads[-1]], (len(heads),)
    options = []
    for end in range(first + 1, len(heads) - parts + 2):
      rest, cuts = cheapest(end, parts - 1)
      options.append(
        ((end - first) * rows[heads[end - 1]] + rest, (end, *cuts))
      )
    return min(options)

  for parts in range(1, len(heads) + 1):
    taken, cuts = cheapest(0, parts)
    if taken <= _WASTE * needed or parts == len(heads):
      return [
        tuple(heads[start:end])
        for start, end in zip((0, *cuts), cuts, strict=False)
      ]


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
  # The newest position of each class and row, counted from the first new token.
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

  Rows that stand for positions before the text hold anything.
  """
  P, Y = group.period, group.rows
  first = jnp.asarray(tokens_read).astype(jnp.int32)
  position_L = first + np.arange(-P * Y, 0, dtype=np.int32)
  rows = ring_BGPYK[:, :, position_L % P, (position_L // P) % Y]
  return rows.swapaxes(1, 2)


def attend_one(groups, q_B1HK, k, v, bias, tokens_read, relative_RK=None):
  """Returns out_B1HK of one query a sequence, whose key is in the rings.

  out = softmax(q (k + p) / sqrt(K) + log m + log w) v over the open keys in the
  rings. It is zero where no key is open.

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
    # A class that no token has come to yet holds no key that exists.
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
  weights_BGQY = _softmax(jnp.concatenate(logits, axis=-1))
  return jnp.einsum(
    "bgqy,bgyk->bgqk",
    weights_BGQY,
    values[0] if len(values) == 1 else jnp.concatenate(values, axis=2),
    preferred_element_type=jnp.float32,
  )


def _softmax(logits_BGQY):
  """Returns weights over the rows of a ring; zeros where all are hidden."""
  highest_BGQ1 = jnp.max(logits_BGQY, axis=-1, keepdims=True)
  highest_BGQ1 = jnp.where(jnp.isfinite(highest_BGQ1), highest_BGQ1, 0.0)
  weights_BGQY = jnp.exp(logits_BGQY - highest_BGQ1)
  total_BGQ1 = jnp.sum(weights_BGQY, axis=-1, keepdims=True)
  return weights_BGQY / jnp.where(total_BGQ1 > 0, total_BGQ1, 1.0)


def _of_distances(q_BGQK, relative_RK, distance_Y):
  """Returns (B, G, Q, Y) q p, p the vector of each distance; zero beyond R."""
  R = len(relative_RK)
  vectors_YK = relative_RK[np.minimum(distance_Y, R - 1)].astype(jnp.float32)
  vectors_YK = jnp.where((distance_Y < R)[:, None], vectors_YK, 0.0)
  return jnp.einsum("bgqk,yk->bgqy", q_BGQK, vectors_YK)


def _by_row(by_age, newest):
  """Returns (..., Y) by row of the ring, from (..., Y) by age.

  An age is how many rows of its class a row is older than the `newest`.
  """
  Y = by_age.shape[-1]
  # back[i] = by_age[-i mod Y]; row r is (newest - r) mod Y rows back.
  back = jnp.concatenate([by_age[..., :1], by_age[..., :0:-1]], axis=-1)
  twice = jnp.concatenate([back, back], axis=-1)
  return lax.dynamic_slice_in_dim(twice, -newest % Y, Y, axis=-1)
