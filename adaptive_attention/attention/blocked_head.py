"""One head of `blocked`: its walk over blocks, and what each block holds."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from adaptive_attention.attention import blocked_bias, dropout, walk
from adaptive_attention.attention.heads_and_segments import Segments
from adaptive_attention.attention.layout import BLOCK, Layout


class Static(NamedTuple):
  """What is known when the function is traced.

  Attributes:
    memory: how many of the first keys get no gradient.
    ring: whether keys are read out of a `Ring`.
    precision: the jax.default_matmul_precision under which `attend` was called.
  """

  sizes: walk.Sizes
  memory: int = 0
  dropout_rate: float = 0.0
  ring: bool = False
  precision: str | None = None


class SegmentWalk(NamedTuple):
  """The segments of one sequence, and from where on its queries read.

  Attributes:
    ids: `Segments` of B = 1.
    first_BT: the x of the first key in each query's segment.
  """

  ids: Segments
  first_BT: jax.Array


class QueryBlock(NamedTuple):
  """BLOCK queries of one residue class.

  Attributes:
    a, y: their residue class, and the y of the first query.
    row: the row of the first query in a local array.
    x: (BLOCK,) their positions.
    first: the x of the first key that any of them may attend to.
  """

  a: jax.Array
  y: jax.Array
  row: jax.Array
  x: jax.Array
  first: jax.Array


class KeyBlock(NamedTuple):
  """BLOCK keys of one residue class, and what the masks add to their logits.

  Attributes:
    row: the row of the first key in a local array of all keys.
    new_row: its row in a local array of the keys that are not memory.
    x: (BLOCK,) their positions.
    bias: (BLOCK, BLOCK) log m + log w; -inf for keys that do not exist. For a
      full block it is one number for all pairs, or None for zero.
    alike: (BLOCK, BLOCK) whether a pair lies in one segment; None where all do.
    distance: (2 BLOCK - 1,) the distances of the diagonals, descending.
    older: static; whether all keys of the block are memory.
  """

  row: jax.Array
  new_row: jax.Array
  x: jax.Array
  bias: jax.Array | None
  alike: jax.Array | None
  distance: jax.Array
  older: bool


def layouts(static, stride=1):
  """Returns the layouts of queries, keys, and keys that are not memory."""
  T, older, strided = static.sizes.T, static.sizes.older, static.sizes.strided
  return (
    Layout(stride, 0, T, strided),
    Layout(stride, older, T, strided, static.ring),
    Layout(stride, older - static.memory, T, strided),
  )


class Head:
  """One head's walk over its blocks, forward and backward alike."""

  def __init__(
    self,
    static,
    heads: walk.Heads,
    table_HS,
    segments: SegmentWalk | None,
    h,
    group: int = 1,
  ):
    self.static, self.sizes, self.h = static, static.sizes, h
    self.key_h = h // group  # the head of the keys
    self.table_HS, self.segments = table_HS, segments
    self.walked = jax.tree.map(lambda x: x[h], heads)
    self.stride = self.walked.stride
    self.queries, self.keys, self.new_keys = layouts(static, self.stride)
    # No block is further back from the first query than that of `last`.
    back = walk.ceil_div(self.walked.last // self.stride + 1, BLOCK) * BLOCK
    self.first_key_y = self.keys.existing(-back)
    self.first_new_y = self.new_keys.existing(-back)

  def loaded(self, scratch, queries, ring):
    """Returns the scratch with this head's rows loaded.

    Args:
      scratch: local arrays by name.
      queries: arrays (B, T, H, ...) by name; each goes to the local array of
        its name.
      ring: a `Ring` whose keys and values go to the local arrays k and v.
    """
    local = dict(scratch)
    for name, array in queries.items():
      local[name] = self.queries.load(local[name], array, self.h, 0)
    for name, array in (("k", ring.k_NSHK), ("v", ring.v_NSHK)):
      local[name] = self.keys.load(
        *(local[name], array, self.key_h, self.first_key_y),
        *(self.walked.first, ring.first_row, ring.batch),
      )
    return local

  def over_query_blocks(self, body, carry):
    """Returns the carry after body(QueryBlock, carry) for all query blocks.

    Those of a residue class come in ascending y. The last block of a residue
    class goes beyond its end, into rows of the next, which are computed later.
    """

    def of_class(a, carry):
      def one(i, carry):
        y = i * BLOCK
        y_Q = y + jnp.arange(BLOCK, dtype=jnp.int32)
        row = self.queries.row(a, y)
        x = a + self.stride * y_Q
        return body(QueryBlock(a, y, row, x, self._first(x)), carry)

      count = walk.ceil_div(self.sizes.T - a, self.stride)
      return jax.lax.fori_loop(0, walk.ceil_div(count, BLOCK), one, carry)

    return self.queries.over_classes(of_class, carry)

  def _first(self, x):
    """Returns the x of the first key that queries at x may attend to."""
    if self.segments is None:
      return self.walked.first
    T = self.sizes.T
    first_Q = self.segments.first_BT[0, jnp.minimum(x, T - 1)]
    return jnp.maximum(self.walked.first, jnp.min(first_Q))

  def _alike(self, x_q, x_k):
    """Returns (Q, C) whether a pair lies in one segment; None where all do."""
    if self.segments is None:
      return None
    T, S = self.sizes.T, self.sizes.S
    query_T, key_S = (x[0] for x in self.segments.ids)
    query_Q = query_T[jnp.clip(x_q, 0, T - 1)]
    key_C = key_S[jnp.clip(x_k + self.sizes.older, 0, S - 1)]
    return query_Q[:, None] == key_C[None]

  def over_key_blocks(self, queries: QueryBlock, body, carry):
    """Returns the carry after body(KeyBlock, carry) for blocks they meet."""
    static, sizes = self.static, self.sizes
    walked = self.walked._replace(first=queries.first)

    def residue(rho, carry):
      ends = walk.key_blocks(walked, queries.a, queries.y, rho, sizes)
      parts = [(False, ends)]
      if static.memory:
        c, _ = walk.key_class(self.walked, queries.a, rho, sizes)
        newer = self.first_new(c) // BLOCK
        parts = [
          (False, [jnp.maximum(end, newer) for end in ends]),
          (True, [jnp.minimum(end, newer) for end in ends]),
        ]
      for older, part in parts:

        def one(j, is_full, carry, older=older):
          keys = self.key_block(queries, rho, j, is_full, older)
          return body(keys, carry)

        carry = walk.over_blocks(part, one, carry)
      return carry

    return walk.over_residues(self.walked, residue, carry, sizes)

  def first_new(self, c):
    """Returns the y of a residue class's first key that is not memory."""
    first_x = self.static.memory - self.sizes.older
    return walk.ceil_div(first_x - c, self.stride)

  def key_block(self, queries, rho, j, is_full, older) -> KeyBlock:
    """Returns key block j of those that the queries meet at a residue."""
    c, b = walk.key_class(self.walked, queries.a, rho, self.sizes)
    y = j * BLOCK
    x = c + self.stride * (y + jnp.arange(BLOCK, dtype=jnp.int32))
    diagonal = jnp.arange(2 * BLOCK - 1, dtype=jnp.int32)
    distance = queries.y - y - b + BLOCK - 1 - diagonal
    distance = self.stride * distance + rho
    bias = None
    if not is_full:
      bias = blocked_bias.of_partial_block(
        self.table_HS, self.h, distance, x >= self.walked.first
      )
    elif self.sizes.strided:
      bias = self.table_HS[self.h, rho]
    rows = self.keys.row(c, y), self.new_keys.row(c, y)
    alike = self._alike(queries.x, x)
    return KeyBlock(*rows, x, bias, alike, distance, older)

  def kept(self, stream_BH, queries: QueryBlock):
    """Returns a function of a KeyBlock that gives (B, Q, C) booleans.

    They say which weights dropout leaves.
    """
    row_BQ1 = dropout.query_hash(
      stream_BH[:, self.h, None, None], queries.x[None, :, None]
    )

    def kept(keys):
      return dropout.keep_key(
        row_BQ1, keys.x[None, None], self.static.dropout_rate
      )

    return kept
