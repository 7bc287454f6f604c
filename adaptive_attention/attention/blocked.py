"""Exact attention that computes only tiles which hold an open pair.

Loops with run-time bounds over tiles of queries and keys, head by head, in
plain XLA: a change of spans or periods recompiles nothing, and memory is linear
in the lengths. The softmax is accumulated tile by tile and the backward pass
computes the weights again from each row's log of sums (Dao et al. 2022,
"FlashAttention"). Which tiles these are is the matter of `tiles`.

What the masks add to a tile is laid out once per head for each of its slots;
where it is one number all over a tile, as within the span, the tile has no mask
arithmetic at all.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from adaptive_attention import masks
from adaptive_attention.attention import dropout, tiles

_LOW = -1e30  # of a row that has seen nothing yet; finite, unlike hidden logits


def _logits(head, laid, q_BQK, k_BCK, c, key_tile, slot):
  """(logits less `level`, level): level is added where it costs nothing."""
  bias, flat, level, _ = laid
  logits_BQC = jnp.einsum("bqk,bck->bqc", q_BQK, k_BCK)
  exists_C = head.rows(c, key_tile) >= head.plan.first
  is_flat = flat[slot] & jnp.all(exists_C)

  def with_bias():
    bias_QC = jnp.where(flat[slot], 0.0, bias[slot])
    return logits_BQC + jnp.where(exists_C, bias_QC, -jnp.inf)

  logits_BQC = lax.cond(is_flat, lambda: logits_BQC, with_bias)
  return logits_BQC, jnp.where(flat[slot], level[slot], 0.0)


def _kept(head, seed, B, a, i, c, key_tile):
  """(B, Q, C) which attention weights dropout leaves."""
  b_B11 = jnp.arange(B)[:, None, None]
  t_Q1 = head.rows(a, i)[:, None]
  s_C = head.rows(c, key_tile) + head.static.origin - head.static.front
  rate = head.static.dropout_rate
  return dropout.keep(seed, b_B11, head.h, t_Q1, s_C, rate)


def _forward_head(plan, h, static, q, k, v, seed):
  """(out_BTK, lse_BT1) of one head."""
  B, T, _, K = q.shape
  head = tiles.Head(plan, h, static)
  laid = head.lay_out()
  tile = static.tile

  def query_tile(a, i, carry):
    out_BTK, lse_BT1 = carry
    q_BQK = head.fetch(q, a, i, 0) / jnp.sqrt(K).astype(jnp.float32)

    def key_tile(c, j, slot, carry):
      highest_BQ1, total_BQ1, sum_BQK = carry
      k_BCK = head.fetch(k, c, j, static.origin)
      v_BCK = head.fetch(v, c, j, static.origin)
      logits_BQC, level = _logits(head, laid, q_BQK, k_BCK, c, j, slot)
      new_BQ1 = jnp.maximum(
        highest_BQ1, jnp.max(logits_BQC, axis=-1, keepdims=True) + level
      )
      weights_BQC = jnp.exp(logits_BQC - (new_BQ1 - level))
      shrink_BQ1 = jnp.exp(highest_BQ1 - new_BQ1)
      total_BQ1 = total_BQ1 * shrink_BQ1 + jnp.sum(
        weights_BQC, axis=-1, keepdims=True
      )
      if static.dropout_rate:
        kept_BQC = _kept(head, seed, B, a, i, c, j)
        weights_BQC = jnp.where(kept_BQC, weights_BQC, 0.0)
      sum_BQK = sum_BQK * shrink_BQ1 + jnp.einsum(
        "bqc,bck->bqk", weights_BQC, v_BCK
      )
      return new_BQ1, total_BQ1, sum_BQK

    highest_BQ1, total_BQ1, sum_BQK = head.for_each_key_tile(
      a,
      i,
      key_tile,
      (
        jnp.full((B, tile, 1), _LOW),
        jnp.zeros((B, tile, 1)),
        jnp.zeros((B, tile, K)),
      ),
    )
    seen_BQ1 = total_BQ1 > 0
    total_BQ1 = jnp.where(seen_BQ1, total_BQ1, 1.0)
    keep = 1 - static.dropout_rate
    # Where nothing was seen the backward pass must find exp(...) = 0.
    row_lse_BQ1 = jnp.where(seen_BQ1, highest_BQ1 + jnp.log(total_BQ1), -_LOW)
    return (
      head.accumulate(out_BTK, a, i, 0, sum_BQK / (total_BQ1 * keep)),
      head.accumulate(lse_BT1, a, i, 0, row_lse_BQ1),
    )

  return head.for_each_query_tile(
    query_tile, (jnp.zeros((B, T, K)), jnp.zeros((B, T, 1)))
  )


def _backward_head(plan, h, static, q, k, v, out, lse, d_out, seed):
  """(dq_BTK, dk_BSK, dv_BSK, d_features_3S's share) of one head."""
  B, T, _, K = q.shape
  S = k.shape[1]
  head = tiles.Head(plan, h, static)
  laid = head.lay_out()
  sloped = laid[3]
  tile = static.tile
  scale = 1 / jnp.sqrt(K).astype(jnp.float32)

  def query_tile(a, i, carry):
    dq_BTK, *sums = carry
    q_BQK = head.fetch(q, a, i, 0) * scale
    d_out_BQK = head.fetch(d_out, a, i, 0)
    lse_BQ1 = head.fetch(lse, a, i, 0)
    # What softmax takes off: the same with dropout as without.
    mean_BQ1 = jnp.sum(
      d_out_BQK * head.fetch(out, a, i, 0), axis=-1, keepdims=True
    )

    def key_tile(c, j, slot, carry):
      dq_BQK, dk_BSK, dv_BSK, d_bias = carry
      k_BCK = head.fetch(k, c, j, static.origin)
      v_BCK = head.fetch(v, c, j, static.origin)
      logits_BQC, level = _logits(head, laid, q_BQK, k_BCK, c, j, slot)
      weights_BQC = jnp.exp(logits_BQC - (lse_BQ1 - level))
      d_weights_BQC = jnp.einsum("bqk,bck->bqc", d_out_BQK, v_BCK)
      dropped_BQC = weights_BQC
      if static.dropout_rate:
        kept_BQC = _kept(head, seed, B, a, i, c, j)
        keep = 1 / (1 - static.dropout_rate)
        dropped_BQC = jnp.where(kept_BQC, weights_BQC * keep, 0.0)
        d_weights_BQC = jnp.where(kept_BQC, d_weights_BQC * keep, 0.0)
      d_logits_BQC = weights_BQC * (d_weights_BQC - mean_BQ1)
      d_bias = lax.cond(
        sloped[slot],
        lambda: tiles.put(
          d_bias, slot, d_bias[slot] + jnp.sum(d_logits_BQC, axis=0)
        ),
        lambda: d_bias,
      )
      dk_BCK = jnp.einsum("bqc,bqk->bck", d_logits_BQC, q_BQK)
      dv_BCK = jnp.einsum("bqc,bqk->bck", dropped_BQC, d_out_BQK)
      return (
        dq_BQK + jnp.einsum("bqc,bck->bqk", d_logits_BQC, k_BCK),
        head.accumulate(dk_BSK, c, j, static.origin, dk_BCK),
        head.accumulate(dv_BSK, c, j, static.origin, dv_BCK),
        d_bias,
      )

    dq_BQK, *sums = head.for_each_key_tile(
      a, i, key_tile, (jnp.zeros((B, tile, K)), *sums)
    )
    return head.accumulate(dq_BTK, a, i, 0, dq_BQK * scale), *sums

  dq_BTK, dk_BSK, dv_BSK, d_bias = head.for_each_query_tile(
    query_tile,
    (
      jnp.zeros((B, T, K)),
      jnp.zeros((B, S, K)),
      jnp.zeros((B, S, K)),
      jnp.zeros((head.slots(), tile, tile)),
    ),
  )
  return dq_BTK, dk_BSK, dv_BSK, head.table_gradient(d_bias)[None]


def _over_heads(run, H):
  """run(h) for each head, its arrays (B, X, N) put together as (B, X, H, N)."""
  stacked = lax.map(run, jnp.arange(H))
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -2), stacked)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, plan, table, q, k, v, seed):
  return _attend_forward(static, plan, table, q, k, v, seed)[0]


