"""Exact attention that computes only tiles which hold an open pair.

Loops with run-time bounds over tiles of queries and keys, head by head, in
plain XLA: a change of spans or periods recompiles nothing, and memory is linear
in the lengths. The softmax is accumulated tile by tile and the backward pass
computes the weights again from each row's log of sums (Dao et al. 2022,
"FlashAttention"). Which tiles these are is the matter of `tiles`, where their
rows stand that of `layout`.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adaptive_attention import masks
from adaptive_attention.attention import dropout, tiles
from adaptive_attention.attention.layout import TILE, put, take
from adaptive_attention.attention.ring import Ring

_LOW = -1e30  # of a row that has seen nothing yet; finite, unlike hidden logits


def _kept(head, seed, B, x_Q):
  """KeyTile -> (B, Q, C) which weights dropout leaves, of queries at x_Q."""
  row_BQ1 = dropout.row_hash(
    seed,
    jnp.arange(B, dtype=jnp.int32)[:, None, None],
    head.h,
    x_Q[None, :, None],
  )

  def kept(tile):
    x_11C = tile.x[None, None]
    return dropout.keep_key(row_BQ1, x_11C, head.static.dropout_rate)

  return kept


def _logits(q_BQK, k_BCK, tile, relative_DK):
  """q (k + p) + log m + log w, of queries that were divided by sqrt(K)."""
  logits_BQC = jnp.einsum("bqk,bck->bqc", q_BQK, k_BCK)
  if relative_DK is not None:
    logits_BQC += tiles.skew(jnp.einsum("bqk,dk->bqd", q_BQK, relative_DK))
  if tile.bias is None:
    return logits_BQC
  return logits_BQC + (tile.bias[None] if tile.bias.ndim else tile.bias)


def _loaded(head, scratch, queries, ring):
  """The scratch, with this head's rows of the named queries and the ring."""
  local = dict(scratch)
  for name, array in queries.items():
    local[name] = head.queries.load(local[name], array, head.h, 0)
  for name, array in (("k", ring.k_NSHK), ("v", ring.v_NSHK)):
    local[name] = head.keys.load(
      *(local[name], array, head.h, head.first_key_y),
      *(head.plan.first, ring.first_row, ring.batch),
    )
  return local


def _forward_head(head, q, ring, relative, seed, zero, carry):
  """Fills in one head of (out_BTHK, lse_BTH1); the rest is scratch."""
  out, lse, scratch = carry
  static, h = head.static, head.h
  B, _, _, K = q.shape
  local = _loaded(head, scratch, {"q": q}, ring)

  def query_tile(a, i, carry):
    out_local, lse_local = carry
    row = head.query_row(a, i)
    q_BQK = take(local["q"], row, TILE) / math.sqrt(K)
    kept = _kept(head, seed, B, head.query_x(a, i))

    def key_tile(tile, carry):
      highest_BQ1, total_BQ1, sum_BQK = carry
      k_BCK = take(local["k"], tile.row, TILE)
      v_BCK = take(local["v"], tile.row, TILE)
      relative_DK = tiles.at_distances(relative, tile)
      logits_BQC = _logits(q_BQK, k_BCK, tile, relative_DK)
      new_BQ1 = jnp.maximum(
        highest_BQ1, jnp.max(logits_BQC, axis=-1, keepdims=True)
      )
      weights_BQC = jnp.exp(logits_BQC - new_BQ1)
      shrink_BQ1 = jnp.exp(highest_BQ1 - new_BQ1)
      total_BQ1 = total_BQ1 * shrink_BQ1 + jnp.sum(
        weights_BQC, axis=-1, keepdims=True
      )
      if static.dropout_rate:
        weights_BQC = jnp.where(kept(tile), weights_BQC, 0.0)
      sum_BQK = sum_BQK * shrink_BQ1 + jnp.einsum(
        "bqc,bck->bqk", weights_BQC, v_BCK
      )
      return new_BQ1, total_BQ1, sum_BQK

    highest_BQ1, total_BQ1, sum_BQK = head.for_each_key_tile(
      a,
      i,
      key_tile,
      (
        jnp.full((B, TILE, 1), zero + _LOW),
        jnp.full((B, TILE, 1), zero),
        jnp.full((B, TILE, K), zero),
      ),
    )
    seen_BQ1 = total_BQ1 > 0
    total_BQ1 = jnp.where(seen_BQ1, total_BQ1, 1.0)
    # Where nothing was seen the backward pass must find exp(...) = 0.
    lse_BQ1 = jnp.where(seen_BQ1, highest_BQ1 + jnp.log(total_BQ1), -_LOW)
    out_BQK = sum_BQK / (total_BQ1 * (1 - static.dropout_rate))
    return (
      put(out_local, row, out_BQK),
      put(lse_local, row, lse_BQ1),
    )

  out_local, lse_local = head.for_each_query_tile(
    query_tile, (local["out"], local["lse"])
  )
  return (
    head.queries.store(out_local, out, h, 0),
    head.queries.store(lse_local, lse, h, 0),
    local | {"out": out_local, "lse": lse_local},
  )


