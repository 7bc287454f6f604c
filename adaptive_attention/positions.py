"""Positions as turns of queries and keys, exact however long the stream is."""

import jax.numpy as jnp
import numpy as np

_BASE = 10_000.0


def rotate(x_BTHK, position_T):
  """Turns queries or keys by their positions (Su et al. 2021, "RoFormer").

  The pair (x[j], x[j + K/2]) is turned by the angle position * base^(-2j/K),
  base = 10,000, so that the product of a query and a key depends on the
  difference of their positions alone.

  An angle is kept as a count of 2^-32 turns and multiplied in integers that
  wrap around just as a turn does: differences are exact at any position below
  2^32, where angles in float32 would be off by 0.5 at 10^7. The frequencies are
  rounded to 2^-32 turns a token for that.

  Args:
    x_BTHK: of an even width K; turned in float32.
    position_T: integers from 0 on.

  Returns:
    (B, T, H, K) in the dtype of x.
  """
  half = x_BTHK.shape[-1] // 2
  turns = _BASE ** (-np.arange(half) / half) / (2 * np.pi)
  turns_K = jnp.asarray(np.round(turns * 2**32).astype(np.uint32))
  phase_TK = jnp.asarray(position_T).astype(jnp.uint32)[:, None] * turns_K
  # As signed numbers: the same angle, nearer to zero.
  angle_TK = phase_TK.astype(jnp.int32).astype(jnp.float32) * (
    2 * np.pi / 2**32
  )
  cos_T1K, sin_T1K = jnp.cos(angle_TK)[:, None], jnp.sin(angle_TK)[:, None]
  low, high = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate(
    [low * cos_T1K - high * sin_T1K, low * sin_T1K + high * cos_T1K], axis=-1
  )
  return turned.astype(x_BTHK.dtype)
