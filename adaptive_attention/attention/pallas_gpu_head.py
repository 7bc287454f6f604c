"""What a program of the GPU's kernels knows of its head, its rows and blocks.

A program owns one block of queries (or keys) of one head of one stream, and
walks the other side between ends that it finds from a few integers of its head.
It reads rows at addresses that it computes, so that neither a stride nor a ring
moves an array.

Integers that are known when a kernel is traced stay Python's own: arrays of one
constant inside a kernel break the lowering of loops to Triton.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from adaptive_attention.attention import dropout, walk
from adaptive_attention.attention.pallas_attend import LOW, Static

LOG2E = math.log2(math.e)
# A head's integers; its open residues follow.
STRIDE, LAST, FULL, FIRST, COUNT, HEAD, FIRST_ROW, RESIDUES = range(8)


class Blocks(NamedTuple):
  """How a kernel is launched.

  Attributes:
    block_q, block_k: rows of its blocks.
    warps, stages: as Triton knows them.
  """

  block_q: int
  block_k: int
  warps: int
  stages: int = 2


def lead(blocks: Blocks, strided: bool) -> int:
  """Returns how many hidden entries a table has at either end.

  These are for rows that do not exist. So nothing is clipped in a kernel.
  """
  rows = blocks.block_q + blocks.block_k
  return rows * (walk.MAX_STRIDE if strided else 1)


class Pairs(NamedTuple):
  """The pairs of a block: queries and keys by their x, along its axes.

  Attributes:
    x_q, x_k: positions relative to the first query.
    exists: of keys.
    rho: the residue of all distances.
    is_full: static.
  """

  x_q: object
  x_k: object
  exists: object
  rho: object
  is_full: bool


class Head:
  """The integers of a program's head, and what follows from them."""

  def __init__(self, static: Static, blocks: Blocks, ints, stream):
    self.static, self.blocks, self.ints = static, blocks, ints
    self.sizes = static.sizes(blocks.block_q, blocks.block_k)
    self.lead = lead(blocks, static.strided)
    self.walked = walk.Heads(
      ints[STRIDE], ints[LAST], ints[FULL], ints[FIRST], self, ints[COUNT]
    )
    self.P = walk.stride_of(self.walked, self.sizes)
    self.stream = stream[0] if static.dropout_rate else None

  def __getitem__(self, rank):
    """An open residue: this stands for `walk.Heads.residues`."""
    return self.ints[RESIDUES + rank]

  def query_block(self):
    """Returns (a, first y, x, exists) of this program's queries."""
    block, P = self.blocks.block_q, self.P
    of_class = walk.ceil_div(walk.ceil_div(self.static.T, P), block)
    a, i = self._class_of(pl.program_id(0), of_class)
    y = i * block
    x = a + P * (y + jnp.arange(block, dtype=jnp.int32))
    return a, y, x, (x < self.static.T) & (a < P)

  def key_block(self):
    """Returns (c, first y, x, exists) of this program's keys; no memory's."""
    static, block, P = self.static, self.blocks.block_k, self.P
    newer = static.older - static.memory  # before the first query
    before = walk.ceil_div(walk.ceil_div(newer, P), block)
    after = walk.ceil_div(walk.ceil_div(static.T, P), block)
    c, j = self._class_of(pl.program_id(0), before + after)
    y = (j - before) * block
    x = c + P * (y + jnp.arange(block, dtype=jnp.int32))
    return c, y, x, (x >= -newer) & (x < static.T) & (c < P)

  def _class_of(self, program, of_class):
    if not self.static.strided:
      return 0, program
    return lax.div(program, of_class), lax.rem(program, of_class)

  def over_keys(self, a, y, x_q, body, carry):
    """Returns the carry after body(pairs, carry) for a query block's blocks."""
    block = self.blocks.block_k

    def of_residue(rho, carry):
      c, _ = walk.key_class(self.walked, a, rho, self.sizes)

      def of_block(j, is_full, carry):
        x = c + self.P * (j * block + jnp.arange(block, dtype=jnp.int32))
        exists = (x >= self.walked.first) & (x < self.static.T)
        pairs = x_q[:, None], x[None, :], exists[None, :]
        return body(Pairs(*pairs, rho, is_full), carry)

      ends = walk.key_blocks(self.walked, a, y, rho, self.sizes)
      return walk.over_blocks(ends, of_block, carry)

    return walk.over_residues(self.walked, of_residue, carry, self.sizes)

  def over_queries(self, c, y, x_k, exists, body, carry):
    """Returns the carry after body(pairs, carry) for a key block's blocks.

    Keys are the first axis of these pairs, so that the products that follow
    take the weights out of registers, as they are.
    """
    block = self.blocks.block_q

    def of_residue(rho, carry):
      a, _ = walk.query_class(self.walked, c, rho, self.sizes)

      def of_block(i, is_full, carry):
        x = a + self.P * (i * block + jnp.arange(block, dtype=jnp.int32))
        pairs = x[None, :], x_k[:, None], exists[:, None]
        return body(Pairs(*pairs, rho, is_full), carry)

      ends = walk.query_blocks(self.walked, c, y, rho, self.sizes)
      return walk.over_blocks(ends, of_block, carry)

    return walk.over_residues(self.walked, of_residue, carry, self.sizes)

  def logits(self, scores, table, pairs: Pairs):
    """Returns scores with the log weights of a block; in units of log 2."""
    if not pairs.is_full:
      bias = self.entries(table, pairs)
      return scores + (bias + jnp.where(pairs.exists, 0.0, -jnp.inf))
    if self.static.strided:
      return scores + table[self.lead + pairs.rho]
    return scores  # all log weights are zero

  def entries(self, table, pairs: Pairs, *row):
    """Returns the entries of a table at the distances of a block."""
    at = self.lead + pairs.x_q - pairs.x_k
    return plgpu.load(table.at[(*(jnp.full_like(at, r) for r in row), at)])

  def keep_scale(self, pairs: Pairs):
    """Returns what dropout multiplies the weights of a block by."""
    rate = self.static.dropout_rate
    row = dropout.row_hash(self.stream, self.ints[HEAD], pairs.x_q)
    kept = dropout.keep_key(row, pairs.x_k, rate)
    return jnp.where(kept, 1 / (1 - rate), 0.0)

  def gradients(self, scores, d_weights, lse, mean, table, pairs: Pairs):
    """Returns (dropped weights, gradients of the natural logits)."""
    weights = jnp.exp2(self.logits(scores, table, pairs) - lse)
    dropped = weights
    if self.static.dropout_rate:
      scale = self.keep_scale(pairs)
      dropped, d_weights = weights * scale, d_weights * scale
    return dropped, weights * (d_weights - mean)

  def key_rows(self, k_ref, v_ref, x, exists):
    """Returns the keys and values at x; zeros where they do not exist."""
    row = x + self.static.older
    if self.static.ring:
      row += self.ints[FIRST_ROW]
      row = jnp.where(row >= self.static.S, row - self.static.S, row)
    return rows(k_ref, row, exists), rows(v_ref, row, exists)


