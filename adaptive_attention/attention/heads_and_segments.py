"""Which key head a query head reads, and which pairs lie in one segment."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

NEVER = -(2**31)  # the segment of a key that is hidden from all queries


def group_size(q_BTHK, k_BSGK) -> int:
  """Returns H / G: query head h reads the keys of head h // (H / G)."""
  return q_BTHK.shape[2] // k_BSGK.shape[2]


def for_each_query_head(x_BSGK, H: int):
  """Returns (B, S, H, K) keys or values: those that each query head reads."""
  G = x_BSGK.shape[2]
  return x_BSGK if G == H else jnp.repeat(x_BSGK, H // G, axis=2)


def summed_by_key_head(x_BSHK, G: int):
  """Returns (B, S, G, K), the sums over the query heads that share a key head.

  It is the transpose of `for_each_query_head`.
  """
  B, S, H, K = x_BSHK.shape
  return x_BSHK if G == H else x_BSHK.reshape(B, S, G, H // G, K).sum(axis=3)


class Segments(NamedTuple):
  """The segments of B packed sequences: a pair across two of them is hidden.

  Attributes:
    query_BT: the segment of each query.
    key_BS: the segment of each key, or NEVER.
  """

  query_BT: jax.Array
  key_BS: jax.Array

  def first_keys(self):
    """Returns (B, T) the index of the first key in each query's segment.

    Where a query's segment has no key, it is larger than the index of any key.
    """

    def of_sequence(query_T, key_S):
      # Segments are numbered without gaps, so that these index an array.
      S = len(key_S)
      ids = jnp.concatenate([key_S, query_T])
      _, number = jnp.unique(ids, return_inverse=True, size=len(ids))
      first = jax.ops.segment_min(
        jnp.arange(S, dtype=jnp.int32), number[:S], num_segments=len(ids)
      )
      return first[number[S:]]

    return jax.vmap(of_sequence)(self.query_BT, self.key_BS)


def segments_of(segment_ids, key_mask, T: int) -> Segments | None:
  """Returns the segments of a call; None where all pairs lie in one.

  Args:
    segment_ids: (B, S) integers, or None for one segment.
    key_mask: (B, S), false where no query may attend to a key; or None.
  """
  if segment_ids is None and key_mask is None:
    return None
  if segment_ids is None:
    segment_ids = jnp.zeros(key_mask.shape, jnp.int32)
  query_BT = segment_ids[:, segment_ids.shape[1] - T :]
  if key_mask is not None:
    segment_ids = jnp.where(key_mask, segment_ids, NEVER)
  return Segments(query_BT, segment_ids)
