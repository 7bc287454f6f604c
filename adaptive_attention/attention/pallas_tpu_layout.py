"""Where rows and log weights stand before the TPU's kernels read them.

Rows of keys are sublanes and queries are lanes. A head's rows stand residue
class by residue class, each from a whole block on (`walk.rows_of`), so that a
block of the walk is a block of an array. A head has a line of log weights for
each residue and b (see `walk`), by e = y_q - y_k: the log weights of a block
are one piece of one line, and in a residue class distances are a band.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from adaptive_attention.attention import walk
from adaptive_attention.attention.heads_and_segments import for_each_query_head
from adaptive_attention.attention.pallas_attend import Static

SUBLANES = 16  # of bfloat16; a head's width is padded to whole ones


class Geometry(NamedTuple):
  """Block sizes, and how long arrays are in rows and in entries."""

  static: Static
  block_q: int
  block_k: int

  @property
  def sizes(self) -> walk.Sizes:
    return self.static.sizes(self.block_q, self.block_k)

  @property
  def query_rows(self) -> int:
    return walk.row_count(self.sizes, "q") * self.block_q

  @property
  def key_rows(self) -> int:
    return walk.row_count(self.sizes, "k") * self.block_k

  @property
  def lines(self) -> int:
    return table_shape(self.sizes)[0]

  @property
  def lead(self) -> int:
    """Entries of a line before e = 0."""
    return self.block_q + self.block_k

  @property
  def length(self) -> int:
    return table_shape(self.sizes)[1]


def table_shape(sizes: walk.Sizes) -> tuple[int, int]:
  """Returns the lines of a head's table, one for each (rho, b), and entries."""
  lines = 2 * walk.MAX_STRIDE if sizes.strided else 1
  queries = walk.ceil_div(sizes.T, sizes.block_q) * sizes.block_q
  older = walk.ceil_div(sizes.older, sizes.block_k) * sizes.block_k
  return lines, sizes.block_q + queries + older + 2 * sizes.block_k


def distances(stride_H, geometry: Geometry):
  """Returns (H, lines, length) the distance of each entry; some are none."""
  line_L1 = jnp.arange(geometry.lines, dtype=jnp.int32)[:, None]
  e_1E = jnp.arange(geometry.length, dtype=jnp.int32)[None] - geometry.lead
  rho_L1, b_L1 = line_L1 // 2, line_L1 % 2
  P_H11 = stride_H[:, None, None]
  return jnp.where(rho_L1 < P_H11, P_H11 * (e_1E - b_L1) + rho_L1, -1)


