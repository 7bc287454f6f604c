"""What a model keeps of the earlier tokens of its streams, layer by layer.

Segment memory as in Transformer-XL (Dai et al. 2019) and Sukhbaatar et al.
2019: keys and values of the tokens before a segment, through which no gradient
flows. They stand in rings, so that T new tokens are written and nothing moves.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from adaptive_attention.attention.ring import Ring


class Memory(NamedTuple):
  """The rings of all layers, and how far their streams have come.

  Attributes:
    k, v: of each layer (N, S, H, K), N streams, the rows of a `Ring`.
    tokens_read: uint32, of each stream since its start; at zero nothing that
      the rings hold is looked at, so that a stream starts anew by it alone.
  """

  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  tokens_read: jax.Array

  @property
  def rows(self) -> int:
    """S, of each ring."""
    return self.k[0].shape[1]


class LayerMemory(NamedTuple):
  """One layer's part: its ring before T tokens are appended to it."""

  ring: Ring
  tokens_read: jax.Array


def ring_rows(memory_tokens: int, T: int) -> int:
  """S: room for the memory, in whole segments of T tokens, and for one more."""
  return (-(-memory_tokens // T) + 1) * T


def empty(layers, streams, heads, width, memory_tokens, T, dtype) -> Memory:
  """A memory that has read nothing, for calls with T tokens each."""
  shape = (streams, ring_rows(memory_tokens, T), heads, width)
  k, v = (
    tuple(jnp.zeros(shape, dtype) for _ in range(layers)) for _ in range(2)
  )
  return Memory(k, v, jnp.uint32(0))


def first_key(tokens_read, memory_tokens: int, S: int, T: int):
  """The index of the oldest key that a segment may look at."""
  return S - T - jnp.minimum(tokens_read, memory_tokens).astype(jnp.int32)


def layers(memory: Memory, batch=0) -> list[LayerMemory]:
  """The layers' parts, for the streams from `batch` on."""
  first_row = (memory.tokens_read % memory.rows).astype(jnp.int32)
  return [
    LayerMemory(Ring(k, v, first_row, batch), memory.tokens_read)
    for k, v in zip(memory.k, memory.v, strict=True)
  ]


def after(memory: Memory, rings: list[Ring], T: int) -> Memory:
  """The memory with the rings to which T tokens were appended."""
  return Memory(
    tuple(ring.k_NSHK for ring in rings),
    tuple(ring.v_NSHK for ring in rings),
    memory.tokens_read + jnp.uint32(T),
  )