def _backward_head(head, q, ring, relative, out, lse, d_out, seed, zero, carry):
  """Fills in one head of the gradients; the rest is scratch."""
  dq, dk, dv, d_table, d_relative, scratch = carry
  static, h = head.static, head.h
  B, _, _, K = q.shape
  first_new_x = static.memory - static.origin
  queries = {"q": q, "out": out, "lse": lse, "d_out": d_out}
  local = _loaded(head, scratch, queries, ring)
  dk_local = head.new_keys.clear(local["dk"], head.first_new_y)
  dv_local = head.new_keys.clear(local["dv"], head.first_new_y)

  def query_tile(a, i, carry):
    dq_local, *sums = carry
    row = head.query_row(a, i)
    x_Q = head.query_x(a, i)
    q_BQK = take(local["q"], row, TILE) / math.sqrt(K)
    d_out_BQK = take(local["d_out"], row, TILE)
    # What softmax takes off, the same with dropout as without. (In one sum over
    # all queries XLA's CPU backend takes as long for it as for two products.)
    mean_BQ1 = jnp.sum(
      d_out_BQK * take(local["out"], row, TILE), axis=-1, keepdims=True
    )
    # Beyond the end of the class these are the rows of others.
    lse_BQ1 = jnp.where(
      (x_Q < static.T)[None, :, None], take(local["lse"], row, TILE), -_LOW
    )
    kept = _kept(head, seed, B, x_Q)

    def key_tile(tile, carry):
      dq_BQK, dk_local, dv_local, d_table_S, d_relative = carry
      k_BCK = take(local["k"], tile.row, TILE)
      v_BCK = take(local["v"], tile.row, TILE)
      relative_DK = tiles.at_distances(relative, tile)
      logits_BQC = _logits(q_BQK, k_BCK, tile, relative_DK)
      weights_BQC = jnp.exp(logits_BQC - lse_BQ1)
      d_weights_BQC = jnp.einsum("bqk,bck->bqc", d_out_BQK, v_BCK)
      dropped_BQC = weights_BQC
      if static.dropout_rate:
        scale_BQC = jnp.where(kept(tile), 1 / (1 - static.dropout_rate), 0.0)
        dropped_BQC = weights_BQC * scale_BQC
        d_weights_BQC = d_weights_BQC * scale_BQC
      d_logits_BQC = weights_BQC * (d_weights_BQC - mean_BQ1)
      d_table_S = head.add_to_table(d_table_S, tile, d_logits_BQC)
      dq_BQK += jnp.einsum("bqc,bck->bqk", d_logits_BQC, k_BCK)
      if relative is not None:
        d_shifted_BQD = tiles.unskew(d_logits_BQC)
        dq_BQK += jnp.einsum("bqd,dk->bqk", d_shifted_BQD, relative_DK)
        d_relative = tiles.added_at(
          d_relative,
          tile.distance,
          jnp.einsum("bqd,bqk->dk", d_shifted_BQD, q_BQK),
        )
      if not tile.older:
        dk_BCK = jnp.einsum("bqc,bqk->bck", d_logits_BQC, q_BQK)
        dv_BCK = jnp.einsum("bqc,bqk->bck", dropped_BQC, d_out_BQK)
        if static.memory:  # before the first new key are the rows of others
          new_1C1 = (tile.x >= first_new_x)[None, :, None]
          dk_BCK = jnp.where(new_1C1, dk_BCK, 0.0)
          dv_BCK = jnp.where(new_1C1, dv_BCK, 0.0)
        dk_local = _added(dk_local, tile.new_row, dk_BCK)
        dv_local = _added(dv_local, tile.new_row, dv_BCK)
      return dq_BQK, dk_local, dv_local, d_table_S, d_relative

    dq_BQK, *sums = head.for_each_key_tile(
      a, i, key_tile, (jnp.full((B, TILE, K), zero), *sums)
    )
    return put(dq_local, row, dq_BQK / math.sqrt(K)), *sums

  dq_local, dk_local, dv_local, d_table_S, d_relative = (
    head.for_each_query_tile(
      query_tile,
      (
        local["dq"],
        dk_local,
        dv_local,
        jnp.full(static.S, zero),
        d_relative,
      ),
    )
  )
  first_x = head.first_new_y * head.stride
  return (
    head.queries.store(dq_local, dq, h, 0),
    head.new_keys.store(dk_local, dk, h, first_x),
    head.new_keys.store(dv_local, dv, h, first_x),
    lax.dynamic_update_index_in_dim(d_table, d_table_S, h, 0),
    d_relative,
    local | {"dq": dq_local, "dk": dk_local, "dv": dv_local},
  )


