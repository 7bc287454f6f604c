"""Which tiles of queries and keys hold an open pair, and the walk over them.

Positions are counted as x = t for queries and x = s - (S - T) for keys, so that
a distance is a difference of x. With a stride P they are dealt into P classes,
x = P y + a, and tiles are made of consecutive y of one class:

  d = P (TILE n + u - w - b) + rho    for row u and column w of a tile,

where rho = (a - c) mod P for the classes a of the queries and c of the keys,
b = 1 if a < rho, and n is the tile's diagonal. P = 1 is the plain band. Under
an integer wave of period P the comb is one number for each rho, and of the P
classes of keys a query meets those with an open rho alone.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from adaptive_attention import masks
from adaptive_attention.attention.layout import (
  MAX_STRIDE,
  TILE,
  Layout,
  ceil_div,
)

_STRIDE_COST = 1.1  # of a tile under a stride, against one of the band


class Static(NamedTuple):
  """What is known when the function is traced."""

  T: int
  S: int
  memory: int
  strided: bool  # whether a head may have a stride other than one
  dropout_rate: float
  ring: bool = False  # whether keys are read out of a `Ring`
  # Of products: what jax.default_matmul_precision is where `attend` is called.
  precision: str | None = None

  @property
  def origin(self):
    """The index of the key at x = 0."""
    return self.S - self.T


class Plan(NamedTuple):
  """Of each head: how its tiles are walked; integers alone.

  Attributes:
    stride: (H,) P.
    last: (H,) the largest open distance; -1 if there is none.
    residues: (H, MAX_STRIDE) the open rho, in front.
    residue_count: (H,) how many these are.
    first: the x of the first key that exists.
    even: (H,) the distance up to which the table is one number for each rho.
  """

  stride: jax.Array
  last: jax.Array
  residues: jax.Array
  residue_count: jax.Array
  first: jax.Array
  even: jax.Array


def _integers(count):
  """0, 1, ..., count - 1 in 32 bits, whatever JAX's default is."""
  return jnp.arange(count, dtype=jnp.int32)


def _query_tiles(static, stride, a):
  """How many tiles the queries of class a fill."""
  return ceil_div(ceil_div(static.T - a, stride), TILE)


