"""Sizes of blocks on a TPU, and the calls that are more than it holds."""

import math
from typing import NamedTuple

from adaptive_attention.attention import walk, walk_items
from adaptive_attention.attention.pallas_attend import refusal_of_rows
from adaptive_attention.attention.pallas_tpu_item import (
  ITEM_BYTES,
  LANES,
  refusal_of_words,
)
from adaptive_attention.attention.pallas_tpu_layout import table_shape

_MIB = 1 << 20
_SMEM_BYTES = 1 * _MIB - (32 << 10)  # of 1 MiB, what items may take
MOST_VMEM_BYTES = 48 * _MIB  # of 64 MiB or more, for what a head keeps there


class Launch(NamedTuple):
  """Rows of a query block and of a key block."""

  block_q: int
  block_k: int

  @property
  def forward_blocks(self) -> tuple[int, int]:
    return self.block_q, self.block_k


def refusal(call) -> str:
  """Returns why a `choice.Call` is not served; "" if it is."""
  reason = refusal_of_rows(call)
  if reason:
    return reason
  reason = _excess(call)
  return f"{reason}; {_what_fits(call)}" if reason else ""


def _excess(call) -> str:
  """Returns what of a call is more than a TPU holds; "" if nothing is."""
  sizes = walk.Sizes(call.T, call.S, *launch(call), call.strided)
  of_call = f"for T={call.T}, S={call.S} and {call.H} heads"
  reason = refusal_of_words(call.H, sizes)
  if reason:
    return f"its list of blocks {of_call} cannot be written, as {reason}"
  most = max(walk_items.most_items(call.H, sizes, rows) for rows in "qk")
  taken = ITEM_BYTES * most
  if taken > _SMEM_BYTES:
    return f"its list of blocks {of_call} takes {taken} bytes of {_SMEM_BYTES}"
  taken = table_bytes(sizes)
  if taken > MOST_VMEM_BYTES:
    return (
      f"its gradient by distance {of_call} takes {taken} bytes of "
      f"{MOST_VMEM_BYTES}"
    )
  return ""


def _what_fits(call) -> str:
  """Returns what to change of a call that exceeds something."""
  older = _largest(call, lambda n: {"S": call.T + n}, 0, call.S - call.T)
  if older is not None:
    return f"S={call.T + older} would fit"
  T = _largest(call, lambda n: {"T": n, "S": n}, 1, call.T)
  if T is not None:
    return f"T={T} would fit"
  H = _largest(call, lambda n: {"H": n}, 1, call.H)
  return "fewer of each would fit" if H is None else f"H={H} would fit"


def _largest(call, changes, fits, exceeds):
  """Returns an n that fits while n + 1 does not; None if `fits` does not."""
  if _excess(call._replace(**changes(fits))):
    return None
  while exceeds - fits > 1:
    middle = (fits + exceeds) // 2
    if _excess(call._replace(**changes(middle))):
      exceeds = middle
    else:
      fits = middle
  return fits


def launch(call) -> Launch:
  """Returns the blocks of a `choice.Call`.

  512 x 512 takes the fewest bundles in each case that was counted (items times
  bundles of an item), as a step of the grid costs 300 bundles beside its
  products. Fewer queries or keys, or those of a residue class, would fill only
  a part of it, and the products of float32 and of wide heads spill at 512.
  """
  most = 512 if call.itemsize == 2 and call.K <= 128 else 256
  of_class = 8 if call.strided else 1  # the longest usual period

  def block_of(rows):
    block = LANES
    while block < most and 2 * block * of_class <= rows:
      block *= 2
    return block

  return Launch(block_of(call.T), block_of(call.S))


def table_bytes(sizes: walk.Sizes) -> int:
  """Returns the VMEM that a head's gradient by distance takes, twice."""
  return 2 * 4 * math.prod(table_shape(sizes))