def _added(local_BRK, row, rows_BYK):
  there_BYK = take(local_BRK, row, rows_BYK.shape[1])
  return put(local_BRK, row, there_BYK + rows_BYK)


def _zero_after(x):
  """0.0, which the compiler finds out only when x is there.

  Arrays of known zeros it makes early, for all layers at once: the scratch of
  each would then take memory from the beginning of a step to its end. Under
  `jax.shard_map` it varies over the devices as x does.
  """
  bits = lax.bitcast_convert_type(x.ravel()[:1].astype(jnp.float32), jnp.uint32)
  return jnp.sum(bits >> 31 >> 1, dtype=jnp.uint32).astype(jnp.float32)


def _scratch(static, B, sizes, zero):
  """Local arrays by name, to be used by head on head."""
  queries, keys, new_keys = tiles.layouts(static)
  of_keys = {"k": keys, "v": keys, "dk": new_keys, "dv": new_keys}
  return {
    name: of_keys.get(name, queries).filled(B, K, zero)
    for name, K in sizes.items()
  }


@jax.custom_jvp
def _differentiated_once(x):
  """x, where a second derivative would miss what stands in a ring."""
  return x


@_differentiated_once.defjvp
def _refuse(primals, tangents):
  raise NotImplementedError(
    "implementation='blocked' has no second derivatives over a ring, as its "
    "rows have no tangents; choose implementation='reference'"
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, plan, table, relative, q, k, v, ring, seed):
  """Attends; differentiable once in reverse, and then forward."""
  return _attend_forward(static, plan, table, relative, q, k, v, ring, seed)[0]


def _attend_forward(static, plan, table, relative, q, k, v, ring, seed):
  B, T, H, K = q.shape
  residuals = plan, table, relative, q, k, v, ring, seed
  if static.ring:
    q = _differentiated_once(q)
  source = Ring(k, v) if ring is None else ring
  zero = _zero_after(q)

  def one_head(h, carry):
    head = tiles.Head(plan, table, h, static)
    return _forward_head(head, q, source, relative, seed, zero, carry)

  sizes = dict.fromkeys(("q", "k", "v", "out"), K) | {"lse": 1}
  with jax.default_matmul_precision(static.precision):
    out, lse, _ = lax.fori_loop(
      0,
      np.int32(H),
      one_head,
      (
        jnp.full(q.shape, zero, q.dtype),
        jnp.full((B, T, H, 1), zero),
        _scratch(static, B, sizes, zero),
      ),
    )
  return out, (residuals, out, lse)


