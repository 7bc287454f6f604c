"""Which tiles of queries and keys hold an open pair, and the walk over them.

Positions are counted as x = t for queries and x = s - (S - T) for keys, so that
a distance is a difference of x. With a stride P they are dealt into P classes,
x = P y + a, and tiles are made of consecutive y of one class:

  d = P (n tile + u - w - b) + rho    for row u and column w of a tile,

where rho = (a - c) mod P for the classes a of the queries and c of the keys,
b = 1 if a < rho, and n is the tile's diagonal. P = 1 is the plain band. Under
an integer wave of period P the comb is one number for each rho, and of the P
classes of keys a query meets those with an open rho alone.

What the masks add to the logits depends on (rho, b, n), the tile's slot, alone.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from adaptive_attention import masks

MAX_STRIDE = 16  # integer waves of longer periods run as a band
_GROUPS = 2  # of query tiles: loops that XLA runs side by side on a CPU
_GATHER_COST = 1.25  # of a tile under a stride, against one of the band


def tile_size(T: int) -> int:
  """Rows and columns of a tile for T queries."""
  return 128 if T >= 512 else 64


class Static(NamedTuple):
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


class Plan(NamedTuple):
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


def make_plan(features_H4S, period_H, first, static) -> Plan:
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
  return Plan(
    stride_H,
    last_H,
    jnp.argsort(~open_HR, axis=-1, stable=True).astype(jnp.int32),
    jnp.sum(open_HR, axis=-1, dtype=jnp.int32),
    features_H4S,
    first,
  )


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


def prepare(mask, T, S, first_key, dropout_rate=0.0):
  """The static settings and the plan of one call."""
  tile = tile_size(T)
  behind, front = -T % tile, -(S - T) % tile
  strided = mask.wave is not None and mask.wave.integer
  static = Static(
    T + behind, S + front + behind, tile, front, strided, dropout_rate
  )
  period_H = None
  if strided:
    period_H = jnp.round(mask.wave.period).astype(jnp.int32)
  first = jnp.maximum(jnp.asarray(first_key, jnp.int32), 0) - (S - T)
  return static, make_plan(_features(mask, S), period_H, first, static)


def computed_pairs(mask: masks.Mask, T: int, S: int, first_key=0):
  """(H,) how many pairs (t, s) are computed: all those of the tiles touched."""
  static, plan = prepare(mask, T, S, first_key)
  open_HR = jnp.zeros((len(plan.stride), MAX_STRIDE), bool)
  rank_R = jnp.arange(MAX_STRIDE)
  open_HR = jax.vmap(lambda row, order, n: row.at[order].set(rank_R < n))(
    open_HR, plan.residues, plan.residue_count
  )
  tiles_H = _count_tiles(static)(plan.stride, plan.last, open_HR, plan.first)
  return tiles_H * static.tile**2


def _toeplitz(segment, tile):
  """(2 tile - 1,) -> (tile, tile): [u, w] = segment[tile - 1 + u - w]."""
  row = jnp.append(segment[::-1], 0.0)
  rows = jnp.tile(row, tile)[: tile * (2 * tile - 1)]
  return rows.reshape(tile, 2 * tile - 1)[:, tile - 1 :]


def put(stack, index, layer):
  """stack[index] = layer, in place within a loop, which a scatter is not."""
  return lax.dynamic_update_index_in_dim(stack, layer, index, 0)


class Head:
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
        put(bias, slot, _toeplitz(value_D, tile)),
        put(flat, slot, is_flat),
        put(level, slot, value_D[0]),
        put(sloped, slot, jnp.any(derivatives_3D != 0)),
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

  def accumulate(self, out_BXN, x_class, y_tile, origin, rows_BQN):
    """Adds a tile's rows where they belong; those beyond the array are lost."""
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
