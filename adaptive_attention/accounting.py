"""Exact counts: parameters, open pairs, multiply-adds and bytes of cache.

Multiply-adds (MACs) per token of the whole model:

  L (2 D^2 + 2 D G K + 2 D F) + D V
    + 2 K * (open pairs per token, summed over all heads)

The last term is that of attention: an open pair takes K MACs for its score and
K for its value. F = 4 D. There are G heads of keys and values.
"""

from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.typing import DTypeLike

from adaptive_attention import attention, masks
from adaptive_attention.attention import choice, head_groups
from adaptive_attention.attention.choice import Call, Choice
from adaptive_attention.config import ModelConfig
from adaptive_attention.segment_memory import ring_rows


def parameter_count(params: Mapping) -> int:
  """Returns how many numbers a tree of parameters holds."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def open_pairs(mask: masks.Mask, T: int, memory: int = 0) -> np.ndarray:
  """Returns (H,) integers: the open pairs (t, s) of T tokens and a memory."""
  distance = np.arange(memory + T, dtype=np.int64)
  open_HS = np.asarray(masks.is_open(mask, distance))
  # A distance up to `memory` occurs T times, each one beyond once less.
  return open_HS.astype(np.int64) @ np.minimum(T, memory + T - distance)


def attention_choice(config: ModelConfig, streams: int = 1) -> Choice:
  """Returns what computes attention over a segment of so many streams.

  Raises:
    NotImplementedError: `config.implementation` does not serve it here.
  """
  T = config.context_tokens
  call = Call(
    B=streams,
    T=T,
    S=_keys(T, config.memory_tokens),
    H=config.n_head,
    K=config.width // config.n_head,
    itemsize=config.compute_dtype.itemsize,
    strided=config.wave is not None and config.wave.integer,
    relative=config.position == "relative",
    memory=config.memory_tokens,
  )
  return choice.chosen(call, _named(config.implementation))


def _named(implementation):
  return None if implementation == "auto" else implementation


def _keys(T, memory):
  return ring_rows(memory, T) if memory else T


def computed_pairs(
  mask: masks.Mask,
  T: int,
  implementation: str,
  memory: int = 0,
  head_width: int = 64,
  dtype: DTypeLike = np.float32,
) -> np.ndarray:
  """Returns (H,) integers: the computed pairs of T tokens and a memory.

  Args:
    implementation: its name, or "auto" for the best that serves here.
    head_width, dtype: of queries and keys, as in `attention.computed_pairs`.
  """
  S = _keys(T, memory)
  return attention.computed_pairs(
    mask,
    T,
    S,
    first_key=S - T - memory,
    implementation=_named(implementation),
    head_width=head_width,
    dtype=dtype,
  )


def attention_macs_per_token(
  layers: Sequence[masks.Mask], config: ModelConfig, T: int, memory: int = 0
) -> dict[str, float]:
  """Returns multiply-adds per token of attention, over all layers and heads.

  Args:
    T, memory: tokens of a segment, and before it.

  Returns:
    `dense`, for all causal pairs; `open`, for the pairs that the masks leave
    open; `computed`, for the pairs that the implementation computes.
  """
  macs_per_pair = 2 * config.width // config.n_head
  heads = config.n_layer * config.n_head
  pairs = {
    "dense": heads * (T * (T + 1) // 2 + T * memory),
    "open": sum(open_pairs(mask, T, memory).sum() for mask in layers),
    "computed": sum(
      computed_pairs(
        *(mask, T, config.implementation, memory),
        *(config.width // config.n_head, config.compute_dtype),
      ).sum()
      for mask in layers
    ),
  }
  return {name: float(macs_per_pair * n / T) for name, n in pairs.items()}


def cache_bytes(
  layers: Sequence[masks.Mask], config: ModelConfig
) -> dict[str, int]:
  """Returns bytes of keys and values of one sequence, by kind of cache.

  Returns:
    `dense`, where every head holds `config.cache_tokens`; `layer`, where the
    heads of a layer hold the longest reach among them; `head`, the KV cache of
    `attention.decode`; `reach`, where every head holds exactly its reach,
    ceil(z + R) tokens or `config.cache_tokens` if that is less.
  """
  heads = config.n_kv_head
  reach_LG = _key_reaches(layers, config)
  rows = {
    "dense": config.n_layer * heads * config.cache_tokens,
    "layer": sum(heads * reach_G.max() for reach_G in reach_LG),
    "head": sum(
      len(group.heads) * group.ring_rows for group in _groups(layers, config)
    ),
    "reach": sum(reach_G.sum() for reach_G in reach_LG),
  }
  return {
    name: int(count) * config.key_value_bytes for name, count in rows.items()
  }


def cache_reads(
  layers: Sequence[masks.Mask], config: ModelConfig
) -> dict[str, int]:
  """Returns how many keys are read per token, over all layers and their heads.

  A head of keys is read once for all heads of queries that it serves.

  Returns:
    `dense`, where every head reads `config.cache_tokens` keys; `reach`, where
    it reads those within its reach; `open`, where it reads the open ones alone;
    `cache`, where it reads the KV cache of `attention.decode`, which skips what
    waves of integer periods hide.
  """
  distance = np.arange(config.cache_tokens)
  return {
    "dense": config.n_layer * config.n_kv_head * config.cache_tokens,
    "reach": sum(int(n_G.sum()) for n_G in _key_reaches(layers, config)),
    "open": sum(
      int(_by_key_head(masks.is_open(mask, distance), config).any(1).sum())
      for mask in layers
    ),
    "cache": sum(
      len(group.heads) * group.reads for group in _groups(layers, config)
    ),
  }


def _by_key_head(x_HS, config) -> np.ndarray:
  """Returns (G, H / G, S): the numbers of heads that read the same keys."""
  x_HS = np.asarray(x_HS)
  return x_HS.reshape(config.n_kv_head, -1, x_HS.shape[-1])


def _key_reaches(layers, config) -> list[np.ndarray]:
  """Returns, for each layer, the reach of each head of keys."""
  return [
    head_groups.key_reach(mask, config.cache_tokens, config.n_kv_head)
    for mask in layers
  ]


def _groups(layers, config) -> Iterator[head_groups.Group]:
  """Yields the groups of heads of all layers."""
  for mask in layers:
    yield from head_groups.groups_of(
      mask, config.cache_tokens, config.n_kv_head
    )


def train_flops_per_token(config: ModelConfig) -> float:
  """Returns FLOPs per token of a training step that computes all causal pairs.

  The keys are those of a segment of `context_tokens` and of the memory before
  it. A multiply-add counts as two FLOPs; it is done once in the forward pass
  and twice in the backward pass. What the masks save is not taken off: see
  `attention_macs_per_token`.
  """
  D, L, V = config.width, config.n_layer, config.vocab_size
  # The mean number of keys of a query.
  keys = (config.context_tokens + 1) / 2 + config.memory_tokens
  of_keys = D * config.n_kv_head // config.n_head
  layer = 2 * D**2 + 2 * D * of_keys + 2 * D * 4 * D
  return 6 * (L * layer + D * V + 2 * D * L * keys)
