"""Rings: keys and values of streams in rows written round and round."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Ring(NamedTuple):
  """The keys and values of the newest S positions of N streams.

  Index s, from the oldest at 0 on, stands in row (first_row + s) mod S. So T
  new tokens are written over the oldest T, and nothing else moves.

  Attributes:
    k_NSHK, v_NSHK: keys and values of N >= B streams.
    first_row: runtime integer in [0, S); the row of the oldest position.
    batch: runtime integer; a call is about the B streams from this one on.
  """

  k_NSHK: jax.Array
  v_NSHK: jax.Array
  first_row: jax.Array | int = 0
  batch: jax.Array | int = 0


def append(ring: Ring, k_BTHK: jax.Array, v_BTHK: jax.Array) -> Ring:
  """Returns the ring with T <= S new tokens written over the oldest.

  They are written in place where the ring is donated. Rows that would pass the
  last one go on from row 0. No gradient flows into a ring.
  """
  B, T, H, K = k_BTHK.shape
  S = ring.k_NSHK.shape[1]
  first_row = jnp.asarray(ring.first_row, jnp.int32)
  start = jnp.minimum(first_row, S - T)
  beyond = first_row - start  # how many tokens are written from row 0 on
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


def in_order(x_NSHK: jax.Array, ring: Ring, B: int) -> jax.Array:
  """Returns (B, S, H, K), a ring's array from the oldest to the newest."""
  x_BSHK = lax.dynamic_slice_in_dim(x_NSHK, ring.batch, B, axis=0)
  return jnp.roll(x_BSHK, -jnp.asarray(ring.first_row), axis=1)
