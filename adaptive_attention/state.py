"""What a model keeps of earlier tokens: segment memory or KV cache, one State.

To read a prompt, to write a token and to train over a memory are one call,
`logits, state = model.apply(params, tokens, state=state)`. A state holds a part
for each layer, which appends the keys and values of the new tokens and attends.

Segment memory is as in Transformer-XL (Dai et al. 2019) and Sukhbaatar et al.
2019: keys and values of the tokens before a segment, through which no gradient
flows. The KV cache is that of `attention.decode`: what each head can still see.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from adaptive_attention import masks
from adaptive_attention.attention import attend as attend_plainly
from adaptive_attention.attention import attend_ring, decode
from adaptive_attention.attention.ring import Ring
from adaptive_attention.config import ModelConfig
from adaptive_attention.mask_parameters import mask_params

CACHES = ("spans", "dense")


class LayerState(Protocol):
  """One layer's part of a `State`; a pytree."""

  def attend(
    self,
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    mask: masks.Mask | None,
    *,
    tokens_read: jax.Array | np.uint32,
    relative_RK: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: jax.Array | None = None,
    implementation: str | None = None,
  ) -> tuple[jax.Array, "LayerState"]:
    """Appends T keys and values, then attends: (out_BTHK, the new part).

    Raises:
      NotImplementedError: an option that it cannot serve.
    """
    ...


def attend(
  state: LayerState | None,
  q_BTHK: jax.Array,
  k_BTHK: jax.Array,
  v_BTHK: jax.Array,
  mask: masks.Mask | None,
  *,
  tokens_read: jax.Array | np.uint32,
  **options: Any,
) -> tuple[jax.Array, LayerState | None]:
  """Attends over a layer's state and the new tokens; without a state to them.

  Args:
    options: relative_RK, dropout_rate, dropout_seed, implementation, as of
      `attention.attend`.
  """
  if state is None:
    return attend_plainly(q_BTHK, k_BTHK, v_BTHK, mask, **options), None
  return state.attend(
    q_BTHK, k_BTHK, v_BTHK, mask, tokens_read=tokens_read, **options
  )


@flax.struct.dataclass
class SegmentKV:
  """The keys and values of a layer's streams, in rows of rings.

  Attributes:
    k, v: (N, S, H, K) of N streams, as in a `Ring`.
    memory_tokens: static; how many tokens before a segment can be seen.
    first_stream: which of the N streams a call begins with; None for the first.
  """

  k: jax.Array
  v: jax.Array
  memory_tokens: int = flax.struct.field(pytree_node=False)
  first_stream: jax.Array | int | None = None

  def attend(
    self, q_BTHK, k_BTHK, v_BTHK, mask, *, tokens_read, **options
  ) -> tuple[jax.Array, "SegmentKV"]:
    """Appends T tokens in place of the oldest, and attends over what is there.

    Raises:
      ValueError: another number of tokens than it was made for.
    """
    T, S = k_BTHK.shape[1], self.k.shape[1]
    if ring_rows(self.memory_tokens, T) != S:
      raise ValueError(
        f"rings of {S} rows do not serve calls with {T} tokens over a memory "
        f"of {self.memory_tokens}, which need "
        f"{ring_rows(self.memory_tokens, T)}; make the state by "
        f"init_memory(config, streams, {T})"
      )
    stream = 0 if self.first_stream is None else self.first_stream
    tokens_read = jnp.asarray(tokens_read, jnp.uint32)
    first_row = (tokens_read % S).astype(jnp.int32)
    read = jnp.minimum(tokens_read, self.memory_tokens).astype(jnp.int32)
    out_BTHK, ring = attend_ring(
      Ring(self.k, self.v, first_row, stream),
      *(q_BTHK, k_BTHK, v_BTHK, mask),
      first_key=S - T - read,
      **options,
    )
    return out_BTHK, self.replace(k=ring.k_NSHK, v=ring.v_NSHK)

  @property
  def nbytes(self) -> int:
    return self.k.nbytes + self.v.nbytes