def _attend_forward(static, plan, table, q, k, v, seed):
  del table  # its values stand in the plan; here it takes the gradient

  def run(h):
    return _forward_head(plan, h, static, q, k, v, seed)

  out, lse = _over_heads(run, q.shape[2])
  out = out.astype(q.dtype)
  return out, (plan, q, k, v, out, lse, seed)


def _attend_backward(static, residuals, d_out):
  plan, q, k, v, out, lse, seed = residuals

  def run(h):
    return _backward_head(plan, h, static, q, k, v, out, lse, d_out, seed)

  dq, dk, dv, d_table = _over_heads(run, q.shape[2])
  return (
    jax.tree.map(_no_gradient, plan),
    d_table[0],
    dq.astype(q.dtype),
    dk.astype(k.dtype),
    dv.astype(v.dtype),
    _no_gradient(seed),
  )


def _no_gradient(x):
  if jnp.issubdtype(x.dtype, jnp.floating):
    return jnp.zeros_like(x)
  return jnp.zeros(x.shape, jax.dtypes.float0)


_attend.defvjp(_attend_forward, _attend_backward)


def _padded(x_BXHK, front, behind):
  if not front and not behind:
    return x_BXHK
  return jnp.pad(x_BXHK, ((0, 0), (front, behind), (0, 0), (0, 0)))


def attend(
  q_BTHK, k_BSHK, v_BSHK, mask, *, memory, first_key, dropout_rate, dropout_seed
):
  """The same as `reference.attend`, in time that the masks leave."""
  T, S = q_BTHK.shape[1], k_BSHK.shape[1]
  if mask is None:
    mask = masks.Mask(jnp.full(q_BTHK.shape[2], float(S)), 1.0)
  static, plan = tiles.prepare(mask, T, S, first_key, dropout_rate)
  behind = static.T - T
  seed = jnp.asarray(0 if dropout_seed is None else dropout_seed)
  if memory:
    cut = functools.partial(_cut_gradient, memory=memory)
    k_BSHK, v_BSHK = cut(k_BSHK), cut(v_BSHK)
  out_BTHK = _attend(
    static,
    plan,
    masks.log_weight(mask, jnp.arange(S)),
    _padded(q_BTHK, 0, behind),
    _padded(k_BSHK, static.front, behind),
    _padded(v_BSHK, static.front, behind),
    seed.astype(jnp.uint32),
  )
  return out_BTHK[:, :T]


def _cut_gradient(x_BSHK, memory):
  older = lax.stop_gradient(x_BSHK[:, :memory])
  return jnp.concatenate([older, x_BSHK[:, memory:]], axis=1)
