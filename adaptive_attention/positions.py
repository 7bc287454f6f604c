"""Rotary positions, whose differences are exact in streams of 2^32 tokens."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

_BASE = 10_000.0


def rotate(x_BTHK: jax.Array, position: ArrayLike) -> jax.Array:
  """Returns queries or keys turned by their positions.

  See Su et al. 2021, "RoFormer".

  The pair (x[j], x[j + K/2]) is turned by the angle position * base^(-2j/K),
  base = 10,000, so that the product of a query and a key depends on the
  difference of their positions alone.

  An angle is an integer count of 2^-32 turns. These integers wrap around just
  as turns do, so that differences are exact at any position below 2^32. Angles
  in float32 would be off by 0.5 at 10^7. The price is that frequencies are
  rounded to 2^-32 turns per token.

  Args:
    x_BTHK: queries or keys of an even width K; they are turned in float32.
    position: (T,) or (B, T) integers from 0 on.

  Returns:
    (B, T, H, K) in the dtype of x.
  """
  half = x_BTHK.shape[-1] // 2
  turns = _BASE ** (-np.arange(half) / half) / (2 * np.pi)
  turns_K = jnp.asarray(np.round(turns * 2**32).astype(np.uint32))
  position = jnp.asarray(position).astype(jnp.uint32)
  position_BT11 = position.reshape(-1, x_BTHK.shape[1], 1, 1)
  phase_BT1K = position_BT11 * turns_K[None, None, None]
  # Signed numbers give the same angle, nearer to zero.
  angle_BT1K = phase_BT1K.astype(jnp.int32).astype(jnp.float32) * (
    2 * np.pi / 2**32
  )
  cos_BT1K, sin_BT1K = jnp.cos(angle_BT1K), jnp.sin(angle_BT1K)
  low, high = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate(
    [low * cos_BT1K - high * sin_BT1K, low * sin_BT1K + high * cos_BT1K],
    axis=-1,
  )
  return turned.astype(x_BTHK.dtype)