@flax.struct.dataclass
class KVCache:
  """What a layer's heads can still see, of sequences that are written.

  Attributes:
    k, v: of each group (B, G, P, Y, K), as `attention.decode` has them.
    bias: of each group (G, r, Y) log m + log w by distance; -inf where hidden.
    groups: static; the groups of heads.
  """

  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  bias: tuple[jax.Array, ...]
  groups: tuple[decode.Group, ...] = flax.struct.field(pytree_node=False)

  def attend(
    self,
    q_BTHK,
    k_BTHK,
    v_BTHK,
    mask,
    *,
    tokens_read,
    relative_RK=None,
    dropout_rate: float = 0.0,
    dropout_seed=None,
    implementation: str | None = None,
  ) -> tuple[jax.Array, "KVCache"]:
    """Appends T tokens, and attends over what the heads can see.

    One token looks into the cache, by masks as they were when it was made; more
    of them look at each other too, by `mask`. An `implementation` is that of
    the latter.

    Raises:
      ValueError: another number of sequences than the cache has.
      NotImplementedError: dropout.
    """
    del dropout_seed  # There is no dropout here.
    B, T = q_BTHK.shape[:2]
    if (sequences := self.k[0].shape[0]) != B:
      raise ValueError(
        f"the cache is of {sequences} sequence(s), not of {B}; make one by "
        f"init_cache(params, config, batch={B})"
      )
    if dropout_rate:
      raise NotImplementedError(
        f"dropout_rate={dropout_rate} cannot be served out of a cache; call "
        "the model without train=True"
      )
    if T == 1:
      k, v = self._appended_one(k_BTHK, v_BTHK, tokens_read)
      out_BTHK = decode.attend_one(
        self.groups, q_BTHK, k, v, self.bias, tokens_read, relative_RK
      )
    else:
      k, v = self._appended(k_BTHK, v_BTHK, tokens_read)
      out_BTHK = self._attend_to_all(
        *(q_BTHK, k_BTHK, v_BTHK, mask, tokens_read),
        relative_RK=relative_RK,
        implementation=implementation,
      )
    return out_BTHK, self.replace(k=k, v=v)

  def _appended_one(self, k_B1HK, v_B1HK, tokens_read):
    return (
      tuple(
        decode.put(ring, x_B1HK[:, 0, np.array(group.heads)], tokens_read)
        for group, ring in zip(self.groups, rings, strict=True)
      )
      for rings, x_B1HK in ((self.k, k_B1HK), (self.v, v_B1HK))
    )

  def _appended(self, k_BTHK, v_BTHK, tokens_read):
    return (
      tuple(
        decode.put_all(
          group, ring, x_BTHK[:, :, np.array(group.heads)], tokens_read
        )
        for group, ring in zip(self.groups, rings, strict=True)
      )
      for rings, x_BTHK in ((self.k, k_BTHK), (self.v, v_BTHK))
    )

  def _attend_to_all(
    self, q_BTHK, k_BTHK, v_BTHK, mask, tokens_read, **options
  ):
    if known(tokens_read) == 0:  # Then nothing in the cache is visible.
      return attend_plainly(q_BTHK, k_BTHK, v_BTHK, mask, **options)
    out_BTHK = jnp.zeros_like(q_BTHK)
    for group, k, v in zip(self.groups, self.k, self.v, strict=True):
      heads = np.array(group.heads)
      k_BSGK, v_BSGK = (
        jnp.concatenate(
          [decode.in_order(group, ring, tokens_read), x[:, :, heads]], axis=1
        )
        for ring, x in ((k, k_BTHK), (v, v_BTHK))
      )
      older = group.ring_rows
      read = jnp.minimum(tokens_read, older).astype(jnp.int32)
      out_BTGK = attend_plainly(
        q_BTHK[:, :, heads],
        k_BSGK,
        v_BSGK,
        jax.tree.map(lambda x_H, heads=heads: x_H[heads], mask),
        memory=older,
        first_key=older - read,
        **options,
      )
      out_BTHK = out_BTHK.at[:, :, heads].set(out_BTGK)
    return out_BTHK

  @property
  def nbytes(self) -> int:
    return sum(x.nbytes for x in (*self.k, *self.v))