def _diagonals(stride, last, rho, b):
  """How many diagonals n = 0, 1, ... hold a distance up to `last`."""
  count = ceil_div((last - rho) // stride + b, TILE) + 1
  return jnp.where(last >= rho, count, 0)


def _even_diagonals(stride, even, rho, b):
  """How many diagonals n = 1, 2, ... hold no distance beyond `even`."""
  return ((even - rho) // stride + b + 1) // TILE - 1


def _existing(stride, first, key_class, i):
  """How many diagonals of query tile i hold a key from x = `first` on."""
  y_first = ceil_div(first - key_class, stride)
  return jnp.maximum(i - y_first // TILE + 1, 0)


def tile_counts(static, stride, last, open_residue, first):
  """The number of tiles that one head touches under a stride.

  Args:
    stride: P, at most MAX_STRIDE.
    last: its largest open distance.
    open_residue: (MAX_STRIDE,) whether rho is open; those from P on do not
      count.
    first: the x of the first key that exists.
  """
  P = stride
  a = _integers(MAX_STRIDE if static.strided else 1)[:, None, None]
  i = _integers(ceil_div(static.T, TILE))[None, :, None]
  rho = _integers(MAX_STRIDE)[None, None]
  b = (a < rho).astype(jnp.int32)
  count = jnp.minimum(
    _diagonals(P, last, rho, b),
    _existing(P, first, a - rho + P * b, i),
  )
  meets = (a < P) & (i < _query_tiles(static, P, a))
  meets &= (rho < P) & open_residue[None, None]
  return jnp.sum(jnp.where(meets, count, 0), dtype=jnp.int32)


def _over_heads(static):
  """tile_counts of all heads: (stride_H, last_H, open_residue_HR, first)."""
  return jax.vmap(
    functools.partial(tile_counts, static), in_axes=(0, 0, 0, None)
  )


def make_plan(mask, table_HS, first, static) -> Plan:
  """Chooses each head's stride: of 1 and its period the one with less work."""
  table_HS = lax.stop_gradient(table_HS)
  open_HS = table_HS > -jnp.inf
  H, S = open_HS.shape
  last_H = jnp.max(jnp.where(open_HS, _integers(S)[None], -1), axis=-1)
  # m falls with the distance: a residue is open if its least distance is.
  least_HR = open_HS[:, :MAX_STRIDE]
  least_HR = jnp.pad(least_HR, ((0, 0), (0, max(0, MAX_STRIDE - S))))
  band_HR = jnp.broadcast_to(_integers(MAX_STRIDE) == 0, least_HR.shape)
  count = _over_heads(static)
  stride_H = jnp.ones(H, jnp.int32)
  if static.strided:
    period_H = jnp.round(mask.wave.period).astype(jnp.int32)
    band_H = count(stride_H, last_H, band_HR, first)
    strides_H = jnp.clip(period_H, 1, MAX_STRIDE)
    strided_H = count(strides_H, last_H, least_HR, first)
    strided_cost_H = _STRIDE_COST * strided_H.astype(jnp.float32)
    worth = strided_cost_H < band_H.astype(jnp.float32)
    stride_H = jnp.where(worth & (period_H == strides_H), strides_H, 1)
  open_HR = jnp.where(stride_H[:, None] == 1, band_HR, least_HR)
  open_HR &= _integers(MAX_STRIDE)[None] < stride_H[:, None]
  open_HR &= last_H[:, None] >= 0
  # There m = 1 and without a slope; a token less, as m is rounded.
  even_H = jnp.ceil(lax.stop_gradient(mask.span)).astype(jnp.int32) - 2
  if mask.wave is not None:
    even_H = jnp.where(stride_H == 1, -1, even_H)
  return Plan(
    stride_H,
    last_H,
    jnp.argsort(~open_HR, axis=-1, stable=True).astype(jnp.int32),
    jnp.sum(open_HR, axis=-1, dtype=jnp.int32),
    first,
    even_H,
  )


def prepare(mask, T, S, memory=0, first_key=0, dropout_rate=0.0, ring=False):
  """(static, plan, table_HS) of one call.

  The table holds log m + log w by distance. It is differentiable.
  """
  strided = mask.wave is not None and mask.wave.integer
  precision = jax.config.jax_default_matmul_precision
  static = Static(T, S, memory, strided, dropout_rate, ring, precision)
  first = jnp.clip(jnp.asarray(first_key), 0, S).astype(jnp.int32)
  first = first - static.origin
  table_HS = masks.log_weight(mask, _integers(S))
  return static, make_plan(mask, table_HS, first, static), table_HS


@functools.partial(jax.jit, static_argnums=(1, 2))
def touched(mask: masks.Mask, T: int, S: int, first_key=0):
  """(H,) how many tiles are computed for T queries and S keys."""
  static, plan, _ = prepare(mask, T, S, first_key=first_key)
  rank_R = _integers(MAX_STRIDE)
  open_HR = jax.vmap(
    lambda order, n: jnp.zeros(MAX_STRIDE, bool).at[order].set(rank_R < n)
  )(plan.residues, plan.residue_count)
  return _over_heads(static)(plan.stride, plan.last, open_HR, plan.first)


def _toeplitz(segment):
  """(2 TILE - 1,) -> (TILE, TILE): [u, w] = segment[TILE - 1 - u + w]."""
  return skew(jnp.broadcast_to(segment, (TILE, 2 * TILE - 1)))


def _toeplitz_sum(tile):
  """`_toeplitz` transposed: sums along the diagonals."""
  return jnp.sum(unskew(tile), axis=0)


def skew(x):
  """(..., TILE, 2 TILE - 1) -> (..., TILE, TILE), shifting row by row.

  [u, w] = x[u, TILE - 1 - u + w]: with the distances of a `KeyTile` along the
  last axis of x, each pair gets what stands at its own. In rows one longer and
  laid end to end that is a slice.
  """
  lead = x.shape[:-2]
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)])
  x = x.reshape(*lead, TILE * 2 * TILE)
  x = x[..., TILE - 1 : TILE - 1 + TILE * (2 * TILE - 1)]
  return x.reshape(*lead, TILE, 2 * TILE - 1)[..., :TILE]


def unskew(y):
  """`skew` transposed: each pair's number goes to its distance."""
  lead = y.shape[:-2]
  y = jnp.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, TILE - 1)])
  y = y.reshape(*lead, TILE * (2 * TILE - 1))
  y = jnp.pad(y, [(0, 0)] * (y.ndim - 1) + [(TILE - 1, 1)])
  return y.reshape(*lead, TILE, 2 * TILE)[..., :-1]


def at_distances(relative_RK, tile):
  """(2 TILE - 1, K) the vectors of a tile's distances; zeros beyond R."""
  if relative_RK is None:
    return None
  R = len(relative_RK)
  vectors_DK = relative_RK[jnp.clip(tile.distance, 0, R - 1)]
  return jnp.where((tile.distance < R)[:, None], vectors_DK, 0.0)


def added_at(x, distance, rows):
  """x with rows added at their distances, but for those that it lacks.

  Of negative distances, which no pair has, the rows are zeros.
  """
  return x.at[distance].add(rows, mode="drop")


class KeyTile(NamedTuple):
  """A tile of keys, and what the masks add to its logits.

  Attributes:
    row: of its first key in a local array.
    new_row: the same in one of newer keys alone.
    x: (TILE,) positions of its keys.
    bias: (TILE, TILE) log m + log w; -inf for keys that do not exist. Of an
      even tile, where all pairs are open, one number for all; None for zero.
    distance: (2 TILE - 1,) the distances of its diagonals, descending.
    older: static; whether there are keys of the memory alone.
  """

  row: jax.Array
  new_row: jax.Array
  x: jax.Array
  bias: jax.Array | None
  distance: jax.Array
  older: bool


