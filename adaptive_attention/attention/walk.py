"""Tells which blocks of queries and keys hold an open pair, in integers alone.

Positions are counted as x = t for queries and x = s - (S - T) for keys, so that
a distance is a difference of x. A head with the stride P deals them into P
residue classes, x = P y + a. A block is made of consecutive y of one
residue class: `block_q` of queries by `block_k` of keys. Blocks begin at
multiples of their size in y, also those of keys below zero. The distance
between a query of residue class a and a key of residue class c is

  d = P (y_q - y_k - b) + rho,  rho = (a - c) mod P,  b = 1 if a < rho else 0

Under an integer wave of period P the wave is one number for each residue, so a
head with the stride P walks the open residues alone. P = 1 is the band.

An implementation reads a head's integers (`Heads`) and asks `key_blocks` or
`query_blocks` between which ends it has to walk. Both give each block that
holds an open pair of an existing query and an existing key, and no other. There
is one exception: for a head of stride 1 under a wave all distances up to its
last open one count as open. Spans, periods and the first key are run-time
values.

These functions work on scalars, and serve in a Pallas kernel as well as in XLA:
they have no constant arrays, Python integers stay Python integers, and the only
division is `lax.div`, which rounds to zero.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

MAX_STRIDE = 16  # integer waves of longer periods run as a band
_STRIDE_COST = 1.1  # a block under a stride costs as much as 1.1 of the band


class Sizes(NamedTuple):
  """Static sizes: T queries, S keys, the rows of a block of either.

  Attributes:
    strided: whether a head may have a stride other than one. Where it may not,
      residue classes and residues are Python's zero, and nothing is divided
      by P.
  """

  T: int
  S: int
  block_q: int
  block_k: int
  strided: bool = False

  @property
  def older(self) -> int:
    """How many keys stand before the first query."""
    return self.S - self.T


class Heads(NamedTuple):
  """How heads are walked; for one head, without the leading axis.

  Attributes:
    stride: (H,) P.
    last: (H,) the largest open distance; -1 if there is none.
    full: (H,) the distance up to which all open pairs of one residue have one
      log weight without a slope by distance; negative if there is none.
    first: (H,) the x of the first key that exists.
    residues: (H, MAX_STRIDE) first the open residues, then what means nothing.
    residue_count: (H,) how many residues are open.
  """

  stride: jax.Array
  last: jax.Array
  full: jax.Array
  first: jax.Array
  residues: jax.Array
  residue_count: jax.Array


def floor_div(x, y):
  """Returns x // y for y > 0, a Python integer if both are."""
  if isinstance(y, int) and (y == 1 or isinstance(x, int)):
    return x // y if y > 1 else x
  # Python's integers take the other's type, whatever JAX's default is.
  x, y = (_like(other, n) for n, other in ((x, y), (y, x)))
  quotient = lax.div(x, y)
  return jnp.where(quotient * y > x, quotient - 1, quotient)


def _like(other, n):
  """Returns a Python integer in the type of the other; an array as it is."""
  return other.dtype.type(n) if isinstance(n, int) else n


def ceil_div(x, y):
  """Returns x / y rounded up, for y > 0."""
  return -floor_div(-x, y)


def to_int(condition):
  """Returns 1 for true and 0 for false."""
  if isinstance(condition, bool):
    return int(condition)
  return condition.astype(jnp.int32)


def stride_of(head: Heads, sizes: Sizes):
  """Returns P, which is Python's 1 where no head has another."""
  return head.stride if sizes.strided else 1


def key_class(head: Heads, a, rho, sizes: Sizes):
  """Returns (c, b) of the keys that residue class a meets at residue rho."""
  b = to_int(a < rho)
  return a - rho + stride_of(head, sizes) * b, b


def query_class(head: Heads, c, rho, sizes: Sizes):
  """Returns (a, b) of the queries that residue class c meets at residue rho."""
  P = stride_of(head, sizes)
  b = to_int(c + rho >= P)
  return c + rho - P * b, b


def _ordered(start, full_start, full_stop, stop):
  """Returns the ends with the full blocks cut down to the walked ones."""
  full_start = jnp.minimum(jnp.maximum(full_start, start), stop)
  full_stop = jnp.minimum(jnp.maximum(full_stop, full_start), stop)
  return start, full_start, full_stop, stop


