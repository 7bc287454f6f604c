"""Exact attention that computes only tiles which hold an open pair.

Loops with run-time bounds over tiles of queries and keys, head by head, in
plain XLA: a change of spans or periods recompiles nothing, and memory is linear
in the lengths. The softmax is accumulated tile by tile and the backward pass
computes the weights again from each row's log of sums (Dao et al. 2022,
"FlashAttention").

Positions are counted as x = t for queries and x = s - (S - T) for keys, so that
a distance is a difference of x. With a stride P they are dealt into P classes,
x = P y + a, and tiles are made of consecutive y of one class:

  d = P (n tile + u - w - b) + rho    for row u and column w of a tile,

where rho = (a - c) mod P for the classes a of the queries and c of the keys,
b = 1 if a < rho, and n is the tile's diagonal. P = 1 is the plain band. Under
an integer wave of period P the comb is one number for each rho, and of the P
classes of keys a query meets those with an open rho alone.

What the masks add to the logits depends on (rho, b, n) alone. It is laid out
once per head; where it is one number all over a tile, as within the span, the
tile has no mask arithmetic at all.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from adaptive_attention import masks
from adaptive_attention.attention import dropout

MAX_STRIDE = 16  # integer waves of longer periods run as a band
_GROUPS = 2  # of query tiles: loops that XLA runs side by side on a CPU
_LOW = -1e30  # of a row that has seen nothing yet; finite, unlike hidden logits
_GATHER_COST = 1.25  # of a tile under a stride, against one of the band


def tile_size(T: int) -> int:
  """Rows and columns of a tile for T queries."""
  return 128 if T >= 512 else 64


class _Static(NamedTuple):
  """What is known when the function is traced."""

  T: int  # queries, padded to whole tiles
  S: int  # keys, padded in front and behind likewise
  tile: int
  front: int  # how many of the keys are padding in front
  strided: bool  # whether a head may have a stride other than one
  dropout_rate: float

  @property
  def query_tiles(self):
    return self.T // self.tile

  @property
  def origin(self):
    """The index of the key at x = 0."""
    return self.S - self.T


class _Plan(NamedTuple):
  """Of each head: how its tiles are walked, and what its masks add.

  Attributes:
    stride: (H,) P.
    last: (H,) the largest open distance; -1 if there is none.
    residues: (H, MAX_STRIDE) the open rho, in front.
    residue_count: (H,) how many these are.
    features: (H, 4, S) by distance: log m + log w, and its derivatives by
      span, period and ratio.
    first: the x of the first key that exists.
  """

  stride: jax.Array
  last: jax.Array
  residues: jax.Array
  residue_count: jax.Array
  features: jax.Array
  first: jax.Array


def _diagonals(stride, last, rho, b, tile):
  """How many diagonals n = 0, 1, ... hold a distance up to `last`."""
  return ((last - rho) // stride + b + tile - 1) // tile + 1


def _existing(stride, first, key_class, i, tile):
  """How many diagonals of query tile i hold a key that exists."""
  y_first = -((key_class - first) // stride)
  return jnp.maximum(i - y_first // tile + 1, 0)


def tile_counts(stride, last, open_residue, first, *, query_tiles, tile):
  """The number of tiles that one head touches under a stride.

  Args:
    stride: P, at most MAX_STRIDE.
    last: its largest open distance.
    open_residue: (MAX_STRIDE,) whether rho is open; those from P on do not
      count.
    first: the x of the first key that exists.
    query_tiles: of the padded queries.
    tile: its size.
  """
  P = stride
  a = jnp.arange(MAX_STRIDE)[:, None, None]
  i = jnp.arange(query_tiles)[:, None]
  rho = jnp.arange(MAX_STRIDE)
  b = (a < rho).astype(jnp.int32)
  count = jnp.minimum(
    _diagonals(P, last, rho, b, tile),
    _existing(P, first, a - rho + P * b, i, tile),
  )
  meets = (a < P) & (i < -(-query_tiles // P)) & (rho < P) & open_residue
  return jnp.sum(jnp.where(meets & (last >= rho), count, 0))


def _count_tiles(static):
  """tile_counts for all heads: (stride_H, last_H, open_residue_HR, first)."""
  count = functools.partial(
    tile_counts, query_tiles=static.query_tiles, tile=static.tile
  )
  return jax.vmap(count, in_axes=(0, 0, 0, None))


def make_plan(features_H4S, period_H, first, static) -> _Plan:
  """Chooses each head's stride: of 1 and its period the one with less work."""
  open_HS = features_H4S[:, 0] > -jnp.inf
  H, S = open_HS.shape
  last_H = jnp.max(jnp.where(open_HS, jnp.arange(S), -1), axis=-1)
  # m falls with the distance: a residue is open if its least distance is.
  least_HR = open_HS[:, :MAX_STRIDE]
  least_HR = jnp.pad(least_HR, ((0, 0), (0, max(0, MAX_STRIDE - S))))
  band_HR = jnp.broadcast_to(jnp.arange(MAX_STRIDE) == 0, least_HR.shape)
  count = _count_tiles(static)
  ones_H = jnp.ones(H, jnp.int32)
  stride_H = ones_H
  if period_H is not None:
    band_H = count(ones_H, last_H, band_HR, first)
    strides_H = jnp.clip(period_H, 1, MAX_STRIDE)
    strided_H = count(strides_H, last_H, least_HR, first)
    worth = _GATHER_COST * strided_H < band_H
    stride_H = jnp.where(worth & (period_H == strides_H), strides_H, 1)
  open_HR = jnp.where(stride_H[:, None] == 1, band_HR, least_HR)
  open_HR &= jnp.arange(MAX_STRIDE) < stride_H[:, None]
  open_HR &= last_H[:, None] >= 0
  return _Plan(
    stride_H,
    last_H,
    jnp.argsort(~open_HR, axis=-1, stable=True).astype(jnp.int32),
    jnp.sum(open_HR, axis=-1, dtype=jnp.int32),
    features_H4S,
    first,
  )


