"""Places the rows of one head in local arrays while the head is computed.

Positions are dealt into P residue classes, x = P y + a. The rows of each
residue class are brought together, so that a block of consecutive y is one
contiguous slice whatever the stride is. Keys beyond the head's reach need not
be brought.
"""

import jax.numpy as jnp
from jax import lax

from adaptive_attention.attention.walk import MAX_STRIDE, ceil_div

BLOCK = 64  # queries and keys of a block
_ROWS = 256  # rows that are moved at a time


def at(*index):
  """Returns the start of a slice in int32, as JAX wants indices of one type."""
  return tuple(jnp.asarray(i, jnp.int32) for i in index)


def take(local_BRK, row, count):
  """Returns `count` rows of a local array, from `row` on."""
  B, _, K = local_BRK.shape
  return lax.dynamic_slice(local_BRK, at(0, row, 0), (B, count, K))


def put(local_BRK, row, rows_BYK):
  """Returns a local array with these rows written from `row` on."""
  return lax.dynamic_update_slice(local_BRK, rows_BYK, at(0, row, 0))


class Layout:
  """The rows of one head's positions in a local array, by residue class.

  The position x = P y + a in [-front, T) stands in row(a, y) of a local array
  (B, rows, K) in float32, which has room for a block beyond either end.

  Args:
    stride: P, a run-time integer from 1 to MAX_STRIDE.
    front, T: static; how many positions stand before zero, and from zero on.
    strided: static; whether P may be other than one.
    ring: static; whether `load` reads arrays of a `Ring`.
  """

  def __init__(self, stride, front, T, strided, ring=False):
    self.stride, self.front, self.T, self.strided = stride, front, T, strided
    self.ring = ring
    self.fill = ceil_div(front, stride)  # y of each residue class before zero
    self.end = ceil_div(T, stride)  # y of each residue class from zero on
    size = front + T
    # All rows are moved at once, unless a short span needs much fewer.
    self.whole = not strided and not ring and front <= T
    self.block = size if self.whole else min(_ROWS, size)

  def filled(self, B, K, value):
    """Returns a local array that holds the value in every row.

    Blocks also read rows that are never written; what these hold must be
    finite.
    """
    spare = 2 * MAX_STRIDE if self.strided else 0
    rows = BLOCK + self.front + self.T + spare + max(BLOCK, _ROWS)
    return jnp.full((B, rows, K), value)

  def row(self, a, y):
    """Returns the row of the position P y + a."""
    return BLOCK + a * (self.fill + self.end) + self.fill + y

  def existing(self, y):
    """Returns the first y that a residue class has, of those from y on."""
    return jnp.maximum(y, -self.fill)

  def _over_blocks(self, y_from, one, local_BRK):
    """Returns the array after one(a, y, local) for blocks from y_from on.

    A block has `self.block` consecutive y of one residue class.
    """
    blocks = ceil_div(self.end - y_from, self.block)

    def of_class(a, local_BRK):
      def of_block(j, local_BRK):
        # The last block is moved back, to end with its residue class.
        y = jnp.minimum(y_from + j * self.block, self.end - self.block)
        return one(a, self.existing(y), local_BRK)

      return lax.fori_loop(0, blocks, of_block, local_BRK)

    if self.whole:
      return one(0, -self.front, local_BRK)
    return self.over_classes(of_class, local_BRK)

  def over_classes(self, body, carry):
    """Returns the carry after body(a, carry) for each residue class a."""
    if not self.strided:
      return body(0, carry)
    return lax.fori_loop(0, self.stride, body, carry)

  def load(
    self, local_BRK, array_NXHK, h, y_from, first_x=None, first_row=0, batch=0
  ):
    """Returns the local array with head h's rows from y_from on.

    Args:
      first_x: if given, positions before it get zeros.
      first_row, batch: those of the `Ring` that the array belongs to.
    """
    B, _, K = local_BRK.shape
    X, block = array_NXHK.shape[1], self.block

    def slice_rows(row):
      start, sizes = at(batch, row[0], h, 0), (B, block, 1, K)
      return lax.dynamic_slice(array_NXHK, start, sizes)[:, :, 0]

    def gather_rows(row):
      if not self.ring:
        return array_NXHK[:, row, h]
      return array_NXHK[batch + jnp.arange(B, dtype=jnp.int32)[:, None], row, h]

    def one(a, y, local_BRK):
      x = (
        a + self.stride * (y + jnp.arange(block, dtype=jnp.int32)) + self.front
      )
      row = jnp.clip(x, 0, X - 1)
      if self.ring:
        row = (row + first_row) % X
      if self.strided or self.ring:
        together = (self.stride == 1) & (row[-1] - row[0] == block - 1)
        block_BYK = lax.cond(together, slice_rows, gather_rows, row)
      else:
        block_BYK = slice_rows(row)
      if first_x is not None:
        exists_1Y1 = (x >= first_x + self.front)[None, :, None]
        zero = jnp.zeros((), block_BYK.dtype)
        block_BYK = jnp.where(exists_1Y1, block_BYK, zero)
      return put(local_BRK, self.row(a, y), block_BYK.astype(jnp.float32))

    return self._over_blocks(y_from, one, local_BRK)

  def clear(self, local_BRK, y_from):
    """Returns the local array with zeros from y_from on."""
    B, _, K = local_BRK.shape
    zeros_BYK = jnp.zeros((B, self.block, K), jnp.float32)

    def one(a, y, local_BRK):
      return put(local_BRK, self.row(a, y), zeros_BYK)

    return self._over_blocks(y_from, one, local_BRK)

  def store(self, local_BRK, array_BXHK, h, x_from):
    """Returns array_BXHK with head h's rows from the local array.

    It is the inverse of `load`, for positions from x_from on.
    """
    return self._written(local_BRK, array_BXHK, h, x_from, add=False)

  def add(self, local_BRK, array_BXHK, h, x_from):
    """Returns array_BXHK with rows from the local array added to head h's."""
    return self._written(local_BRK, array_BXHK, h, x_from, add=True)

  def _written(self, local_BRK, array_BXHK, h, x_from, add):
    B, _, K = local_BRK.shape
    T, P, block = self.T, self.stride, self.block
    x_from = jnp.maximum(x_from, -self.front)

    def one(j, array_BXHK):
      start = jnp.minimum(x_from + j * block, T - block)
      x = start + jnp.arange(block, dtype=jnp.int32)
      if self.strided:
        block_BYK = lax.cond(
          P == 1,
          lambda: take(local_BRK, self.row(0, start), block),
          lambda: local_BRK[:, self.row(x % P, x // P)],
        )
      else:
        block_BYK = take(local_BRK, self.row(0, start), block)
      # The last block is moved back, and adds no row of the one before again.
      first = x_from + j * block if add else x_from
      block_BYK = jnp.where((x >= first)[None, :, None], block_BYK, 0.0)
      block_BY1K = block_BYK.astype(array_BXHK.dtype)[:, :, None]
      place = at(0, start + self.front, h, 0)
      if add:
        sizes = B, block, 1, K
        block_BY1K += lax.dynamic_slice(array_BXHK, place, sizes)
      return lax.dynamic_update_slice(array_BXHK, block_BY1K, place)

    if self.whole:
      return one(0, array_BXHK)
    return lax.fori_loop(0, ceil_div(T - x_from, block), one, array_BXHK)