def key_blocks(head: Heads, a, y_q, rho, sizes: Sizes):
  """Returns the ends between which a query block walks the keys of a residue.

  Args:
    head: the integers of one head.
    a, y_q: residue class and first y of the query block.
    rho: an open residue.
    sizes: static.

  Returns:
    (start, full_start, full_stop, stop). Key block j, which begins at
    y = j block_k, is walked for j in [start, stop). It is full for j in
    [full_start, full_stop): all its pairs (of queries that exist) are open and
    have one log weight.
  """
  P, block_k = stride_of(head, sizes), sizes.block_k
  c, b = key_class(head, a, rho, sizes)
  y_first = ceil_div(head.first - c, P)
  newest = ceil_div(sizes.T - a, P)
  # The y of the newest query in the block.
  newest = jnp.minimum(y_q + sizes.block_q, newest) - 1
  low = jnp.maximum(y_q - b - floor_div(head.last - rho, P), y_first)
  high = newest - b
  there = (head.last >= rho) & (y_q <= newest) & (low <= high) & (a < P)
  start = floor_div(low, block_k)
  stop = jnp.where(there, floor_div(high, block_k) + 1, start)
  low = jnp.maximum(high - floor_div(head.full - rho, P), y_first)
  full_stop = floor_div(y_q - b + 1, block_k)
  return _ordered(start, ceil_div(low, block_k), full_stop, stop)


def query_blocks(head: Heads, c, y_k, rho, sizes: Sizes):
  """Returns the ends between which a key block walks the queries of a residue.

  These are the blocks of `key_blocks` from the side of the keys. Query block i,
  which begins at y = i block_q, is walked for i in [start, stop) and full for i
  in [full_start, full_stop).
  """
  P, block_q = stride_of(head, sizes), sizes.block_q
  a, b = query_class(head, c, rho, sizes)
  y_first = ceil_div(head.first - c, P)
  newest = y_k + sizes.block_k - 1  # the y of the newest key in the block
  last_query = ceil_div(sizes.T - a, P) - 1
  low = jnp.maximum(jnp.maximum(y_k, y_first) + b, 0)
  high = newest + b + floor_div(head.last - rho, P)
  high = jnp.minimum(high, last_query)
  there = (head.last >= rho) & (y_first <= newest) & (low <= high) & (c < P)
  start = floor_div(low, block_q)
  stop = jnp.where(there, floor_div(high, block_q) + 1, start)
  high = y_k + b + floor_div(head.full - rho, P)
  full_stop = jnp.where(last_query <= high, stop, floor_div(high + 1, block_q))
  full_stop = jnp.where(y_first <= y_k, full_stop, start)
  return _ordered(start, ceil_div(newest + b, block_q), full_stop, stop)


def over_residues(head: Heads, body, carry, sizes: Sizes):
  """Returns the carry after body(rho, carry) for each open residue."""
  if not sizes.strided:
    return body(0, carry)
  return lax.fori_loop(
    0,
    head.residue_count,
    lambda r, carry: body(head.residues[r], carry),
    carry,
  )


def over_blocks(ends, body, carry):
  """Returns the carry after body(block, is_full, carry) between the ends.

  `is_full` is static: the partial blocks come before the full ones. Each kind
  comes from the last block to the first.
  """
  start, full_start, full_stop, stop = ends
  after, full = stop - full_stop, full_stop - full_start

  def partial(n, carry):
    skipped = jnp.where(n < after, 0, full)
    return body(stop - 1 - n - skipped, False, carry)

  carry = lax.fori_loop(0, after + full_start - start, partial, carry)
  return lax.fori_loop(
    0, full, lambda n, carry: body(full_stop - 1 - n, True, carry), carry
  )


# What follows is for XLA alone: arrays over all heads and blocks.