def _toeplitz(segment, tile):
  """(2 tile - 1,) -> (tile, tile): [u, w] = segment[tile - 1 + u - w]."""
  row = jnp.append(segment[::-1], 0.0)
  rows = jnp.tile(row, tile)[: tile * (2 * tile - 1)]
  return rows.reshape(tile, 2 * tile - 1)[:, tile - 1 :]


def _put(stack, index, layer):
  """stack[index] = layer, in place within a loop, which a scatter is not."""
  return lax.dynamic_update_index_in_dim(stack, layer, index, 0)


class _Head:
  """One head's walk over its tiles, forward and backward alike."""

  def __init__(self, plan, h, static):
    self.h, self.static, self.plan = h, static, plan
    self.stride = plan.stride[h]
    self.last = plan.last[h]
    tile = static.tile
    # Class-major: class a has its query tiles in a row, then class a + 1.
    self.class_tiles = -(-static.query_tiles // self.stride)
    self.diagonals = _diagonals(self.stride, self.last, 0, 1, tile)
    self.diagonals = jnp.minimum(self.diagonals, static.S // tile + 1)

  def slots(self):
    """A bound on the number of (rho, b, n) of any head."""
    diagonals = self.static.S // self.static.tile + 1
    return (
      2 * (diagonals + 2 * MAX_STRIDE) if self.static.strided else diagonals
    )

  def used_slots(self):
    """How many of them this head has; under the band b is always 0."""
    strided = 2 * self.plan.residue_count[self.h] * self.diagonals
    return jnp.where(self.stride == 1, self.diagonals, strided)

  def slot(self, r, b, n):
    return (2 * r + b) * self.diagonals + n

  def distances(self, slot):
    """(2 tile - 1,) the distances on the diagonals of the slot's tile."""
    n = slot % self.diagonals
    b = slot // self.diagonals % 2
    rho = self.plan.residues[self.h, slot // self.diagonals // 2]
    tile = self.static.tile
    return self.stride * (n * tile - b + jnp.arange(1 - tile, tile)) + rho

  def lay_out(self):
    """Of each slot: its bias tile, and whether that is one number, and which.

    Returns:
      bias: (slots, tile, tile).
      flat: (slots,) whether bias and its derivatives are all one number.
      level: (slots,) that number.
      sloped: (slots,) whether any derivative is not zero.
    """
    tile, S = self.static.tile, self.plan.features.shape[-1]
    features_4S = self.plan.features[self.h]

    def one(slot, laid):
      bias, flat, level, sloped = laid
      d = self.distances(slot)
      segment_4D = features_4S[:, jnp.clip(d, 0, S - 1)]
      hidden = (d < 0) | (d >= S)
      value_D = jnp.where(hidden, -jnp.inf, segment_4D[0])
      derivatives_3D = jnp.where(hidden, 0.0, segment_4D[1:])
      is_flat = jnp.all(value_D == value_D[0]) & jnp.all(
        derivatives_3D == derivatives_3D[:, :1]
      )
      return (
        _put(bias, slot, _toeplitz(value_D, tile)),
        _put(flat, slot, is_flat),
        _put(level, slot, value_D[0]),
        _put(sloped, slot, jnp.any(derivatives_3D != 0)),
      )

    slots = self.slots()
    empty = (
      jnp.zeros((slots, tile, tile)),
      jnp.zeros(slots, bool),
      jnp.zeros(slots),
      jnp.zeros(slots, bool),
    )
    return lax.fori_loop(0, self.used_slots(), one, empty)

  def table_gradient(self, d_bias):
    """(S,) the sums of d_bias over all pairs of each distance."""
    tile, S = self.static.tile, self.plan.features.shape[-1]

    def one(slot, total_S):
      (segment_D,) = jax.linear_transpose(
        functools.partial(_toeplitz, tile=tile), jnp.zeros(2 * tile - 1)
      )(d_bias[slot])
      d = self.distances(slot)
      index = jnp.where(d < 0, S, d)  # lost, not wrapped
      return total_S.at[index].add(segment_D, mode="drop")

    return lax.fori_loop(0, self.used_slots(), one, jnp.zeros(S))

  def rows(self, x_class, y_tile):
    """(tile,) the x of the rows of a tile."""
    tile = self.static.tile
    return x_class + self.stride * (y_tile * tile + jnp.arange(tile))

  def fetch(self, array_BXHK, x_class, y_tile, origin):
    """(B, tile, K) float32: one head's rows of a tile; `origin` is at x = 0."""
    B, X, _, K = array_BXHK.shape
    tile = self.static.tile

    def contiguous():
      start = (0, y_tile * tile + origin, self.h, 0)
      return lax.dynamic_slice(array_BXHK, start, (B, tile, 1, K))[:, :, 0]

    def strided():
      index = jnp.clip(self.rows(x_class, y_tile) + origin, 0, X - 1)
      return array_BXHK[:, index, self.h]

    if self.static.strided:
      rows = lax.cond(self.stride == 1, contiguous, strided)
    else:
      rows = contiguous()
    return rows.astype(jnp.float32)

  def for_each_key_tile(self, a, i, body, carry):
    """body(c, key tile, slot, carry) over what tile i of class a meets."""
    static, plan = self.static, self.plan

    def residue(r, carry):
      rho = plan.residues[self.h, r]
      b = (a < rho).astype(jnp.int32)
      c = a - rho + self.stride * b
      count = jnp.minimum(
        _diagonals(self.stride, self.last, rho, b, static.tile),
        _existing(self.stride, plan.first, c, i, static.tile),
      )

      def diagonal(n, carry):
        return body(c, i - n, self.slot(r, b, n), carry)

      return lax.fori_loop(0, count, diagonal, carry)

    return lax.fori_loop(0, plan.residue_count[self.h], residue, carry)

  def for_each_query_tile(self, body, carry):
    """body(a, i, carry) over all query tiles; the groups' results are added.

    Rows that a group does not write are zeros in its arrays.
    """
    tiles = self.stride * self.class_tiles

    def run(group):
      def one(index, carry):
        index = index * _GROUPS + group
        return body(index // self.class_tiles, index % self.class_tiles, carry)

      count = (tiles - group + _GROUPS - 1) // _GROUPS
      return lax.fori_loop(0, count, one, carry)

    parts = [run(group) for group in range(_GROUPS)]
    return jax.tree.map(lambda *xs: sum(xs), *parts)

  def logits(self, laid, q_BQK, k_BCK, c, key_tile, slot):
    """(logits less `level`, level): level is added where it costs nothing."""
    bias, flat, level, _ = laid
    logits_BQC = jnp.einsum("bqk,bck->bqc", q_BQK, k_BCK)
    exists_C = self.rows(c, key_tile) >= self.plan.first
    is_flat = flat[slot] & jnp.all(exists_C)

    def with_bias():
      bias_QC = jnp.where(flat[slot], 0.0, bias[slot])
      return logits_BQC + jnp.where(exists_C, bias_QC, -jnp.inf)

    logits_BQC = lax.cond(is_flat, lambda: logits_BQC, with_bias)
    return logits_BQC, jnp.where(flat[slot], level[slot], 0.0)

  def kept(self, seed, B, a, i, c, key_tile):
    """(B, Q, C) which attention weights dropout leaves."""
    b_B11 = jnp.arange(B)[:, None, None]
    t_Q1 = self.rows(a, i)[:, None]
    s_C = self.rows(c, key_tile) + self.static.origin - self.static.front
    rate = self.static.dropout_rate
    return dropout.keep(seed, b_B11, self.h, t_Q1, s_C, rate)

  def scatter(self, out_BXN, x_class, y_tile, origin, rows_BQN):
    """Writes a tile's rows to their places; rows beyond the array are lost."""
    index = self.rows(x_class, y_tile) + origin
    index = jnp.where(index < 0, out_BXN.shape[1], index)  # lost, not wrapped

    def contiguous():
      return lax.dynamic_update_slice(out_BXN, rows_BQN, (0, index[0], 0))

    def strided():
      return out_BXN.at[:, index].set(rows_BQN, mode="drop")

    if self.static.strided:
      return lax.cond(self.stride == 1, contiguous, strided)
    return contiguous()

  def accumulate(self, out_BXN, x_class, y_tile, origin, rows_BQN):
    """The same, added to what is there."""
    index = self.rows(x_class, y_tile) + origin
    index = jnp.where(index < 0, out_BXN.shape[1], index)

    def contiguous():
      start = (0, index[0], 0)
      there = lax.dynamic_slice(out_BXN, start, rows_BQN.shape)
      return lax.dynamic_update_slice(out_BXN, there + rows_BQN, start)

    def strided():
      return out_BXN.at[:, index].add(rows_BQN, mode="drop")

    if self.static.strided:
      return lax.cond(self.stride == 1, contiguous, strided)
    return contiguous()


def _forward_head(plan, h, static, q, k, v, seed):
  """(out_BTK, lse_BT1) of one head."""
  B, T, _, K = q.shape
  head = _Head(plan, h, static)
  laid = head.lay_out()
  tile = static.tile

  def query_tile(a, i, carry):
    out_BTK, lse_BT1 = carry
    q_BQK = head.fetch(q, a, i, 0) / jnp.sqrt(K).astype(jnp.float32)

    def key_tile(c, j, slot, carry):
      highest_BQ1, total_BQ1, sum_BQK = carry
      k_BCK = head.fetch(k, c, j, static.origin)
      v_BCK = head.fetch(v, c, j, static.origin)
      logits_BQC, level = head.logits(laid, q_BQK, k_BCK, c, j, slot)
      new_BQ1 = jnp.maximum(
        highest_BQ1, jnp.max(logits_BQC, axis=-1, keepdims=True) + level
      )
      weights_BQC = jnp.exp(logits_BQC - (new_BQ1 - level))
      shrink_BQ1 = jnp.exp(highest_BQ1 - new_BQ1)
      total_BQ1 = total_BQ1 * shrink_BQ1 + jnp.sum(
        weights_BQC, axis=-1, keepdims=True
      )
      if static.dropout_rate:
        kept_BQC = head.kept(seed, B, a, i, c, j)
        weights_BQC = jnp.where(kept_BQC, weights_BQC, 0.0)
      sum_BQK = sum_BQK * shrink_BQ1 + jnp.einsum(
        "bqc,bck->bqk", weights_BQC, v_BCK
      )
      return new_BQ1, total_BQ1, sum_BQK

    highest_BQ1, total_BQ1, sum_BQK = head.for_each_key_tile(
      a,
      i,
      key_tile,
      (
        jnp.full((B, tile, 1), _LOW),
        jnp.zeros((B, tile, 1)),
        jnp.zeros((B, tile, K)),
      ),
    )
    seen_BQ1 = total_BQ1 > 0
    total_BQ1 = jnp.where(seen_BQ1, total_BQ1, 1.0)
    keep = 1 - static.dropout_rate
    # Where nothing was seen the backward pass must find exp(...) = 0.
    row_lse_BQ1 = jnp.where(seen_BQ1, highest_BQ1 + jnp.log(total_BQ1), -_LOW)
    return (
      head.scatter(out_BTK, a, i, 0, sum_BQK / (total_BQ1 * keep)),
      head.scatter(lse_BT1, a, i, 0, row_lse_BQ1),
    )

  return head.for_each_query_tile(
    query_tile, (jnp.zeros((B, T, K)), jnp.zeros((B, T, 1)))
  )


def _backward_head(plan, h, static, q, k, v, out, lse, d_out, seed):
  """(dq_BTK, dk_BSK, dv_BSK, d_features_3S's share) of one head."""
  B, T, _, K = q.shape
  S = k.shape[1]
  head = _Head(plan, h, static)
  laid = head.lay_out()
  sloped = laid[3]
  tile = static.tile
  scale = 1 / jnp.sqrt(K).astype(jnp.float32)

  def query_tile(a, i, carry):
    dq_BTK, *sums = carry
    q_BQK = head.fetch(q, a, i, 0) * scale
    d_out_BQK = head.fetch(d_out, a, i, 0)
    lse_BQ1 = head.fetch(lse, a, i, 0)
    # What softmax takes off: the same with dropout as without.
    mean_BQ1 = jnp.sum(
      d_out_BQK * head.fetch(out, a, i, 0), axis=-1, keepdims=True
    )

    def key_tile(c, j, slot, carry):
      dq_BQK, dk_BSK, dv_BSK, d_bias = carry
      k_BCK = head.fetch(k, c, j, static.origin)
      v_BCK = head.fetch(v, c, j, static.origin)
      logits_BQC, level = head.logits(laid, q_BQK, k_BCK, c, j, slot)
      weights_BQC = jnp.exp(logits_BQC - (lse_BQ1 - level))
      d_weights_BQC = jnp.einsum("bqk,bck->bqc", d_out_BQK, v_BCK)
      dropped_BQC = weights_BQC
      if static.dropout_rate:
        kept_BQC = head.kept(seed, B, a, i, c, j)
        keep = 1 / (1 - static.dropout_rate)
        dropped_BQC = jnp.where(kept_BQC, weights_BQC * keep, 0.0)
        d_weights_BQC = jnp.where(kept_BQC, d_weights_BQC * keep, 0.0)
      d_logits_BQC = weights_BQC * (d_weights_BQC - mean_BQ1)
      d_bias = lax.cond(
        sloped[slot],
        lambda: _put(
          d_bias, slot, d_bias[slot] + jnp.sum(d_logits_BQC, axis=0)
        ),
        lambda: d_bias,
      )
      dk_BCK = jnp.einsum("bqc,bqk->bck", d_logits_BQC, q_BQK)
      dv_BCK = jnp.einsum("bqc,bqk->bck", dropped_BQC, d_out_BQK)
      return (
        dq_BQK + jnp.einsum("bqc,bck->bqk", d_logits_BQC, k_BCK),
        head.accumulate(dk_BSK, c, j, static.origin, dk_BCK),
        head.accumulate(dv_BSK, c, j, static.origin, dv_BCK),
        d_bias,
      )

    dq_BQK, *sums = head.for_each_key_tile(
      a, i, key_tile, (jnp.zeros((B, tile, K)), *sums)
    )
    return head.scatter(dq_BTK, a, i, 0, dq_BQK * scale), *sums

  dq_BTK, dk_BSK, dv_BSK, d_bias = head.for_each_query_tile(
    query_tile,
    (
      jnp.zeros((B, T, K)),
      jnp.zeros((B, S, K)),
      jnp.zeros((B, S, K)),
      jnp.zeros((head.slots(), tile, tile)),
    ),
  )
  return dq_BTK, dk_BSK, dv_BSK, head.table_gradient(d_bias)[None]


def _over_heads(run, H):
  """run(h) for each head, its arrays (B, X, N) put together as (B, X, H, N)."""
  stacked = lax.map(run, jnp.arange(H))
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -2), stacked)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, plan, table, q, k, v, seed):
  return _attend_forward(static, plan, table, q, k, v, seed)[0]


def _attend_forward(static, plan, table, q, k, v, seed):
  del table  # its values stand in the plan; here it takes the gradient

  def run(h):
    return _forward_head(plan, h, static, q, k, v, seed)

  out, lse = _over_heads(run, q.shape[2])
  out = out.astype(q.dtype)
  return out, (plan, q, k, v, out, lse, seed)


def _attend_backward(static, residuals, d_out):
  plan, q, k, v, out, lse, seed = residuals

  def run(h):
    return _backward_head(plan, h, static, q, k, v, out, lse, d_out, seed)

  dq, dk, dv, d_table = _over_heads(run, q.shape[2])
  return (
    jax.tree.map(_no_gradient, plan),
    d_table[0],
    dq.astype(q.dtype),
    dk.astype(k.dtype),
    dv.astype(v.dtype),
    _no_gradient(seed),
  )


def _no_gradient(x):
  if jnp.issubdtype(x.dtype, jnp.floating):
    return jnp.zeros_like(x)
  return jnp.zeros(x.shape, jax.dtypes.float0)


_attend.defvjp(_attend_forward, _attend_backward)


def _features(mask, S):
  """(H, 4, S): log m + log w by distance, and its three derivatives."""
  distance_S = jnp.arange(S)

  def table(span_H, period_H, ratio_H):
    moved = masks.Mask(span_H, mask.ramp, mask.wave)
    if mask.wave is not None:
      wave = mask.wave
      moved = masks.Mask(
        span_H,
        mask.ramp,
        masks.Wave(period_H, ratio_H, wave.harmonics, wave.integer),
      )
    return masks.log_weight(moved, distance_S)

  lengths = [mask.span] * 3
  if mask.wave is not None:
    lengths = [mask.span, mask.wave.period, mask.wave.ratio]
  lengths = [jnp.asarray(x, jnp.float32) for x in lengths]
  ones, zeros = jnp.ones_like(lengths[0]), jnp.zeros_like(lengths[0])
  derivatives = [
    jax.jvp(table, lengths, [ones if i == j else zeros for j in range(3)])[1]
    for i in range(3)
  ]
  return lax.stop_gradient(jnp.stack([table(*lengths), *derivatives], axis=1))


def _prepare(mask, T, S, first_key, dropout_rate=0.0):
  """The static settings and the plan of one call."""
  tile = tile_size(T)
  behind, front = -T % tile, -(S - T) % tile
  strided = mask.wave is not None and mask.wave.integer
  static = _Static(
    T + behind, S + front + behind, tile, front, strided, dropout_rate
  )
  period_H = None
  if strided:
    period_H = jnp.round(mask.wave.period).astype(jnp.int32)
  first = jnp.maximum(jnp.asarray(first_key, jnp.int32), 0) - (S - T)
  return static, make_plan(_features(mask, S), period_H, first, static)


def computed_pairs(mask: masks.Mask, T: int, S: int, first_key=0):
  """(H,) how many pairs (t, s) are computed: all those of the tiles touched."""
  static, plan = _prepare(mask, T, S, first_key)
  open_HR = jnp.zeros((len(plan.stride), MAX_STRIDE), bool)
  rank_R = jnp.arange(MAX_STRIDE)
  open_HR = jax.vmap(lambda row, order, n: row.at[order].set(rank_R < n))(
    open_HR, plan.residues, plan.residue_count
  )
  tiles_H = _count_tiles(static)(plan.stride, plan.last, open_HR, plan.first)
  return tiles_H * static.tile**2


def _padded(x_BXHK, front, behind):
  if not front and not behind:
    return x_BXHK
  return jnp.pad(x_BXHK, ((0, 0), (front, behind), (0, 0), (0, 0)))


def attend(
  q_BTHK, k_BSHK, v_BSHK, mask, *, memory, first_key, dropout_rate, dropout_seed
):
  """The same as `reference.attend`, in time that the masks leave."""
  T, S = q_BTHK.shape[1], k_BSHK.shape[1]
  if mask is None:
    mask = masks.Mask(jnp.full(q_BTHK.shape[2], float(S)), 1.0)
  static, plan = _prepare(mask, T, S, first_key, dropout_rate)
  behind = static.T - T
  seed = jnp.asarray(0 if dropout_seed is None else dropout_seed)
  if memory:
    cut = functools.partial(_cut_gradient, memory=memory)
    k_BSHK, v_BSHK = cut(k_BSHK), cut(v_BSHK)
  out_BTHK = _attend(
    static,
    plan,
    masks.log_weight(mask, jnp.arange(S)),
    _padded(q_BTHK, 0, behind),
    _padded(k_BSHK, static.front, behind),
    _padded(v_BSHK, static.front, behind),
    seed.astype(jnp.uint32),
  )
  return out_BTHK[:, :T]


def _cut_gradient(x_BSHK, memory):
  older = lax.stop_gradient(x_BSHK[:, :memory])
  return jnp.concatenate([older, x_BSHK[:, memory:]], axis=1)
