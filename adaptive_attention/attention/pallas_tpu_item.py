"""What a step of the TPU's grid knows of its item, a block of the walk.

Rows of keys are sublanes and queries are lanes:

  logits[w, u] = k[w] . q[u]    (block_k, block_q)

So the maximum, the sum and the mean of a query are rows of lanes that broadcast
for free, and the log weight is a Toeplitz matrix: one piece of a line of the
head's table, rolled by one more lane in each row. The same roll backwards sums
a gradient along its diagonals.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from adaptive_attention.attention import dropout, walk, walk_items
from adaptive_attention.attention.pallas_tpu_layout import Geometry

LANES = 128
LOG2E = math.log2(math.e)
# A head's integers, and how many there are.
STRIDE, OF_Q, OF_K, BEFORE, HEAD, INTEGERS = range(6)
ITEM_BYTES = 8  # two words
_MOST_BLOCKS = 2**15 - 1  # the largest number that half a word holds
_MOST_HEADS = 2**8  # of the eight bits of a word
_HEAD, _CUT, _A, _RHO, _B = 23, 13, 9, 5, 4  # where they begin, above flags


class Scalars(NamedTuple):
  """What stands in SMEM before a kernel begins.

  Attributes:
    who, where: two words of each item; see `place_of`.
    heads: INTEGERS a head, one head after the other.
    streams: `dropout.stream_hash` of each stream.
  """

  who: jax.Array
  where: jax.Array
  heads: jax.Array
  streams: jax.Array


def refusal_of_words(H, sizes: walk.Sizes) -> str:
  """Returns why two words cannot name each item; "" if they can."""
  blocks = max(walk.row_count(sizes, rows) for rows in "qk")
  if H <= _MOST_HEADS and blocks <= _MOST_BLOCKS:
    return ""
  return (
    f"{H} heads or {blocks} blocks are more than the {_MOST_HEADS} and "
    f"{_MOST_BLOCKS} that an item can name"
  )


def scalars_of(
  listed: walk_items.Items, heads: walk.Heads, inputs, geometry: Geometry
) -> Scalars:
  """Returns what the kernels are told of items, heads and streams.

  The words say which blocks of rows an item reads, so that the index maps of
  the grid, which run in each step for each array, compute next to nothing.
  """
  static, P = geometry.static, heads.stride
  of_q = walk.ceil_div(walk.ceil_div(static.T, P), geometry.block_q)
  before = walk.ceil_div(walk.ceil_div(static.older, P), geometry.block_k)
  of_k = before + walk.ceil_div(walk.ceil_div(static.T, P), geometry.block_k)
  item = listed.item
  h, a = item.head, item.a
  of_items = heads._replace(stride=P[h])
  c, b = walk.key_class(of_items, a, item.rho, geometry.sizes)
  cut = walk.ceil_div(heads.first[h] - c, P[h]) - item.j * geometry.block_k
  cut = jnp.clip(cut, 0, geometry.block_k)
  who = (h << _HEAD) + (cut << _CUT) + (a << _A) + (item.rho << _RHO)
  who += (b << _B) + item.flags
  q, k = a * of_q[h] + item.i, c * of_k[h] + before[h] + item.j
  where = (q << 16) + k
  streams = lax.bitcast_convert_type(inputs.stream_B, jnp.int32)
  numbers = jnp.stack([P, of_q, of_k, before, inputs.head_H], axis=-1)
  return Scalars(who, where, numbers.astype(jnp.int32).reshape(-1), streams)


class Place(NamedTuple):
  """Where an item's block is.

  Attributes:
    head, q, k: the head, and the blocks of rows of its queries and keys.
    line: of the table: (rho, b).
    start: the first entry of its piece of the line; query u and key w have the
      entry start + block_k + u - w.
    cut: how many of its first keys do not exist.
    flags: of `walk_items`.
    x_q, x_k, stride: the x of the first query and key, and P.
  """

  head: jax.Array
  q: jax.Array
  k: jax.Array
  line: jax.Array
  start: jax.Array
  cut: jax.Array
  flags: jax.Array
  x_q: jax.Array
  x_k: jax.Array
  stride: jax.Array


def place_of(geometry: Geometry, scalars: Scalars, g) -> Place:
  """Returns where item g is; in index maps too."""
  who, where = scalars.who[g], scalars.where[g]

  def field(begin, bits):
    return (who >> begin) & ((1 << bits) - 1)

  head, q, k = field(_HEAD, 8), where >> 16, where & 0xFFFF

  def of(number):
    return scalars.heads[head * INTEGERS + number]

  P, a, rho, b, c = 1, 0, 0, 0, 0
  if geometry.static.strided:
    P, a, rho, b = of(STRIDE), field(_A, 4), field(_RHO, 4), field(_B, 1)
    c = a - rho + P * b
  y_q = (q - a * of(OF_Q)) * geometry.block_q
  y_k = (k - c * of(OF_K) - of(BEFORE)) * geometry.block_k
  start = y_q - y_k + geometry.lead - geometry.block_k
  return Place(
    head=head,
    q=q,
    k=k,
    line=2 * rho + b,
    # An empty item, which has no open pair, may lie before the line.
    start=jnp.maximum(start, 0),
    cut=field(_CUT, 10),
    flags=field(0, 4),
    x_q=a + P * y_q,
    x_k=c + P * y_k,
    stride=P,
  )


class Item:
  """The item of this step of the grid.

  Args:
    geometry: static.
    K: the width of a head, without what pads it.
    scalars: `Scalars`, as references.
  """

  def __init__(self, geometry: Geometry, K: int, scalars: Scalars):
    self.geometry, self.static = geometry, geometry.static
    self.g = pl.program_id(1)
    self.place = place_of(geometry, scalars, self.g)
    self.scale = LOG2E / math.sqrt(K)
    self.heads, self.who = scalars.heads, scalars.who
    if self.static.dropout_rate:
      self.stream = scalars.streams[pl.program_id(0)]

  def has(self, flag):
    return (self.place.flags & flag) != 0

  def begins_a_head(self):
    before = self.who[jnp.maximum(self.g - 1, 0)]
    changed = (before ^ self.who[self.g]) >> _HEAD
    return (self.g == 0) | (changed != 0)

  def either(self, body):
    """Calls body(is_full) in the branch that the item wants."""
    full = self.has(walk_items.FULL)
    pl.when(full)(lambda: body(True))
    pl.when(~full)(lambda: body(False))

  def logits(self, k_ref, qT_ref, table_ref, is_full):
    """Returns (block_k, block_q) in units of log 2."""
    geometry = self.geometry
    scores = dot(k_ref[...], qT_ref[...]) * self.scale
    if is_full:  # one weight for all, that of any entry; zero in a band
      at = geometry.block_k
      if not self.static.strided:
        return scores
      return scores + table_ref[0, 0:1, at : at + 1]
    scores += _toeplitz(table_ref, geometry.block_k, geometry.block_q)
    return scores + _cut_column(self.place.cut, geometry.block_k)

  def add_to_table(self, d_table_ref, d_logits, is_full):
    """Adds the gradient of the head's log weights."""
    start, block_k = self.place.start, self.geometry.block_k
    if not is_full:
      _add_diagonals(d_table_ref, self.place.line, start, d_logits)
    elif self.static.strided:
      total = jnp.sum(d_logits, axis=0, keepdims=True)
      total = jnp.sum(total, axis=1, keepdims=True)
      at = pl.multiple_of(start + block_k, LANES)
      lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
      d_table_ref[self.place.line, 0:1, pl.ds(at, LANES)] += jnp.where(
        lane == 0, total, 0.0
      )

  def keep_scale(self):
    """Returns (block_k, block_q) what dropout multiplies by, or None."""
    rate, place = self.static.dropout_rate, self.place
    if not rate:
      return None
    lane = lax.broadcasted_iota(jnp.int32, (1, self.geometry.block_q), 1)
    row = lax.broadcasted_iota(jnp.int32, (self.geometry.block_k, 1), 0)
    head = self.heads[place.head * INTEGERS + HEAD]
    of_query = dropout.row_hash(
      self.stream.astype(jnp.uint32), head, place.x_q + place.stride * lane
    )
    x_k = place.x_k + place.stride * row
    kept = dropout.keep_key(of_query, x_k, rate)
    return jnp.where(kept, 1 / (1 - rate), 0.0)


