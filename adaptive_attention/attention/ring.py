"""Keys and values of a stream in rows that are written round and round."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Ring(NamedTuple):
  """The keys and values of S positions of a stream, the newest T among them.

  Index s, the oldest at 0, stands in row (first_row + s) mod S: the rows of T
  new tokens take the place of the oldest T, and nothing else moves.

  Attributes:
    k_NSHK, v_NSHK: of N >= B streams.
    first_row: runtime integer in [0, S).
    batch: runtime integer; the streams of a call are those from this one on.
  """

  k_NSHK: jax.Array
  v_NSHK: jax.Array
  first_row: jax.Array | int = 0
  batch: jax.Array | int = 0


def append(ring: Ring, k_BTHK, v_BTHK) -> Ring:
  """Writes T new tokens over the oldest, in place where the ring is donated.

  No gradient flows into a ring. S must be a multiple of T and the first row
  too, so that T rows never go beyond the last one.
  """
  S, T = ring.k_NSHK.shape[1], k_BTHK.shape[1]

  def written(old_NSHK, new_BTHK):
    new_BTHK = lax.stop_gradient(new_BTHK).astype(old_NSHK.dtype)
    at = [jnp.asarray(i, jnp.int32) for i in (ring.batch, ring.first_row, 0, 0)]
    return lax.dynamic_update_slice(old_NSHK, new_BTHK, at)

  return Ring(
    written(ring.k_NSHK, k_BTHK),
    written(ring.v_NSHK, v_BTHK),
    (ring.first_row + T) % S,
    ring.batch,
  )


def in_order(x_NSHK, ring: Ring, B):
  """(B, S, H, K): the rows of a ring's array from the oldest to the newest."""
  x_BSHK = lax.dynamic_slice_in_dim(x_NSHK, ring.batch, B, axis=0)
  return jnp.roll(x_BSHK, -jnp.asarray(ring.first_row), axis=1)
