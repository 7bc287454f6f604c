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
  """Writes T <= S new tokens over the oldest; no gradient flows into a ring.

  It is done in place where the ring is donated. The rows may go beyond the last
  one and on from the first.
  """
  B, T, H, K = k_BTHK.shape
  S = ring.k_NSHK.shape[1]
  first_row = jnp.asarray(ring.first_row, jnp.int32)
  start = jnp.minimum(first_row, S - T)
  beyond = first_row - start  # how many go on from the first row
  row_T = jnp.arange(T, dtype=jnp.int32)

  def written(old_NSHK, new_BTHK):
    new_BTHK = lax.stop_gradient(new_BTHK).astype(old_NSHK.dtype)
    turned_BTHK = jnp.roll(new_BTHK, beyond, axis=1)
    for row, is_new_T in ((start, row_T >= beyond), (0, row_T < beyond)):
      at = [jnp.asarray(i, jnp.int32) for i in (ring.batch, row, 0, 0)]
      there_BTHK = lax.dynamic_slice(old_NSHK, at, (B, T, H, K))
      rows_BTHK = jnp.where(
        is_new_T[None, :, None, None], turned_BTHK, there_BTHK
      )
      old_NSHK = lax.dynamic_update_slice(old_NSHK, rows_BTHK, at)
    return old_NSHK

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
