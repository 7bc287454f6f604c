"""The state of a model: a segment memory or a KV cache of earlier tokens.

To read a prompt, to write a token and to train over a memory are one call,
`logits, state = model.apply(variables, tokens, state=state)`. A state holds a
part for each layer, which appends the keys and values of the new tokens and
attends.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from adaptive_attention import masks
from adaptive_attention.attention import attend as attend_plainly
from adaptive_attention.attention import decode, head_groups
from adaptive_attention.config import ModelConfig
from adaptive_attention.kv_cache import KVCache, cache_groups, known
from adaptive_attention.mask_parameters import mask_params
from adaptive_attention.segment_memory import (
  Groups,
  SegmentKV,
  full_groups,
)

TokensRead = jax.Array | np.uint32 | int


class LayerState(Protocol):
  """One layer's part of a `State`; a pytree."""

  def attend(
    self,
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    mask: masks.Mask | None,
    *,
    tokens_read: TokensRead,
    relative_RK: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: jax.Array | None = None,
    implementation: str | None = None,
  ) -> tuple[jax.Array, "LayerState"]:
    """Appends T keys and values, then attends; returns (out_BTHK, new part).

    Args:
      tokens_read: how many tokens of each sequence came before.
      q_BTHK, k_BTGK, v_BTGK, mask, relative_RK: as in `attention.attend`.
      dropout_rate, dropout_seed, implementation: as in `attention.attend`. One
        token over a KV cache is computed by `attention.decode`, whichever
        implementation is named.

    Raises:
      NotImplementedError: an option that this part cannot serve.
    """
    ...


def attend(
  state: LayerState | None,
  q_BTHK: jax.Array,
  k_BTGK: jax.Array,
  v_BTGK: jax.Array,
  mask: masks.Mask | None,
  *,
  tokens_read: TokensRead,
  **options: Any,
) -> tuple[jax.Array, LayerState | None]:
  """Attends over a layer's state and the new tokens.

  Args:
    state: the layer's part; if it is None, only the new tokens are there.
    options: relative_RK, dropout_rate, dropout_seed and implementation, as in
      `attention.attend`; without a state segment_ids and key_mask, too.

  Returns:
    (out_BTHK, the new part of the layer, or None).

  Raises:
    NotImplementedError: segments or padding in what follows a state.
  """
  if state is None:
    return attend_plainly(q_BTHK, k_BTGK, v_BTGK, mask, **options), None
  for name in ("segment_ids", "key_mask"):
    if name in options:
      raise NotImplementedError(
        f"{name} is not served over a state, whose tokens have none; give "
        "whole sequences without a state"
      )
  return state.attend(
    q_BTHK, k_BTGK, v_BTGK, mask, tokens_read=tokens_read, **options
  )


class State(flax.struct.PyTreeNode):
  """What a model keeps of the earlier tokens of its streams; a pytree.

  Donate it to a call that goes on with it, as it is copied otherwise.

  Attributes:
    layers: each layer's part.
    tokens_read: uint32; how many tokens of each stream were read. At 0 nothing
      in the state is visible, so that setting it to 0 starts the streams again.
    first_position: uint32 (N,), the position in the text where each stream
      begins; None where all begin at 0. It changes results by rounding alone.
  """

  layers: tuple[Any, ...]
  tokens_read: TokensRead
  first_position: jax.Array | None = None

  @property
  def known_tokens_read(self) -> int | None:
    """`tokens_read` as a Python integer; None where it is traced."""
    return known(self.tokens_read)

  @property
  def nbytes(self) -> int:
    """Bytes of all keys and values."""
    return sum(layer.nbytes for layer in self.layers)

  def positions(self, B: int, T: int) -> jax.Array:
    """Returns the positions of the next T tokens: (T,), or (B, T).

    They are (B, T) where the streams have a `first_position` each.
    """
    position_T = jnp.arange(T, dtype=jnp.uint32) + self.tokens_read
    if self.first_position is None:
      return position_T
    first = self.layers[0].first_stream
    first_B = jax.lax.dynamic_slice_in_dim(
      self.first_position, 0 if first is None else first, B
    )
    return first_B[:, None] + position_T[None]

  def of_streams(self, first: jax.Array | int | None) -> "State":
    """Returns a segment memory whose calls begin with the stream `first`."""
    return self.replace(
      layers=tuple(layer.replace(first_stream=first) for layer in self.layers)
    )

  def at(self, tokens_read: jax.Array) -> "State":
    """Returns the state with another number of tokens read."""
    return self.replace(tokens_read=tokens_read)

  @property
  def groups(self) -> tuple[Groups, ...]:
    """The groups of heads of each layer."""
    return tuple(layer.groups for layer in self.layers)

  def regrouped(self, groups: tuple[Groups, ...], T: int) -> "State":
    """Returns a segment memory in the rings of other groups.

    Args:
      groups: those of `segment_memory.memory_groups`, for the tokens that the
        heads hold.
      T: tokens of a call.
    """
    layers = zip(self.layers, groups, strict=True)
    return self.replace(
      layers=tuple(
        layer.regrouped(of_layer, T, self.tokens_read)
        for layer, of_layer in layers
      )
    )

  def after(self, layers: Iterable[Any], T: int) -> "State":
    """Returns the state whose layers have appended T tokens."""
    return self.replace(
      layers=tuple(layers), tokens_read=self.tokens_read + jnp.uint32(T)
    )


