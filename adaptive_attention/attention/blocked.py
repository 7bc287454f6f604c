"""Exact attention that computes the blocks of a walk alone.

Loops with run-time bounds over blocks of queries and keys, head by head, in
plain XLA: a change of spans or periods recompiles nothing, and memory is linear
in the lengths. The softmax is accumulated block by block and the backward pass
computes the weights again from each row's log of sums (Dao et al. 2022,
"FlashAttention"). `walk` says which blocks these are, `layout` where their rows
stand, and `blocked_bias` what masks add to their logits.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adaptive_attention import masks
from adaptive_attention.attention import (
  blocked_backward,
  blocked_bias,
  checks,
  dropout,
  walk,
)
from adaptive_attention.attention.blocked_backward import LOW, Gradients
from adaptive_attention.attention.blocked_head import (
  Head,
  SegmentWalk,
  Static,
  layouts,
)
from adaptive_attention.attention.heads_and_segments import group_size
from adaptive_attention.attention.layout import BLOCK, put, take
from adaptive_attention.attention.on_devices import varying_alike
from adaptive_attention.attention.ring import Ring


def attend(
  q_BTHK,
  k_BSGK,
  v_BSGK,
  mask,
  *,
  ring,
  memory,
  first_key,
  segments,
  relative_RK,
  dropout_rate,
  dropout_seed,
  dropout_heads,
):
  """Computes what `reference.attend` does, from blocks with an open pair alone.

  The arguments are those of `reference.attend`.
  """
  B, T, H, _ = q_BTHK.shape
  S = k_BSGK.shape[1] if ring is None else ring.k_NSHK.shape[1]
  if mask is None:
    mask = masks.Mask(jnp.full(H, float(S), jnp.float32), 1.0)
  sizes = sizes_of(mask, T, S)
  heads, table_HS = prepared(mask, first_key, sizes)
  precision = jax.config.jax_default_matmul_precision
  static = Static(sizes, memory, dropout_rate, ring is not None, precision)
  if relative_RK is not None:
    relative_RK = relative_RK.astype(jnp.float32)
  seed = jnp.asarray(0 if dropout_seed is None else dropout_seed)
  seed = seed.astype(jnp.uint32)
  stream_B = dropout.stream_hash(seed, jnp.arange(B, dtype=jnp.int32))
  stream_BH = dropout.head_hash(stream_B[:, None], dropout_heads[None])
  walked = heads, table_HS, relative_RK
  arrays = q_BTHK, k_BSGK, v_BSGK, ring, stream_BH
  if segments is None:
    return _attend(static, *varying_alike(*walked, *arrays, None))
  found = SegmentWalk(segments, segments.first_keys() - sizes.older)
  walked, arrays = varying_alike(walked, (*arrays, found))

  def one_sequence(arrays):
    """Attends in one sequence, as each has its own blocks."""
    return _attend(static, *walked, *jax.tree.map(lambda x: x[None], arrays))[0]

  return lax.map(one_sequence, arrays)


def sizes_of(mask, T, S) -> walk.Sizes:
  """Returns what is static of the blocks."""
  strided = mask.wave is not None and mask.wave.integer
  return walk.Sizes(T, S, BLOCK, BLOCK, strided)


def prepared(mask, first_key, sizes):
  """Returns (heads, table_HS): the walk, and log m + log w by distance.

  The table is differentiable.
  """
  distance_S = jnp.arange(sizes.S, dtype=jnp.int32)
  table_HS = masks.log_weight(mask, distance_S)
  return walk.heads_of(mask, table_HS, first_key, sizes), table_HS


class _Softmax(NamedTuple):
  """Running sums over the keys of a query block.

  Attributes:
    highest_BQ1: the largest logit.
    total_BQ1: sum of exp(logit - highest).
    sum_BQK: the same of what dropout leaves, times the values.
  """

  highest_BQ1: jax.Array
  total_BQ1: jax.Array
  sum_BQK: jax.Array

  def added(self, logits_BQC, v_BCK, kept_BQC):
    """Returns the sums with a block of keys; `kept` None keeps all."""
    highest_BQ1 = jnp.max(logits_BQC, axis=-1, keepdims=True)
    highest_BQ1 = jnp.maximum(self.highest_BQ1, highest_BQ1)
    weights_BQC = jnp.exp(logits_BQC - highest_BQ1)
    shrink_BQ1 = jnp.exp(self.highest_BQ1 - highest_BQ1)
    total_BQ1 = jnp.sum(weights_BQC, axis=-1, keepdims=True)
    total_BQ1 = self.total_BQ1 * shrink_BQ1 + total_BQ1
    if kept_BQC is not None:
      weights_BQC = jnp.where(kept_BQC, weights_BQC, 0.0)
    sum_BQK = jnp.einsum("bqc,bck->bqk", weights_BQC, v_BCK)
    return _Softmax(highest_BQ1, total_BQ1, self.sum_BQK * shrink_BQ1 + sum_BQK)

  def finished(self, dropout_rate):
    """Returns the output, and each row's log of sums."""
    has_open_BQ1 = self.total_BQ1 > 0
    total_BQ1 = jnp.where(has_open_BQ1, self.total_BQ1, 1.0)
    # Where no key is open the backward pass must find exp(...) = 0.
    lse_BQ1 = self.highest_BQ1 + jnp.log(total_BQ1)
    lse_BQ1 = jnp.where(has_open_BQ1, lse_BQ1, -LOW)
    return self.sum_BQK / (total_BQ1 * (1 - dropout_rate)), lse_BQ1


