"""Dropout of attention weights as a pure function of (seed, b, h, t, x).

Every implementation of `attend` visits the weights in another order; a hash
of the indices lets them all drop the same ones, and lets the backward pass
draw them again rather than store them.

x = s - (S - T) modulo 2^32 is the key's position relative to the first query.
So a draw does not depend on how many older keys there are.
"""

import jax.numpy as jnp


def _mix(x):
  """An invertible mixer of 32 bits ("lowbias32", C. Wellons' hash-prospector).

  x ^= x >> 16; x *= 0x7feb352d; x ^= x >> 15; x *= 0x846ca68b; x ^= x >> 16
  """
  x = x ^ (x >> 16)
  x = x * jnp.uint32(0x7FEB352D)
  x = x ^ (x >> 15)
  x = x * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def _plus(x, index):
  return _mix(x) + jnp.asarray(index).astype(jnp.uint32)


def stream_hash(seed, b):
  """mix(seed) + b: what a seed and a stream bring to `row_hash`."""
  return _plus(jnp.asarray(seed).astype(jnp.uint32), b)


def head_hash(stream, h):
  """mix(stream) + h: what the `stream_hash` of a seed and b gives with h."""
  return _plus(stream, h)


def row_hash(stream, h, t):
  """mix(mix(mix(stream) + h) + t): the part of `keep` without keys.

  Args:
    stream: `stream_hash` of a seed and b.
  """
  return query_hash(head_hash(stream, h), t)


def query_hash(head, t):
  """The same from the `head_hash` of a stream and h."""
  return _mix(_plus(head, t))


def keep_key(row, x, rate):
  """mix(row + x * 0x9e3779b9) >= floor(rate * 2**32), all in uint32."""
  x = jnp.asarray(x).astype(jnp.uint32)
  bits = _mix(row + x * jnp.uint32(0x9E3779B9))
  return bits >= jnp.uint32(int(rate * 2**32))


def keep(seed, b, h, t, x, rate):
  """Which attention weights stay: True with probability 1 - rate.

  keep = keep_key(row_hash(stream_hash(seed, b), h, t), x, rate)

  Args:
    seed: uint32 scalar, another one for each layer and step.
    b, h, t, x: integers that broadcast against each other: batch row, head,
      query index in [0, T), key position x = s - (S - T) in [T - S, T).
    rate: the share to drop, a Python float in [0, 1).
  """
  return keep_key(row_hash(stream_hash(seed, b), h, t), x, rate)
