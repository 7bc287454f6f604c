"""Segment memory: the keys and values of the tokens before a segment.

It is that of Transformer-XL (Dai et al. 2019) and Sukhbaatar et al. 2019. No
gradient flows to keys and values that are older than the segment. Heads hold as
many as they reach, with a margin; see `attention.head_groups`.

A ring is read at all its positions in turn, also under a wave: a key that the
wave hides from one query is open to a later one.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adaptive_attention import masks
from adaptive_attention.attention import attend_ring, head_groups
from adaptive_attention.attention.ring import Ring, in_order
from adaptive_attention.config import ModelConfig

Groups = tuple[head_groups.Group, ...]


class SegmentKV(flax.struct.PyTreeNode):
  """One layer's keys and values of N streams, in rings of groups of heads.

  Attributes:
    k, v: for each group (N, S, G, K), as in a `Ring`.
    first_kept: for each group uint32, how many tokens of each stream came
      before the first that its heads hold; what came before that does not exist
      for them. It is zero but where rings were made longer.
    groups: static; the groups of heads.
    memory_tokens: static; how many tokens before a segment are visible.
    first_stream: the stream that a call begins with; None for the first.
  """

  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  first_kept: tuple[jax.Array, ...]
  groups: Groups = flax.struct.field(pytree_node=False)
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
    """Writes T tokens over the oldest, and attends over the rings.

    Raises:
      ValueError: a number of tokens that needs rings of another length.
    """
    tokens_read = jnp.asarray(tokens_read, jnp.uint32)
    # Streams that start again have nothing before what they hold.
    first_kept = tuple(jnp.minimum(x, tokens_read) for x in self.first_kept)
    keys = [group.heads for group in self.groups]
    heads = [group.query_heads for group in self.groups]
    parts = zip(
      *(_dealt(q_BTHK, heads), _dealt(k_BTGK, keys), _dealt(v_BTGK, keys)),
      strict=True,
    )
    outs, rings = [], []
    for at, of_group in enumerate(parts):
      T = q_BTHK.shape[1]
      ring, first_key = self._ring(at, T, tokens_read, first_kept[at])
      out, ring = attend_ring(
        *(ring, *of_group),
        jax.tree.map(lambda x_H, at=at: x_H[heads[at]], mask),
        first_key=first_key,
        dropout_heads=heads[at],
        **options,
      )
      outs.append(out)
      rings.append(ring)
    order = np.argsort(np.concatenate(heads))
    (out_BTHK,) = _dealt(jnp.concatenate(outs, axis=2), [order])
    return out_BTHK, self.replace(
      k=tuple(ring.k_NSHK for ring in rings),
      v=tuple(ring.v_NSHK for ring in rings),
      first_kept=first_kept,
    )

  def _ring(
    self, at: int, T: int, tokens_read: jax.Array, first_kept: jax.Array
  ) -> tuple[Ring, jax.Array]:
    """Returns (a group's ring, the first key that exists after T more)."""
    S = self.k[at].shape[1]
    if (expected := self.groups[at].rows + T - 1) != S:
      raise ValueError(
        f"rings of {S} rows do not serve calls with {T} tokens over a memory "
        f"of {self.memory_tokens}, which need {expected}; make the state by "
        f"init_memory(config, streams, {T}), or with groups for {T} tokens"
      )
    held = jnp.minimum(tokens_read - first_kept, min(self.memory_tokens, S - T))
    first_row = (tokens_read % S).astype(jnp.int32)
    stream = 0 if self.first_stream is None else self.first_stream
    ring = Ring(self.k[at], self.v[at], first_row, stream)
    return ring, S - T - held.astype(jnp.int32)

  @property
  def nbytes(self) -> int:
    """Bytes of all keys and values."""
    return sum(x.size * x.dtype.itemsize for x in (*self.k, *self.v))

  def held(self, tokens_read: int) -> list[int]:
    """Returns for each head of keys how many of the newest tokens it holds."""
    held_G: dict[int, int] = {}
    for group, k, first_kept in zip(
      self.groups, self.k, self.first_kept, strict=True
    ):
      # All devices have read equally many tokens.
      first = min(int(np.max(first_kept)), tokens_read)
      of_group = min(tokens_read - first, k.shape[-3])
      held_G |= dict.fromkeys(group.heads, of_group)
    return [held_G[h] for h in sorted(held_G)]

  def regrouped(
    self,
    groups: Groups,
    T: int,
    tokens_read: jax.Array | np.uint32 | int,
  ) -> "SegmentKV":
    """Returns the same keys and values in the rings of other groups.

    Shorter rings lose the oldest tokens. Longer rings hold no more than before,
    until more tokens are read.

    Args:
      groups: all heads of each hold equally many tokens of those it asks for.
      T: tokens of a call.
      tokens_read: how many tokens of each stream were read.
    """
    read = jnp.asarray(tokens_read, jnp.uint32)
    place = {
      h: (at, i)
      for at, group in enumerate(self.groups)
      for i, h in enumerate(group.heads)
    }

    def moved(rings: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      """Returns the rings of the new groups."""
      return tuple(
        jnp.concatenate(
          [
            _resized(rings[at][:, :, i : i + 1], group.rows + T - 1, read)
            for at, i in map(place.__getitem__, group.heads)
          ],
          axis=2,
        )
        for group in groups
      )

    return self.replace(
      k=moved(self.k),
      v=moved(self.v),
      first_kept=tuple(
        self._first_kept(group, [place[h][0] for h in group.heads], T, read)
        for group in groups
      ),
      groups=groups,
    )

  def _first_kept(
    self, new: head_groups.Group, before: list[int], T: int, read: jax.Array
  ) -> jax.Array:
    """Returns the `first_kept` of a group out of heads of the groups before."""
    asked = read - jnp.minimum(read, new.rows - 1)
    found = jnp.uint32(0)
    for at in sorted(set(before)):
      rows = min(self.k[at].shape[1], new.rows + T - 1)
      kept = jnp.minimum(self.first_kept[at], read)
      kept = jnp.maximum(kept, read - jnp.minimum(read, rows))
      found = jnp.maximum(found, jnp.where(kept <= asked, jnp.uint32(0), kept))
    return found


def _resized(ring_NSGK: jax.Array, S: int, read: jax.Array) -> jax.Array:
  """Returns a ring of S rows: a ring's newest tokens, and zeros before them."""
  N, before = ring_NSGK.shape[:2]
  first_row = (read % before).astype(jnp.int32)
  ring = Ring(ring_NSGK, ring_NSGK, first_row)
  newest = in_order(ring_NSGK, ring, N)[:, -S:]
  newest = jnp.pad(newest, ((0, 0), (max(S - before, 0), 0), (0, 0), (0, 0)))
  return jnp.roll(newest, (read % S).astype(jnp.int32), axis=1)


def _dealt(x_BTHK: jax.Array, parts: Sequence[Any]) -> list[jax.Array]:
  """Returns the heads of each part, in its order.

  Heads are split and put together, and so is their gradient. The gradient of
  an index would fill an array of all heads for each part.
  """
  H = x_BTHK.shape[2]
  if [list(part) for part in parts] == [list(range(H))]:
    return [x_BTHK]
  heads = lax.split(x_BTHK, (1,) * H, axis=2)
  return [lax.concatenate([heads[h] for h in part], 2) for part in parts]


def ring_rows(memory_tokens: int, T: int) -> int:
  """Returns S, the rows of a ring that holds all of a memory.

  They have room for the memory, in whole segments of T tokens, and for one more
  segment.
  """
  return (-(-memory_tokens // T) + 1) * T


def sizes(config: ModelConfig, T: int) -> head_groups.Memory:
  """Returns what decides how long the rings of a model's memory are."""
  longest = ring_rows(config.memory_tokens, T) - T + 1
  return head_groups.Memory(T, longest, config.memory_margin)


def reaches(
  layers: Sequence[masks.Mask], config: ModelConfig, T: int
) -> list[np.ndarray]:
  """Returns for each layer the reach of its heads of keys, rounded up.

  Args:
    layers: the mask of each layer; concrete.
    T: tokens of a segment.
  """
  longest = sizes(config, T).longest
  return [
    head_groups.upper_reach(mask, longest, config.n_kv_head) for mask in layers
  ]


def memory_groups(
  layers: Sequence[masks.Mask],
  config: ModelConfig,
  T: int,
  held_LG: Sequence[Sequence[int]] | None = None,
) -> tuple[Groups, ...]:
  """Returns for each layer the groups of heads of a segment memory.

  The rings of a group hold what its heads reach and a segment. They are longer
  than that by the share `config.memory_margin`, but hold at most
  `config.memory_tokens`, in whole segments, and a segment.

  Args:
    layers: the mask of each layer, of `mask_params`; concrete.
    T: tokens of a segment.
    held_LG: how many tokens each head holds, where a memory is made out of
      another; see `head_groups.Memory.groups`.
  """
  queries = config.n_head // config.n_kv_head
  of_layer = sizes(config, T).groups
  reach_LG = reaches(layers, config, T)
  if held_LG is None:
    return tuple(of_layer(reach_G, queries) for reach_G in reach_LG)
  return tuple(
    of_layer(reach_G, queries, held_G)
    for reach_G, held_G in zip(reach_LG, held_LG, strict=True)
  )


def holds(
  groups: tuple[Groups, ...],
  layers: Sequence[masks.Mask],
  config: ModelConfig,
  share: float = 0.0,
) -> bool:
  """Tells whether rings of these groups hold what all heads reach.

  Args:
    layers: the mask of each layer; concrete.
    share: the share of the margin that is to be left beyond that.
  """
  memory = sizes(config, config.context_tokens)
  reach_LG = reaches(layers, config, config.context_tokens)
  return all(
    memory.holds(of_layer, reach_G, share)
    for of_layer, reach_G in zip(groups, reach_LG, strict=True)
  )


def full_groups(config: ModelConfig, T: int) -> tuple[Groups, ...]:
  """Returns one group of each layer's heads, which hold all of the memory."""
  longest = sizes(config, T).longest
  groups = head_groups.dense_groups(config.n_head, longest, config.n_kv_head)
  return (groups,) * config.n_layer


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