class Stateless(flax.struct.PyTreeNode):
  """A `State` that holds nothing, so that every call begins a text.

  It is a pytree without leaves.

  Attributes:
    n_layer: static; the number of layers.
  """

  n_layer: int = flax.struct.field(pytree_node=False)
  tokens_read: ClassVar[np.uint32] = np.uint32(0)
  known_tokens_read: ClassVar[int] = 0
  nbytes: ClassVar[int] = 0

  @property
  def layers(self) -> tuple[None, ...]:
    return (None,) * self.n_layer

  def positions(self, B: int, T: int) -> jax.Array:
    del B
    return jnp.arange(T, dtype=jnp.uint32)

  def of_streams(self, first: jax.Array | int | None) -> "Stateless":
    del first
    return self

  def at(self, tokens_read: jax.Array) -> "Stateless":
    del tokens_read
    return self

  def after(self, layers: Any, T: int) -> "Stateless":
    del layers, T
    return self


def leaves_today(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the arrays of a segment memory of any version, by today's paths.

  In version 0.1 k.I and v.I were the keys and values of layer I, of all heads;
  in 0.4 layers.I.k and layers.I.v.
  """
  found = {}
  for path, array in leaves.items():
    path = re.sub(r"^([kv])\.(\d+)$", r"layers.\2.\1", path)
    if old := re.fullmatch(r"(layers\.\d+)\.([kv])", path):
      path = f"{path}.0"
      found[f"{old[1]}.first_kept.0"] = np.zeros(len(array), np.uint32)
    found[path] = array
  return found


def init_memory(
  config: ModelConfig,
  streams: int,
  T: int,
  groups: tuple[Groups, ...] | None = None,
) -> State:
  """Returns an empty segment memory of N streams, for calls with T tokens.

  Earlier keys and values take no gradient, as in Transformer-XL (Dai et al.
  2019) and Sukhbaatar et al. 2019. Each layer has for each group of G heads of
  keys (N, S, G, K) keys and as many values in `config.compute_dtype`. S is the
  reach in tokens that the group's rings serve, plus T - 1.

  Args:
    config: the model's; `memory_tokens` are visible before each segment.
    streams: N.
    T: tokens of a segment.
    groups: those of `segment_memory.memory_groups`; by default all heads hold
      all of the memory, in whole segments.

  Raises:
    ValueError: `streams` or `T` below 1.
  """
  for name, value in (("streams", streams), ("T", T)):
    if value < 1:
      raise ValueError(f"{name}={value} is not possible; expected 1 or more")
  K = config.width // config.n_head

  def layer(groups: Groups) -> SegmentKV:
    k, v = (
      tuple(
        jnp.zeros(
          (streams, group.rows + T - 1, len(group.heads), K),
          config.compute_dtype,
        )
        for group in groups
      )
      for _ in range(2)
    )
    first_kept = tuple(jnp.uint32(0) for _ in groups)
    return SegmentKV(k, v, first_kept, groups, config.memory_tokens)

  layers = map(layer, full_groups(config, T) if groups is None else groups)
  return State(tuple(layers), jnp.uint32(0))


def init_cache(
  params: Mapping,
  config: ModelConfig,
  batch: int,
  cache: str | None = None,
  groups: tuple[tuple[head_groups.Group, ...], ...] | None = None,
) -> State:
  """Returns an empty KV cache for B sequences of one length.

  Each layer has for each group of G heads of keys (B, G, P, Y, K) keys and as
  many values in `config.compute_dtype`: rings of P Y rows, at least the reach
  ceil(z + R) in tokens of each head (z of Sukhbaatar et al. 2019), dealt into
  the P residue classes of an integer wave. See `attention.decode`.

  Args:
    params, config: the model's; concrete, unless `groups` are given.
    batch: B.
    cache: "spans" or "dense", as in `kv_cache.cache_groups`; "spans" if neither
      this nor `groups` is given.
    groups: what `cache_groups` returned, in place of `cache`.

  Raises:
    ValueError: an unknown kind of cache, both `cache` and `groups`, a negative
      `batch`, or parameters that lack those of the masks, as in `mask_params`.
  """
  if batch < 0:
    raise ValueError(f"batch={batch} is not possible; expected 0 or more")
  if groups is None:
    groups = cache_groups(params, config, "spans" if cache is None else cache)
  elif cache is not None:
    raise ValueError(
      f"cache={cache!r} means nothing where groups are given; leave one out"
    )
  K = config.width // config.n_head

  def layer(mask: masks.Mask, groups: tuple[head_groups.Group, ...]) -> KVCache:
    k, v = (
      tuple(
        jnp.zeros(
          (batch, len(group.heads), group.period, group.rows, K),
          config.compute_dtype,
        )
        for group in groups
      )
      for _ in range(2)
    )
    return KVCache(k, v, decode.biases(mask, groups), groups)

  layers = map(layer, mask_params(params, config), groups)
  return State(tuple(layers), np.uint32(0))