def dot(x, y):
  return plgpu.dot(x, y, allow_tf32=False)


def _at(ref, row):
  """Returns (addresses, which exist) of rows of a (length, K) array.

  Both indices are arrays, as interpret mode knows no mix of arrays and slices.
  A row has a power of two of entries, as Triton wants it.
  """
  K = ref.shape[1]
  shape = row.shape[0], max(16, pl.next_power_of_2(K))
  column = jnp.broadcast_to(jnp.arange(shape[1])[None, :], shape)
  there = None if shape[1] == K else column < K
  return ref.at[jnp.broadcast_to(row[:, None], shape), column], there


def _both(exists, there, shape):
  exists = jnp.broadcast_to(exists[:, None], shape)
  return exists if there is None else exists & there


def rows(ref, row, exists):
  """Returns rows of a (length, K) array; zeros where they do not exist."""
  at, there = _at(ref, row)
  shape = row.shape[0], max(16, pl.next_power_of_2(ref.shape[1]))
  return plgpu.load(at, mask=_both(exists, there, shape), other=0.0)


def put(ref, row, exists, values):
  """Writes rows of a (length, K) array, where they exist."""
  # Interpret mode writes masked rows too, with what they held: past the end.
  row = jnp.where(exists, row, ref.shape[0])
  at, there = _at(ref, row)
  mask = _both(exists, there, values.shape)
  plgpu.store(at, values.astype(ref.dtype), mask=mask)


def query_rows(refs, x, exists):
  """Returns (q, d_out, lse, mean) at x; rows that do not exist weigh nothing.

  Args:
    refs: (T, K) of queries and of gradients, (T,) of `Outputs`' numbers.
  """
  q_ref, d_out_ref, lse_ref, mean_ref = refs
  return (
    rows(q_ref, x, exists),
    rows(d_out_ref, x, exists),
    plgpu.load(lse_ref.at[x], mask=exists, other=-LOW),
    plgpu.load(mean_ref.at[x], mask=exists, other=0.0),
  )