@flax.struct.dataclass
class State:
  """What a model keeps of the earlier tokens of its streams; a pytree.

  Donate it to a call that goes on with it, as it is copied otherwise.

  Attributes:
    layers: each layer's part.
    tokens_read: uint32, of each stream since its start. At 0 nothing that is
      held is visible, so that a stream starts anew by it alone.
    first_position: uint32 (N,), where in a text each stream begins; None where
      all begin at 0. What is rounded differs with the position.
  """

  layers: tuple[Any, ...]
  tokens_read: jax.Array | np.uint32
  first_position: jax.Array | None = None

  @property
  def nbytes(self) -> int:
    """Bytes of all keys and values."""
    return sum(layer.nbytes for layer in self.layers)

  def positions(self, B: int, T: int) -> jax.Array:
    """Returns those of the next T tokens: (T,), or (B, T) of B streams."""
    position_T = jnp.arange(T, dtype=jnp.uint32) + self.tokens_read
    if self.first_position is None:
      return position_T
    first = self.layers[0].first_stream
    first_B = jax.lax.dynamic_slice_in_dim(
      self.first_position, 0 if first is None else first, B
    )
    return first_B[:, None] + position_T[None]

  def of_streams(self, first: jax.Array | int | None) -> "State":
    """Returns it with calls being of the streams from `first` on."""
    return self.replace(
      layers=tuple(layer.replace(first_stream=first) for layer in self.layers)
    )

  def at(self, tokens_read: jax.Array) -> "State":
    """Returns it as if so many tokens had been read."""
    return self.replace(tokens_read=tokens_read)

  def after(self, layers, T: int) -> "State":
    """Returns the state whose layers have appended T tokens."""
    return self.replace(
      layers=tuple(layers), tokens_read=self.tokens_read + jnp.uint32(T)
    )


@flax.struct.dataclass
class Stateless:
  """A `State` of layers that keep nothing: every call begins a text.

  A pytree without leaves.

  Attributes:
    n_layer: static; of how many layers.
  """

  n_layer: int = flax.struct.field(pytree_node=False)
  tokens_read = np.uint32(0)
  nbytes = 0

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


def known(tokens_read) -> int | None:
  """Returns how many tokens were read; None where that is traced."""
  if isinstance(tokens_read, jax.core.Tracer):
    return None
  return int(tokens_read)


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


def init_memory(config: ModelConfig, streams: int, T: int) -> State:
  """Returns an empty segment memory of so many streams, for calls of T tokens.

  Args:
    config: the model's; `memory_tokens` says how far back it goes.
    streams: N.
    T: tokens of a segment.

  Raises:
    ValueError: sizes below 1.
  """
  for name, value in (("streams", streams), ("T", T)):
    if value < 1:
      raise ValueError(f"{name}={value} is not possible; expected 1 or more")
  shape = (
    streams,
    ring_rows(config.memory_tokens, T),
    config.n_head,
    config.width // config.n_head,
  )

  def layer():
    k, v = (jnp.zeros(shape, config.compute_dtype) for _ in range(2))
    return SegmentKV(k, v, config.memory_tokens)

  return State(tuple(layer() for _ in range(config.n_layer)), jnp.uint32(0))


def cache_groups(
  params: Mapping, config: ModelConfig, cache: str = "spans"
) -> tuple[tuple[decode.Group, ...], ...]:
  """Returns the groups of heads of each layer, whose rings are of one size.

  Args:
    params: concrete, as the sizes follow from the spans.
    cache: "spans", rings as long as each head's reach, or "dense", all as long
      as any head could look.

  Raises:
    ValueError: another kind of cache.
  """
  match cache:
    case "spans":
      return tuple(
        decode.groups_of(jax.tree.map(np.asarray, mask), config.cache_tokens)
        for mask in mask_params(params, config)
      )
    case "dense":
      dense = decode.dense_groups(config.n_head, config.cache_tokens)
      return (dense,) * config.n_layer
  raise ValueError(f"cache={cache!r} is unknown; choose one of {CACHES}")


def init_cache(
  params: Mapping,
  config: ModelConfig,
  batch: int,
  cache: str = "spans",
  groups: tuple[tuple[decode.Group, ...], ...] | None = None,
) -> State:
  """Returns an empty KV cache for B sequences of one length.

  Args:
    params: the model's; concrete, unless `groups` are given.
    batch: B.
    cache: as of `cache_groups`.
    groups: what `cache_groups` returned, in place of it.

  Raises:
    ValueError: another kind of cache, or less than no sequence.
  """
  if batch < 0:
    raise ValueError(f"batch={batch} is not possible; expected 0 or more")
  if groups is None:
    groups = cache_groups(params, config, cache)
  K = config.width // config.n_head

  def layer(mask, groups):
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
