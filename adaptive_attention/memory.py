"""What a model keeps of the earlier tokens of its streams, layer by layer.

Segment memory as in Transformer-XL (Dai et al. 2019) and Sukhbaatar et al.
2019: keys and values of the tokens before a segment, through which no gradient
flows. They stand in rings, so that T new tokens are written and nothing moves.
"""

import flax.struct
import jax
import jax.numpy as jnp

from adaptive_attention.attention import attend_ring
from adaptive_attention.attention.ring import Ring


@flax.struct.dataclass
class LayerMemory:
  """One layer's part of a `Memory`."""

  ring: Ring
  tokens_read: jax.Array
  memory_tokens: int = flax.struct.field(pytree_node=False)
  first_position: jax.Array | None = None

  def positions(self, B: int, T: int):
    """(T,) of the next T tokens, or (B, T) where streams differ in theirs."""
    position_T = jnp.arange(T, dtype=jnp.uint32) + self.tokens_read
    if self.first_position is None:
      return position_T
    first_B = jax.lax.dynamic_slice_in_dim(
      self.first_position, self.ring.batch, B
    )
    return first_B[:, None] + position_T[None]

  def attend(self, q_BTHK, k_BTHK, v_BTHK, mask, **options):
    """(out_BTHK, the ring with the T tokens appended); `attend` over both."""
    S, T = self.ring.k_NSHK.shape[1], k_BTHK.shape[1]
    read = jnp.minimum(self.tokens_read, self.memory_tokens).astype(jnp.int32)
    return attend_ring(
      *(self.ring, q_BTHK, k_BTHK, v_BTHK, mask),
      first_key=S - T - read,
      **options,
    )


@flax.struct.dataclass
class Memory:
  """The rings of all layers, and how far their streams have come.

  Attributes:
    k, v: of each layer (N, S, H, K), N streams, the rows of a `Ring`.
    tokens_read: uint32, of each stream since its start; at zero nothing that
      the rings hold is looked at, so that a stream starts anew by it alone.
    memory_tokens: static; how far before a segment it is looked back.
    first_position: uint32 (N,), where in a text each stream starts; None for
      its beginning. What is rounded differs with the position.
  """

  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  tokens_read: jax.Array
  memory_tokens: int = flax.struct.field(pytree_node=False)
  first_position: jax.Array | None = None

  def check(self, T: int):
    """That calls with T tokens were what it was made for.

    Raises:
      ValueError: they were not.
    """
    rows, expected = self.k[0].shape[1], ring_rows(self.memory_tokens, T)
    if rows != expected:
      raise ValueError(
        f"rings of {rows} rows do not serve calls with {T} tokens over a "
        f"memory of {self.memory_tokens}, which need {expected}; make the "
        f"memory by init_memory(config, streams, {T})"
      )

  def layers(self, batch) -> list[LayerMemory]:
    """The layers' parts, for the streams from `batch` on."""
    S = self.k[0].shape[1]
    first_row = (self.tokens_read % S).astype(jnp.int32)
    return [
      LayerMemory(
        Ring(k, v, first_row, batch),
        self.tokens_read,
        self.memory_tokens,
        self.first_position,
      )
      for k, v in zip(self.k, self.v, strict=True)
    ]

  def after(self, rings: list[Ring], T: int) -> "Memory":
    """The memory with the rings to which T tokens were appended."""
    return self.replace(
      k=tuple(ring.k_NSHK for ring in rings),
      v=tuple(ring.v_NSHK for ring in rings),
      tokens_read=self.tokens_read + jnp.uint32(T),
    )


def ring_rows(memory_tokens: int, T: int) -> int:
  """S: room for the memory, in whole segments of T tokens, and for one more."""
  return (-(-memory_tokens // T) + 1) * T


def tokens_before(reach_L, memory_tokens: int, T: int) -> int:
  """How many tokens before a segment its logits depend on, through all layers.

  A layer looks as far back as its longest reach, at most as far as the memory
  before the segment of the query. What it finds there has looked back itself.

  Args:
    reach_L: over how many tokens each layer looks back, first to last.
    memory_tokens, T: tokens before a segment, and of one.
  """
  first = 0
  for reach in reversed(reach_L):
    segment_start = first // T * T
    first = max(segment_start - memory_tokens, first - (reach - 1))
  return -first


def empty(layers, streams, heads, width, memory_tokens, T, dtype) -> Memory:
  """A memory that has read nothing, for calls with T tokens each."""
  shape = (streams, ring_rows(memory_tokens, T), heads, width)
  k, v = (
    tuple(jnp.zeros(shape, dtype) for _ in range(layers)) for _ in range(2)
  )
  return Memory(k, v, jnp.uint32(0), memory_tokens)
