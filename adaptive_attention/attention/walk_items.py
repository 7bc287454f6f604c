"""Lists the blocks of a walk, for a grid that needs a list (a TPU's).

The list is made from counts of blocks, so that all memory beside it is linear
in the numbers of query blocks and key blocks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_attention.attention.walk import (
  Heads,
  Sizes,
  ends_of,
  row_count,
  to_int,
)

FIRST, LAST, FULL, EMPTY = 1, 2, 4, 8  # flags of an `Item`


class Item(NamedTuple):
  """One entry: a head's blocks i of queries and j of keys, at a residue rho.

  The queries are of the residue class a.

  Attributes:
    flags: FIRST and LAST mark the first and the last item of one query block
      (or key block); FULL marks a full block; EMPTY marks an item that has
      nothing to compute, but a result of zeros to write.
  """

  head: jax.Array
  a: jax.Array
  i: jax.Array
  rho: jax.Array
  j: jax.Array
  flags: jax.Array


class Items(NamedTuple):
  """A list of blocks, head by head.

  Items of one query block (or of one key block) follow each other. Each block
  of `walk.rows_of` has at least one item, but for the spare blocks.

  Attributes:
    count: () the number of items.
    item: (N,) of each attribute; N is static, the most items that there can be.
  """

  count: jax.Array
  item: Item


def most_items(H, sizes: Sizes, rows) -> int:
  """Returns the length N of a list.

  It has room for a band that hides nothing, and for one empty item in each
  block of rows. A stride needs no more: it is taken only where it has fewer
  blocks than the band.
  """
  y = np.arange(0, sizes.T, sizes.block_q)
  last = (np.minimum(y + sizes.block_q, sizes.T) - 1) // sizes.block_k
  first = -sizes.older // sizes.block_k
  return H * (int(np.sum(last - first + 1)) + row_count(sizes, rows))


def items(heads: Heads, sizes: Sizes, rows="q") -> Items:
  """Returns the list of all blocks that are walked.

  Args:
    heads: the integers of all H heads.
    sizes: static.
    rows: static; "q" sorts the items by query block, "k" by key block.
  """
  (start, full_start, full_stop, stop), blocks = ends_of(heads, sizes, rows)
  H, N, R = start.shape
  exists_HN = blocks.group < heads.stride[:, None]
  empty_HN = exists_HN & (jnp.sum(stop - start, axis=-1) == 0)
  count_HNR = stop - start
  count_HNR = count_HNR.at[..., 0].add(to_int(empty_HN))
  at, place, place_in_row, count = _expanded(
    count_HNR, most_items(H, sizes, rows)
  )
  h, n, rank = at // (N * R), at // R % N, at % R

  is_empty = empty_HN[h, n]
  other = jnp.where(is_empty, 0, start[h, n, rank] + place)
  is_full = (full_start[h, n, rank] <= other) & (other < full_stop[h, n, rank])
  flags = FIRST * to_int(place_in_row == 0) + EMPTY * to_int(is_empty)
  flags += FULL * to_int(is_full & ~is_empty)
  in_row = jnp.sum(count_HNR, axis=-1, dtype=jnp.int32)[h, n]
  flags += LAST * to_int(place_in_row == in_row - 1)
  rho = heads.residues[h, rank]
  group, y = blocks.group[h, n], blocks.y[h, n]
  if rows == "q":
    a, i, j = group, y // sizes.block_q, other
  else:
    a, i, j = group + rho, other, y // sizes.block_k
    a = jnp.where(a >= heads.stride[h], a - heads.stride[h], a)
  return Items(count, Item(h, a, i, rho, j, flags))


def _expanded(count_HNR, total):
  """Numbers the items of all counts, in order.

  Returns:
    (at, place, place_in_row, count). `at` is the flat index of the count that
    each of `total` items belongs to. `place` is the item's place in that count,
    `place_in_row` its place in the counts of one block of rows. `count` is the
    number of items.
  """
  R = count_HNR.shape[-1]
  count = count_HNR.reshape(-1)
  stop = jnp.cumsum(count, dtype=jnp.int32)
  at = jnp.repeat(
    jnp.arange(len(count), dtype=jnp.int32), count, total_repeat_length=total
  )
  here = jnp.arange(total, dtype=jnp.int32)
  begin = stop - count
  return at, here - begin[at], here - begin[at // R * R], stop[-1]