def dot(x, y):
  """Returns x @ y in float32; float32 is not rounded to bfloat16."""
  precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return lax.dot_general(
    x,
    y,
    (((1,), (0,)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def _toeplitz(table_ref, block_k, block_q):
  """Returns (block_k, block_q) of a piece: entry block_k + u - w at [w, u].

  Squares of 128 on one diagonal are alike, so each is rolled once.
  """
  rows, columns = block_k // LANES, block_q // LANES
  squares = {}
  for c in range(-rows + 1, columns):
    at = block_k + (c - 1) * LANES
    line = table_ref[0, 0:1, at : at + 2 * LANES]
    line = jnp.broadcast_to(line, (LANES, 2 * LANES))
    line = pltpu.roll(line, 0, axis=1, stride=1, stride_axis=0)
    squares[c] = line[:, LANES:]
  lines = [
    jnp.concatenate([squares[u - w] for u in range(columns)], axis=1)
    for w in range(rows)
  ]
  return jnp.concatenate(lines, axis=0)


def _add_diagonals(d_table_ref, line, start, d_logits):
  """Adds the sums along a block's diagonals: `_toeplitz` transposed."""
  block_k, block_q = d_logits.shape
  rows, columns = block_k // LANES, block_q // LANES

  def square(w, u):
    return d_logits[w * LANES : (w + 1) * LANES, u * LANES : (u + 1) * LANES]

  for c in range(-rows + 1, columns):
    total = sum(square(w, w + c) for w in range(rows) if 0 <= w + c < columns)
    at = pl.multiple_of(start + block_k + (c - 1) * LANES, LANES)
    d_table_ref[line, 0:1, pl.ds(at, 2 * LANES)] += _diagonal_sums(total)


def _diagonal_sums(square):
  """Returns (1, 256): of (128, 128) [w, u] the sums at lane 128 + u - w.

  Row w goes w lanes to the left. A roll with a stride goes to the right only.
  So rows are added up eight by eight in a tree of plain rolls, and what is left
  of a row's shift, 0 to 7, is made bit by bit.
  """
  width = 2 * LANES
  rows = jnp.concatenate([jnp.zeros_like(square), square], axis=1)
  groups = [rows[r : r + 8] for r in range(0, LANES, 8)]
  step = 8
  while len(groups) > 1:
    groups = [
      one + pltpu.roll(next_one, width - step, axis=1)
      for one, next_one in zip(groups[::2], groups[1::2], strict=True)
    ]
    step *= 2
  (x,) = groups
  row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
  for bit in (1, 2, 4):
    x = jnp.where((row & bit) != 0, pltpu.roll(x, width - bit, axis=1), x)
  return jnp.sum(x, axis=0, keepdims=True)


def _cut_column(cut, block_k):
  """Returns (block_k, 1): -inf for the keys that do not exist, else zero."""
  row = lax.broadcasted_iota(jnp.int32, (block_k, 1), 0)
  return jnp.where(row < cut, -jnp.inf, 0.0)
