"""Segment memory: the keys and values of the tokens before a segment.

It is that of Transformer-XL (Dai et al. 2019) and Sukhbaatar et al. 2019. No
gradient flows to keys and values that are older than the segment.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from adaptive_attention import masks
from adaptive_attention.attention import attend_ring
from adaptive_attention.attention.ring import Ring


class SegmentKV(flax.struct.PyTreeNode):
  """One layer's keys and values of N streams, in rings.

  Attributes:
    k, v: (N, S, G, K), as in a `Ring`.
    memory_tokens: static; how many tokens before a segment are visible.
    first_stream: the stream that a call begins with; None for the first.
  """

  k: jax.Array
  v: jax.Array
  memory_tokens: int = flax.struct.field(pytree_node=False)
  first_stream: jax.Array | int | None = None

  def attend(
    self,
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    mask: masks.Mask | None,
    *,
    tokens_read: jax.Array | np.uint32 | int,
    **options: Any,
  ) -> tuple[jax.Array, "SegmentKV"]:
    """Writes T tokens over the oldest, and attends over the ring.

    Raises:
      ValueError: a number of tokens that needs rings of another length.
    """
    T, S = k_BTGK.shape[1], self.k.shape[1]
    if ring_rows(self.memory_tokens, T) != S:
      raise ValueError(
        f"rings of {S} rows do not serve calls with {T} tokens over a memory "
        f"of {self.memory_tokens}, which need "
        f"{ring_rows(self.memory_tokens, T)}; make the state by "
        f"init_memory(config, streams, {T})"
      )
    stream = 0 if self.first_stream is None else self.first_stream
    tokens_read = jnp.asarray(tokens_read, jnp.uint32)
    first_row = (tokens_read % S).astype(jnp.int32)
    read = jnp.minimum(tokens_read, self.memory_tokens).astype(jnp.int32)
    out_BTHK, ring = attend_ring(
      Ring(self.k, self.v, first_row, stream),
      *(q_BTHK, k_BTGK, v_BTGK, mask),
      first_key=S - T - read,
      **options,
    )
    return out_BTHK, self.replace(k=ring.k_NSHK, v=ring.v_NSHK)

  @property
  def nbytes(self) -> int:
    """Bytes of all keys and values."""
    return self.k.nbytes + self.v.nbytes


def ring_rows(memory_tokens: int, T: int) -> int:
  """Returns S, the rows of a ring.

  They have room for the memory, in whole segments of T tokens, and for one more
  segment.
  """
  return (-(-memory_tokens // T) + 1) * T


def tokens_before(reach_L: Sequence[int], memory_tokens: int, T: int) -> int:
  """Returns how many tokens before a segment its logits depend on.

  A query attends back over its layer's longest reach, but not beyond the memory
  before its own segment. The keys there depend on tokens further back, through
  the layers below.

  Args:
    reach_L: the longest reach in each layer, in tokens, first to last.
    memory_tokens: how many tokens before a segment are visible.
    T: tokens of a segment.
  """
  first = 0
  for reach in reversed(reach_L):
    segment_start = first // T * T
    first = max(segment_start - memory_tokens, first - (reach - 1))
  return -first