def _attend_backward(static, residuals, d_out):
  (plan, table, relative, q, k, v, ring, seed), out, lse = residuals
  B, _, H, K = q.shape
  d_out = jnp.asarray(d_out)
  if static.ring:
    d_out = _differentiated_once(d_out)
  source = Ring(k, v) if ring is None else ring
  zero = _zero_after(d_out)

  def one_head(h, carry):
    head = tiles.Head(plan, table, h, static)
    return _backward_head(
      head, q, source, relative, out, lse, d_out, seed, zero, carry
    )

  before = 0 if static.ring else static.memory
  new = k.shape[1] - before
  names = ("q", "out", "d_out", "k", "v", "dq", "dk", "dv")
  sizes = dict.fromkeys(names, K) | {"lse": 1}
  with jax.default_matmul_precision(static.precision):
    dq, dk, dv, d_table, d_relative, _ = lax.fori_loop(
      0,
      np.int32(H),
      one_head,
      (
        jnp.full(q.shape, zero, q.dtype),
        *(jnp.full((B, new, H, K), zero, x.dtype) for x in (k, v)),
        jnp.full((H, static.S), zero),
        None if relative is None else jnp.full(relative.shape, zero),
        _scratch(static, B, sizes, zero),
      ),
    )
  return (
    jax.tree.map(_no_gradient, plan),
    d_table,
    d_relative,
    dq,
    *(jnp.pad(x, ((0, 0), (before, 0), (0, 0), (0, 0))) for x in (dk, dv)),
    jax.tree.map(_no_gradient, ring),
    _no_gradient(seed),
  )


def _no_gradient(x):
  if jnp.issubdtype(jnp.result_type(x), jnp.floating):
    return jnp.zeros_like(x)
  return np.zeros(np.shape(x), jax.dtypes.float0)


_attend.defvjp(_attend_forward, _attend_backward)


def _varying_alike(*trees):
  """The trees, each array as varying over the devices as all together are.

  Under `jax.shard_map` an array is marked with the axes over which it differs
  from device to device, and what a loop carries must keep its marks.
  """
  axes = frozenset().union(
    *(jax.typeof(x).mat.varying for x in jax.tree.leaves(trees))
  )
  return jax.tree.map(
    lambda x: lax.pcast(
      x, tuple(axes - jax.typeof(x).mat.varying), to="varying"
    ),
    trees,
  )


def attend(
  q_BTHK,
  k_BSHK,
  v_BSHK,
  mask,
  *,
  ring,
  memory,
  first_key,
  relative_RK,
  dropout_rate,
  dropout_seed,
):
  """The same as `reference.attend`, in time that the masks leave."""
  T, H = q_BTHK.shape[1:3]
  S = memory + T if ring is not None else k_BSHK.shape[1]
  if mask is None:
    mask = masks.Mask(jnp.full(H, float(S), jnp.float32), 1.0)
  static, plan, table_HS = tiles.prepare(
    mask, T, S, memory, first_key, dropout_rate, ring is not None
  )
  if relative_RK is not None:
    relative_RK = relative_RK.astype(jnp.float32)
  seed = jnp.asarray(0 if dropout_seed is None else dropout_seed)
  arrays = _varying_alike(
    plan,
    table_HS,
    relative_RK,
    q_BTHK,
    k_BSHK,
    v_BSHK,
    ring,
    seed.astype(jnp.uint32),
  )
  return _attend(static, *arrays)


def computed_pairs(mask, T, S, first_key):
  """(H,) the pairs of all blocks that are computed."""
  touched_H = tiles.touched(mask, T, S, first_key=first_key)
  return np.asarray(touched_H, np.int64) * tiles.TILE**2