def heads_of(mask, table_HS, first_key, sizes: Sizes) -> Heads:
  """Returns the integers of all heads.

  A head under an integer wave gets the stride of its period if its blocks then
  cost less than those of the band; see _STRIDE_COST.

  Args:
    mask: a `masks.Mask`.
    table_HS: (H, S) log m + log w by distance; -inf where hidden.
    first_key: keys before this index do not exist.
    sizes: static.
  """
  open_HS = lax.stop_gradient(table_HS) > -jnp.inf
  H, S = open_HS.shape
  distance_S = jnp.arange(S, dtype=jnp.int32)
  last_H = jnp.max(jnp.where(open_HS, distance_S[None], -1), axis=-1)
  first = jnp.clip(first_key, 0, S).astype(jnp.int32) - sizes.older
  # m is 1 without a slope at d < z; this is one token less, as m is rounded.
  full_H = jnp.ceil(lax.stop_gradient(mask.span)).astype(jnp.int32) - 2
  one_H = jnp.ones(H, jnp.int32)
  band = Heads(
    *(one_H, last_H, full_H if mask.wave is None else -one_H),
    jnp.full(H, first),
    jnp.zeros((H, MAX_STRIDE), jnp.int32),
    (last_H >= 0).astype(jnp.int32),
  )
  if not sizes.strided:
    return band
  period_H = jnp.round(lax.stop_gradient(mask.wave.period)).astype(jnp.int32)
  stride_H = jnp.clip(period_H, 1, MAX_STRIDE)
  # m falls with the distance: a residue is open if its least distance is.
  least_HR = open_HS[:, :MAX_STRIDE]
  least_HR = jnp.pad(least_HR, ((0, 0), (0, max(0, MAX_STRIDE - S))))
  rho_1R = jnp.arange(MAX_STRIDE, dtype=jnp.int32)[None]
  least_HR &= rho_1R < stride_H[:, None]
  strided = band._replace(
    stride=stride_H,
    full=full_H,
    residues=jnp.argsort(~least_HR, axis=-1, stable=True).astype(jnp.int32),
    residue_count=jnp.sum(least_HR, axis=-1, dtype=jnp.int32),
  )
  cost_H = _STRIDE_COST * block_count(strided, sizes).astype(jnp.float32)
  worth_H = cost_H < block_count(band, sizes).astype(jnp.float32)
  worth_H &= strided.stride == period_H
  return jax.tree.map(
    lambda x, y: jnp.where(worth_H.reshape(H, *(1,) * (x.ndim - 1)), x, y),
    strided,
    band,
  )


class Rows(NamedTuple):
  """The blocks of queries or of keys, one residue class after the other.

  No block has rows of two residue classes.

  Attributes:
    group: the residue class, a of queries or c of keys; P or more in spare
      blocks.
    y: the y of the block's first row.
  """

  group: jax.Array
  y: jax.Array


def row_count(sizes: Sizes, rows) -> int:
  """Returns N, the most blocks of queries ("q") or keys ("k") of any stride.

  Each residue class has whole blocks, on either side of zero.
  """
  spare = MAX_STRIDE if sizes.strided else 0
  if rows == "q":
    return ceil_div(sizes.T, sizes.block_q) + spare
  before, after = (ceil_div(x, sizes.block_k) for x in (sizes.older, sizes.T))
  return before + after + (2 * spare if before else spare)


def rows_of(stride, sizes: Sizes, rows) -> Rows:
  """Returns (N,) the blocks of queries (rows="q") or keys ("k") of one head.

  All residue classes have the same number of blocks, from the same y on. Those
  of keys begin below zero where there are older keys.
  """
  P = stride if sizes.strided else 1
  block = sizes.block_q if rows == "q" else sizes.block_k
  older = 0 if rows == "q" else sizes.older
  before = ceil_div(ceil_div(older, P), block)
  of_class = before + ceil_div(ceil_div(sizes.T, P), block)
  n = jnp.arange(row_count(sizes, rows), dtype=jnp.int32)
  group = n // of_class
  return Rows(group, (n - group * of_class - before) * block)


def ends_of(heads: Heads, sizes: Sizes, rows="q"):
  """Returns (ends, Rows): what each block of `rows_of` walks, for all heads.

  The ends are those of `key_blocks` for rows="q" and of `query_blocks` for
  "k". Each is (H, N, R), by the rank of a residue among a head's open residues.
  At ranks beyond these nothing is walked.
  """
  walk = key_blocks if rows == "q" else query_blocks
  rank_R = jnp.arange(MAX_STRIDE if sizes.strided else 1, dtype=jnp.int32)

  def of_residue(head, group, y, rank):
    ends = walk(head, group, y, head.residues[rank], sizes)
    return [jnp.where(rank < head.residue_count, end, ends[0]) for end in ends]

  def of_head(head):
    blocks = rows_of(head.stride, sizes, rows)
    over_ranks = jax.vmap(of_residue, (None, None, None, 0))
    over_blocks = jax.vmap(over_ranks, (None, 0, 0, None))
    return over_blocks(head, *blocks, rank_R), blocks

  return jax.vmap(of_head)(heads)


def counts(heads: Heads, sizes: Sizes, rows="q"):
  """Returns (H, N, R) how many blocks each block walks; see `ends_of`."""
  (start, _, _, stop), _ = ends_of(heads, sizes, rows)
  return stop - start


def block_count(heads: Heads, sizes: Sizes):
  """Returns (H,) how many blocks are computed."""
  return jnp.sum(counts(heads, sizes), axis=(1, 2), dtype=jnp.int32)