class Layout:
  """Puts arrays into the order of rows, and takes them back.

  Args:
    geometry: static.
    heads: how all H heads are walked.
    first_row: of the `Ring` that keys and values stand in.
  """

  def __init__(self, geometry: Geometry, heads: walk.Heads, first_row):
    self.geometry, self.first_row = geometry, first_row
    self.static = geometry.static
    self.first = heads.first[0]
    self.stride_H = heads.stride
    blocks_q, blocks_k = (
      jax.vmap(lambda P, side=side: walk.rows_of(P, geometry.sizes, side))(
        heads.stride
      )
      for side in "qk"
    )
    if self.static.strided:
      self.x_q_HR = _positions(blocks_q, heads.stride, geometry.block_q)
      self.x_k_HR = _positions(blocks_k, heads.stride, geometry.block_k)

  def queries(self, x_BTHK):
    """Returns (B, H, K, rows): zeros where there is no query.

    Of these the gradient of the output is zero too, and so is all that they
    would add.
    """
    x_BHTK = jnp.swapaxes(_whole_sublanes(x_BTHK), 1, 2)
    if self.static.strided:
      x_BHRK = _gathered(x_BHTK, self.x_q_HR, self.static.T)
    else:
      after = self.geometry.query_rows - x_BHTK.shape[2]
      x_BHRK = jnp.pad(x_BHTK, ((0, 0), (0, 0), (0, after), (0, 0)))
    return jnp.swapaxes(x_BHRK, 2, 3)

  def keys(self, x_BSGK):
    """Returns (B, H, rows, K): zeros where a key does not exist."""
    x_BSHK = for_each_query_head(x_BSGK, len(self.stride_H))
    older = self.static.older
    if self.static.ring:
      x_BSHK = jnp.roll(x_BSHK, -self.first_row, axis=1)
    x_S = jnp.arange(-older, self.static.T, dtype=jnp.int32)
    exists_S = (x_S >= self.first)[None, :, None, None]
    x_BSHK = jnp.where(exists_S, x_BSHK, jnp.zeros((), x_BSHK.dtype))
    x_BHSK = jnp.swapaxes(_whole_sublanes(x_BSHK), 1, 2)
    if self.static.strided:
      return _gathered(x_BHSK, self.x_k_HR + older, self.static.S)
    before = self._before_keys()
    after = self.geometry.key_rows - before - x_BHSK.shape[2]
    return jnp.pad(x_BHSK, ((0, 0), (0, 0), (before, after), (0, 0)))

  def numbers(self, x_BHT):
    """Returns (B, H, 1, rows) of one number a query."""
    x_BH1T = x_BHT[:, :, None]
    if not self.static.strided:
      after = self.geometry.query_rows - self.static.T
      return jnp.pad(x_BH1T, ((0, 0), (0, 0), (0, 0), (0, after)))
    x_BHT1 = x_BHT[..., None]
    x_BHR1 = _gathered(x_BHT1, self.x_q_HR, self.static.T)
    return jnp.swapaxes(x_BHR1, 2, 3)

  def from_queries(self, x_BHKR, K):
    """Returns (B, T, H, K) of what `queries` laid out."""
    x_BHRK = jnp.swapaxes(x_BHKR[:, :, :K], 2, 3)
    if self.static.strided:
      x_BHTK = _rows(x_BHRK, self._row_of_query())
    else:
      x_BHTK = x_BHRK[:, :, : self.static.T]
    return jnp.swapaxes(x_BHTK, 1, 2)

  def from_numbers(self, x_BH1R):
    """Returns (B, H, T) of what `numbers` laid out."""
    return self.from_queries(x_BH1R, 1)[..., 0].swapaxes(1, 2)

  def from_keys(self, x_BHRK, K):
    """Returns (B, S, H, K) of what `keys` laid out."""
    if self.static.strided:
      x_BHSK = _rows(x_BHRK, self._row_of_key())
    else:
      before = self._before_keys()
      x_BHSK = x_BHRK[:, :, before : before + self.static.S]
    return jnp.swapaxes(x_BHSK[..., :K], 1, 2)

  def _before_keys(self) -> int:
    """Rows before the first key, so that x = 0 begins a block."""
    return -self.static.older % self.geometry.block_k

  def _row_of_query(self):
    P_H1 = self.stride_H[:, None]
    x_1T = jnp.arange(self.static.T, dtype=jnp.int32)[None]
    block = self.geometry.block_q
    of_class_H1 = walk.ceil_div(walk.ceil_div(self.static.T, P_H1), block)
    return x_1T % P_H1 * of_class_H1 * block + x_1T // P_H1

  def _row_of_key(self):
    P_H1 = self.stride_H[:, None]
    older, T = self.static.older, self.static.T
    x_1S = jnp.arange(-older, T, dtype=jnp.int32)[None]
    block = self.geometry.block_k
    before_H1, after_H1 = (
      walk.ceil_div(walk.ceil_div(n, P_H1), block) for n in (older, T)
    )
    first_H1 = x_1S % P_H1 * (before_H1 + after_H1) + before_H1
    return first_H1 * block + x_1S // P_H1


def _positions(blocks: walk.Rows, stride_H, block):
  """Returns (H, rows) the x of each row; of no residue class some large x."""
  P_H11 = stride_H[:, None, None]
  group_HN1 = blocks.group[:, :, None]
  y_HNU = blocks.y[:, :, None] + jnp.arange(block, dtype=jnp.int32)
  x_HNU = jnp.where(group_HN1 < P_H11, group_HN1 + P_H11 * y_HNU, 2**30)
  return x_HNU.reshape(len(stride_H), -1)


def _gathered(x_BHXK, at_HR, length):
  """Returns (B, H, rows, K): rows from their places, zeros at others."""
  there = ((at_HR >= 0) & (at_HR < length))[None, :, :, None]
  x_BHRK = _rows(x_BHXK, jnp.clip(at_HR, 0, length - 1))
  return jnp.where(there, x_BHRK, jnp.zeros((), x_BHXK.dtype))


def _rows(x_BHXK, at_HR):
  """Returns (B, H, rows, K): for each head other rows, of all streams alike."""
  take = jax.vmap(lambda x_BXK, at_R: x_BXK[:, at_R], (1, 0), 1)
  return take(x_BHXK, at_HR)


def _whole_sublanes(x_BXHK):
  more = -x_BXHK.shape[3] % SUBLANES
  return jnp.pad(x_BXHK, ((0, 0), (0, 0), (0, 0), (0, more)))
