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
from adaptive_attention.attention.pallas_gpu_weights import Pairs

LOG2E = math.log2(math.e)
# A head's integers; its open residues follow.
STRIDE, LAST, FULL, FIRST, COUNT, PLACE, HEAD, FIRST_ROW, RESIDUES = range(9)


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


def beyond(blocks: Blocks, strided: bool) -> int:
  """Returns how far rows of a block may go past those that exist.

  Arrays are so much longer at either end, and nothing is clipped in a kernel.
  """
  rows = blocks.block_q + blocks.block_k
  return rows * (walk.MAX_STRIDE if strided else 1)


class Head:
  """The integers of a program's head, and what follows from them.

  Attributes:
    place: of the head in arrays of all heads.
    weights: of `pallas_gpu_weights`.
  """

  def __init__(
    self, static: Static, blocks: Blocks, weights_of, refs, ints, stream
  ):
    """Takes what a program reads.

    Args:
      weights_of: makes the weights of `refs` and of the head's place.
      refs: of the arrays of the weights.
      ints: of the head.
      stream: of the dropout.
    """
    self.static, self.blocks, self.ints = static, blocks, ints
    self.place = ints[PLACE]
    self.weights = weights_of(refs, self.place)
    self.sizes = static.sizes(blocks.block_q, blocks.block_k)
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

  def weigh(self, scores, pairs: Pairs):
    """Returns (logits in units of log 2, a factor of their exponentials)."""
    if not pairs.is_full:
      return self.weights.weigh(scores, pairs)
    if self.static.strided:
      return scores + self.weights.log2_of_residue(pairs.rho), 1.0
    return scores, 1.0

  def keep_scale(self, pairs: Pairs):
    """Returns what dropout multiplies the weights of a block by."""
    rate = self.static.dropout_rate
    row = dropout.row_hash(self.stream, self.ints[HEAD], pairs.x_q)
    kept = dropout.keep_key(row, pairs.x_k, rate)
    return jnp.where(kept, 1 / (1 - rate), 0.0)

  def gradients(self, scores, d_weights, lse, mean, pairs: Pairs):
    """Returns (dropped weights, gradients of the natural logits)."""
    logits, factor = self.weigh(scores, pairs)
    weights = jnp.exp2(logits - lse) * factor
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
    place = walk.floor_div(self.place, self.static.group)
    return tuple(self.rows(ref, row, exists, place) for ref in (k_ref, v_ref))

  def rows(self, ref, row, exists, place=None):
    """Returns rows of a (length, H, K) array; zeros where they do not exist.

    Args:
      place: of the head in this array, by default that in arrays of all heads.
    """
    place = self.place if place is None else place
    at, mask = self._at(ref, row, exists, place)
    return plgpu.load(at, mask=mask, other=0.0)

  def put(self, ref, row, exists, values):
    """Writes rows of a (length, H, K) array, where they exist."""
    # Interpret mode writes masked rows too, with what they held: past the end.
    row = jnp.where(exists, row, ref.shape[0])
    at, mask = self._at(ref, row, exists, self.place)
    plgpu.store(at, values.astype(ref.dtype), mask=mask)

  def _at(self, ref, row, exists, place):
    """Returns (addresses, which exist) of rows of a (length, H, K) array.

    All indices are arrays, as interpret mode knows no mix of arrays and slices.
    A row has a power of two of entries, as Triton wants it.
    """
    K = ref.shape[2]
    shape = row.shape[0], max(16, pl.next_power_of_2(K))
    column = jnp.broadcast_to(jnp.arange(shape[1])[None, :], shape)
    exists = jnp.broadcast_to(exists[:, None], shape)
    if shape[1] > K:
      exists &= column < K
    row = jnp.broadcast_to(row[:, None], shape)
    return ref.at[row, jnp.full_like(row, place), column], exists

  def numbers(self, ref, x):
    """Returns addresses of an (H, T) array."""
    return ref.at[jnp.full_like(x, self.place), x]

  def query_rows(self, refs, x, exists):
    """Returns (q, d_out, lse, mean) at x; rows that do not exist weigh nothing.

    Args:
      refs: (T, H, K) of queries and of gradients, (H, T) of `Outputs`' numbers.
    """
    q_ref, d_out_ref, lse_ref, mean_ref = refs
    return (
      self.rows(q_ref, x, exists),
      self.rows(d_out_ref, x, exists),
      plgpu.load(self.numbers(lse_ref, x), mask=exists, other=-LOW),
      plgpu.load(self.numbers(mean_ref, x), mask=exists, other=0.0),
    )


def dot(x, y):
  return plgpu.dot(x, y, allow_tf32=False)