def _forward_head(head: Head, local, relative, stream_BH, zero):
  """Returns the local arrays (out, lse) of one head."""
  B, _, K = local["q"].shape

  def one_block(queries, carry):
    out_local, lse_local = carry
    q_BQK = take(local["q"], queries.row, BLOCK) / math.sqrt(K)
    kept = head.kept(stream_BH, queries)

    def one_key_block(keys, softmax):
      k_BCK, v_BCK = (take(local[name], keys.row, BLOCK) for name in ("k", "v"))
      relative_DK = blocked_bias.at_distances(relative, keys.distance)
      added = keys.bias, keys.alike, relative_DK
      logits_BQC = blocked_bias.logits(q_BQK, k_BCK, *added)
      kept_BQC = kept(keys) if head.static.dropout_rate else None
      return softmax.added(logits_BQC, v_BCK, kept_BQC)

    nothing = _Softmax(
      jnp.full((B, BLOCK, 1), zero + LOW),
      jnp.full((B, BLOCK, 1), zero),
      jnp.full((B, BLOCK, K), zero),
    )
    softmax = head.over_key_blocks(queries, one_key_block, nothing)
    out_BQK, lse_BQ1 = softmax.finished(head.static.dropout_rate)
    return (
      put(out_local, queries.row, out_BQK),
      put(lse_local, queries.row, lse_BQ1),
    )

  return head.over_query_blocks(one_block, (local["out"], local["lse"]))


def _zero_after(x):
  """Returns 0.0 in such a way that the compiler must wait for x.

  If XLA knew the zero early, it would fill the scratch arrays of all layers at
  the beginning of a step. They would then take memory until the step ends.
  Under `jax.shard_map` the result varies over the devices as x does.
  """
  bits = lax.bitcast_convert_type(x.ravel()[:1].astype(jnp.float32), jnp.uint32)
  return jnp.sum(bits >> 31 >> 1, dtype=jnp.uint32).astype(jnp.float32)


def _scratch(static, B, sizes, zero):
  """Returns local arrays by name, to be used by head after head."""
  queries, keys, new_keys = layouts(static)
  of_keys = {"k": keys, "v": keys, "dk": new_keys, "dv": new_keys}
  return {
    name: of_keys.get(name, queries).filled(B, K, zero)
    for name, K in sizes.items()
  }


_ONCE = (
  "implementation='blocked' has no second derivatives over a ring, as its rows "
  "have no tangents; choose implementation='reference'"
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, heads, table, relative, q, k, v, ring, stream, segments):
  """Attends; differentiable once in reverse, and then forward."""
  arrays = heads, table, relative, q, k, v, ring, stream, segments
  return _attend_forward(static, *arrays)[0]


def _attend_forward(
  static, heads, table, relative, q, k, v, ring, stream, segments
):
  B, _, H, K = q.shape
  residuals = heads, table, relative, q, k, v, ring, stream, segments
  if static.ring:
    q = checks.differentiated_once(q, _ONCE)
  source = ring or Ring(k, v)
  zero = _zero_after(q)

  def one_head(h, carry):
    out, lse, scratch = carry
    head = Head(static, heads, table, segments, h, group_size(q, k))
    local = head.loaded(scratch, {"q": q}, source)
    out_local, lse_local = _forward_head(head, local, relative, stream, zero)
    return (
      head.queries.store(out_local, out, h, 0),
      head.queries.store(lse_local, lse, h, 0),
      local | {"out": out_local, "lse": lse_local},
    )

  widths = dict.fromkeys(("q", "k", "v", "out"), K) | {"lse": 1}
  carry = (
    jnp.full(q.shape, zero, q.dtype),
    jnp.full((*q.shape[:3], 1), zero),
    _scratch(static, B, widths, zero),
  )
  with jax.default_matmul_precision(static.precision):
    out, lse, _ = lax.fori_loop(0, np.int32(H), one_head, carry)
  return out, (residuals, out, lse)


def _attend_backward(static, residuals, d_out):
  inputs, out, lse = residuals
  heads, table, relative, q, k, v, ring, stream, segments = inputs
  B, _, H, K = q.shape
  d_out = jnp.asarray(d_out)
  if static.ring:
    d_out = checks.differentiated_once(d_out, _ONCE)
  arrays = {"q": q, "out": out, "lse": lse, "d_out": d_out}
  zero = _zero_after(d_out)

  def one_head(h, carry):
    head = Head(static, heads, table, segments, h, group_size(q, k))
    gradients, scratch = carry
    local = head.loaded(scratch, arrays, ring or Ring(k, v))
    return blocked_backward.add_head(
      head, local, relative, stream, zero, gradients
    )

  before = 0 if static.ring else static.memory
  of_keys = B, k.shape[1] - before, *k.shape[2:]
  # Those of several query heads are added up.
  dtype = k.dtype if group_size(q, k) == 1 else jnp.float32
  widths = dict.fromkeys((*arrays, "k", "v", "dq", "dk", "dv"), K)
  gradients = Gradients(
    jnp.full(q.shape, zero, q.dtype),
    jnp.full(of_keys, zero, dtype),
    jnp.full(of_keys, zero, dtype),
    jnp.full(table.shape, zero),
    None if relative is None else jnp.full(relative.shape, zero),
  )
  scratch = _scratch(static, B, widths | {"lse": 1}, zero)
  with jax.default_matmul_precision(static.precision):
    (dq, dk, dv, d_table, d_relative), _ = lax.fori_loop(
      0, np.int32(H), one_head, (gradients, scratch)
    )
  # Nothing flows to the older keys.
  dk, dv = (
    jnp.pad(x, ((0, 0), (before, 0), (0, 0), (0, 0))).astype(k.dtype)
    for x in (dk, dv)
  )
  of_heads, *none = jax.tree.map(
    checks.no_gradient, (heads, ring, stream, segments)
  )
  return of_heads, d_table, d_relative, dq, dk, dv, *none


_attend.defvjp(_attend_forward, _attend_backward)
