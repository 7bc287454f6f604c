"""Where the rows of one head stand while it is computed.

Positions are dealt into P classes, x = P y + a. A head's rows of each class are
brought together, so that a block of consecutive y is one contiguous slice
whatever the stride is; of the keys only as many as the head can see.
"""

import jax.numpy as jnp
from jax import lax

from adaptive_attention.attention.walk import MAX_STRIDE, ceil_div

BLOCK = 64  # queries and keys of a block
_ROWS = 256  # how many are moved at a time


def at(*index):
  """The place where a slice begins, in integers of one type as JAX wants it."""
  return tuple(jnp.asarray(i, jnp.int32) for i in index)


def take(local_BRK, row, count):
  B, _, K = local_BRK.shape
  return lax.dynamic_slice(local_BRK, at(0, row, 0), (B, count, K))


def put(local_BRK, row, rows_BYK):
  return lax.dynamic_update_slice(local_BRK, rows_BYK, at(0, row, 0))


class Layout:
  """Where one head keeps its positions: class by class, each in a row.

  x = P y + a, from -front to T, stands in row(a, y) of a local array
  (B, rows, K) in float32, which has room for a block beyond either end.

  Args:
    stride: P, at run time, from 1 to MAX_STRIDE.
    front, T: static.
    strided: static; whether P may be another than one.
    ring: static; whether arrays to load are those of a `Ring`.
  """

  def __init__(self, stride, front, T, strided, ring=False):
    self.stride, self.front, self.T, self.strided = stride, front, T, strided
    self.ring = ring
    self.fill = ceil_div(front, stride)  # y of each class before zero
    self.end = ceil_div(T, stride)  # y of each class from zero on
    size = front + T
    # Moved all at once, unless a short span can do with much less.
    self.whole = not strided and not ring and front <= T
    self.block = size if self.whole else min(_ROWS, size)

  def filled(self, B, K, value):
    """A local array. What is not written is read beside what counts."""
    spare = 2 * MAX_STRIDE if self.strided else 0
    rows = BLOCK + self.front + self.T + spare + max(BLOCK, _ROWS)
    return jnp.full((B, rows, K), value)

  def row(self, a, y):
    return BLOCK + a * (self.fill + self.end) + self.fill + y

  def reach(self, y):
    """The first y that there is, of those from y on."""
    return jnp.maximum(y, -self.fill)

  def _over_blocks(self, y_from, one, local_BRK):
    """one(a, y, local) for blocks of y from y_from on, of all classes."""
    blocks = ceil_div(self.end - y_from, self.block)

    def of_class(a, local_BRK):
      def of_block(j, local_BRK):
        # The last block is moved back, lest it go beyond the end.
        y = jnp.minimum(y_from + j * self.block, self.end - self.block)
        return one(a, self.reach(y), local_BRK)

      return lax.fori_loop(0, blocks, of_block, local_BRK)

    if self.whole:
      return one(0, -self.front, local_BRK)
    return self.over_classes(of_class, local_BRK)

  def over_classes(self, body, carry):
    """body(a, carry) for each class a."""
    if not self.strided:
      return body(0, carry)
    return lax.fori_loop(0, self.stride, body, carry)

  def load(
    self, local_BRK, array_NXHK, h, y_from, first_x=None, first_row=0, batch=0
  ):
    """The local array with the positions from y_from on of head h.

    Args:
      first_x: zeros stand for what is before it, if given.
      first_row, batch: of the `Ring` that the array belongs to.
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
    """The local array with zeros from y_from on."""
    B, _, K = local_BRK.shape
    zeros_BYK = jnp.zeros((B, self.block, K), jnp.float32)

    def one(a, y, local_BRK):
      return put(local_BRK, self.row(a, y), zeros_BYK)

    return self._over_blocks(y_from, one, local_BRK)

  def store(self, local_BRK, array_BXHK, h, x_from):
    """`load` the other way: head h's positions from x_from on."""
    T, P, block = self.T, self.stride, self.block

    def one(j, array_BXHK):
      start = jnp.minimum(x_from + j * block, T - block)
      start = jnp.maximum(start, -self.front)
      x = start + jnp.arange(block, dtype=jnp.int32)
      if self.strided:
        block_BYK = lax.cond(
          P == 1,
          lambda: take(local_BRK, self.row(0, start), block),
          lambda: local_BRK[:, self.row(x % P, x // P)],
        )
      else:
        block_BYK = take(local_BRK, self.row(0, start), block)
      block_BYK = jnp.where((x >= x_from)[None, :, None], block_BYK, 0.0)
      return lax.dynamic_update_slice(
        array_BXHK,
        block_BYK.astype(array_BXHK.dtype)[:, :, None],
        at(0, start + self.front, h, 0),
      )

    if self.whole:
      return one(0, array_BXHK)
    return lax.fori_loop(0, ceil_div(T - x_from, block), one, array_BXHK)
