"""The KV cache of generation: the keys and values within each head's reach.

After training spans and waves are numbers, and they give the cache its shape:
see `attention.decode`.
"""

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from adaptive_attention import masks
from adaptive_attention.attention import attend, decode, head_groups
from adaptive_attention.config import ModelConfig
from adaptive_attention.mask_parameters import mask_params

CACHES = ("spans", "dense")


class KVCache(flax.struct.PyTreeNode):
  """One layer's keys and values of B sequences, in rings of groups of heads.

  Attributes:
    k, v: for each group (B, G, P, Y, K); see `attention.decode` for the axes.
    bias: for each group (G, Q, r, Y) log m + log w by distance; -inf where
      hidden.
    groups: static; the groups of heads.
  """

  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  bias: tuple[jax.Array, ...]
  groups: tuple[head_groups.Group, ...] = flax.struct.field(pytree_node=False)

  def attend(
    self,
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    mask: masks.Mask | None,
    *,
    tokens_read: jax.Array | np.uint32 | int,
    relative_RK: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: jax.Array | None = None,
    implementation: str | None = None,
  ) -> tuple[jax.Array, "KVCache"]:
    """Appends T tokens, and attends over the cache and these tokens.

    One token attends to the cache, whose masks are those with which it was
    made. Several tokens also attend to each other, under `mask` and by the
    `implementation`.

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
    k, v = (
      self._appended(rings, x_BTGK, tokens_read)
      for rings, x_BTGK in ((self.k, k_BTGK), (self.v, v_BTGK))
    )
    if T == 1:
      out_BTHK = decode.attend_one(
        self.groups, q_BTHK, k, v, self.bias, tokens_read, relative_RK
      )
    else:
      out_BTHK = self._attend_to_all(
        *(q_BTHK, k_BTGK, v_BTGK, mask, tokens_read),
        relative_RK=relative_RK,
        implementation=implementation,
      )
    return out_BTHK, self.replace(k=k, v=v)

  def _appended(
    self,
    rings: tuple[jax.Array, ...],
    x_BTGK: jax.Array,
    tokens_read: jax.Array | np.uint32 | int,
  ) -> tuple[jax.Array, ...]:
    """Returns the rings of all groups, with the T new tokens written."""
    return tuple(
      decode.put(group, ring, x_BTGK[:, :, np.array(group.heads)], tokens_read)
      for group, ring in zip(self.groups, rings, strict=True)
    )

  def _attend_to_all(
    self, q_BTHK, k_BTGK, v_BTGK, mask, tokens_read, **options
  ):
    """Returns out_BTHK of T new tokens over the cache and over themselves."""
    if known(tokens_read) == 0:  # Then nothing in the cache is visible.
      return attend(q_BTHK, k_BTGK, v_BTGK, mask, **options)
    out_BTHK = jnp.zeros_like(q_BTHK)
    for group, k, v in zip(self.groups, self.k, self.v, strict=True):
      heads, query_heads = np.array(group.heads), group.query_heads
      k_BSGK, v_BSGK = (
        jnp.concatenate(
          [decode.in_order(group, ring, tokens_read), x[:, :, heads]], axis=1
        )
        for ring, x in ((k, k_BTGK), (v, v_BTGK))
      )
      older = group.ring_rows
      read = jnp.minimum(tokens_read, older).astype(jnp.int32)
      of_group = attend(
        q_BTHK[:, :, query_heads],
        k_BSGK,
        v_BSGK,
        jax.tree.map(lambda x_H, at=query_heads: x_H[at], mask),
        memory=older,
        first_key=older - read,
        **options,
      )
      out_BTHK = out_BTHK.at[:, :, query_heads].set(of_group)
    return out_BTHK

  @property
  def nbytes(self) -> int:
    """Bytes of all keys and values."""
    return sum(x.nbytes for x in (*self.k, *self.v))


def known(tokens_read: jax.Array | np.uint32 | int) -> int | None:
  """Returns `tokens_read` as a Python integer; None where it is traced."""
  if isinstance(tokens_read, jax.core.Tracer):
    return None
  return int(tokens_read)


def cache_groups(
  params: Mapping, config: ModelConfig, cache: str = "spans"
) -> tuple[tuple[head_groups.Group, ...], ...]:
  """Returns the groups of heads of each layer, whose rings are of one size.

  Args:
    params: concrete, as the sizes follow from the spans.
    cache: "spans" for rings as long as each head's reach, or "dense" for rings
      that are all of `config.cache_tokens` rows.

  Raises:
    ValueError: an unknown kind of cache.
  """
  match cache:
    case "spans":
      return tuple(
        head_groups.groups_of(
          jax.tree.map(np.asarray, mask), config.cache_tokens, config.n_kv_head
        )
        for mask in mask_params(params, config)
      )
    case "dense":
      dense = head_groups.dense_groups(
        config.n_head, config.cache_tokens, config.n_kv_head
      )
      return (dense,) * config.n_layer
  raise ValueError(f"cache={cache!r} is unknown; choose one of {CACHES}")