def layouts(static, stride=1):
  """Those of queries, of keys, and of the keys that are not memory."""
  T, strided = static.T, static.strided
  return (
    Layout(stride, 0, T, strided),
    Layout(stride, static.origin, T, strided, static.ring),
    Layout(stride, static.origin - static.memory, T, strided),
  )


class Head:
  """One head's walk over its tiles, forward and backward alike."""

  def __init__(self, plan, table_HS, h, static):
    self.h, self.static, self.plan, self.table = h, static, plan, table_HS
    self.stride = plan.stride[h]
    self.last = plan.last[h]
    self.queries, self.keys, self.new_keys = layouts(static, self.stride)
    # No tile goes further back than the most diagonals from the first one.
    most = _diagonals(self.stride, self.last, 0, 1)
    self.first_key_y = self.keys.reach(-most * TILE)
    self.first_new_y = self.new_keys.reach(-most * TILE)

  def for_each_query_tile(self, body, carry):
    """body(a, i, carry) over all queries; those of a class in ascending y.

    The last tile of a class goes beyond its end, into the rows of the next,
    which come later.
    """

    def of_class(a, carry):
      count = _query_tiles(self.static, self.stride, a)
      return lax.fori_loop(0, count, functools.partial(body, a), carry)

    return self.queries.over_classes(of_class, carry)

  def query_row(self, a, i):
    return self.queries.row(a, i * TILE)

  def query_x(self, a, i):
    """(TILE,) the positions of the queries of a tile."""
    return a + self.stride * (i * TILE + _integers(TILE))

  def for_each_key_tile(self, a, i, body, carry):
    """body(KeyTile, carry) over what query tile i of class a meets."""
    static, plan = self.static, self.plan

    def residue(r, carry):
      rho = plan.residues[self.h, r]
      b = (a < rho).astype(jnp.int32)
      c = a - rho + self.stride * b

      def existing(x_first):
        return _existing(self.stride, x_first, c, i)

      def walk(even, older, diagonal, start, end, carry):
        def one(j, carry):
          return body(
            self._key_tile(i, rho, b, c, diagonal(j), even, older), carry
          )

        return lax.fori_loop(start, end, one, carry)

      count = _diagonals(self.stride, self.last, rho, b)
      count = jnp.minimum(count, existing(plan.first))
      # Diagonals 1 to `even` are even; 0 is cut by the query itself, and the
      # last that exists by the first key.
      even = _even_diagonals(self.stride, plan.even[self.h], rho, b)
      even = jnp.clip(even, 0, jnp.maximum(count - 2, 0))
      newer = count
      if static.memory:
        newer = jnp.minimum(count, existing(static.memory - static.origin))
      newer_even = jnp.clip(newer - 1, 0, even)

      def uneven(j):
        return jnp.where(j == 0, 0, j + even)

      carry = walk(False, False, uneven, 0, newer - newer_even, carry)
      carry = walk(True, False, lambda n: n, 1, 1 + newer_even, carry)
      if static.memory:
        carry = walk(True, True, lambda n: n, 1 + newer_even, 1 + even, carry)
        carry = walk(
          False, True, uneven, newer - newer_even, count - even, carry
        )
      return carry

    if not static.strided:
      return residue(0, carry)
    return lax.fori_loop(0, plan.residue_count[self.h], residue, carry)

  def _key_tile(self, i, rho, b, c, n, even, older):
    plan, S = self.plan, self.static.S
    y = (i - n) * TILE
    x = c + self.stride * (y + _integers(TILE))
    distance = n * TILE - b + TILE - 1 - _integers(2 * TILE - 1)
    distance = self.stride * distance + rho
    if not even:
      added = self.table[self.h, jnp.clip(distance, 0, S - 1)]
      added = jnp.where((distance >= 0) & (distance < S), added, -jnp.inf)
      exists_1C = (x >= plan.first)[None]
      bias = jnp.where(exists_1C, _toeplitz(added), -jnp.inf)
    elif self.static.strided:
      bias = self.table[self.h, rho]
    else:
      bias = None
    rows = self.keys.row(c, y), self.new_keys.row(c, y)
    return KeyTile(*rows, x, bias, distance, older)

  def add_to_table(self, d_table_S, tile, d_logits_BQC):
    """The gradient of the table with that of a tile's logits added."""
    if tile.bias is None:  # the table has no slope there
      return d_table_S
    if tile.bias.ndim == 0:
      rho = tile.distance[-1] % self.stride
      return d_table_S.at[rho].add(jnp.sum(d_logits_BQC))
    segment = _toeplitz_sum(jnp.sum(d_logits_BQC, axis=0))
    return added_at(d_table_S, tile.distance, segment)
