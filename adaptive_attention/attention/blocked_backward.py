"""The gradients of one head of `blocked`, in one walk over its blocks."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from adaptive_attention.attention import blocked_bias
from adaptive_attention.attention.blocked_head import Head, KeyBlock
from adaptive_attention.attention.layout import BLOCK, put, take

LOW = -1e30  # the highest logit before an open key; finite, unlike hidden ones


class Queries(NamedTuple):
  """What the gradients of a query block are made of.

  Attributes:
    q_BQK: the queries, divided by sqrt(K).
    d_out_BQK: the gradient of the output.
    mean_BQ1: the mean that the gradient of a softmax takes off. It is the sum
      of d_out out over K, with dropout and without.
    lse_BQ1: the log of the sum of exp(logit) over the keys.
  """

  q_BQK: jax.Array
  d_out_BQK: jax.Array
  mean_BQ1: jax.Array
  lse_BQ1: jax.Array


class Gradients(NamedTuple):
  """The gradients of what `attend` takes, for all heads together.

  Attributes:
    dq_BTHK: those of the queries.
    dk_BNGK, dv_BNGK: those of the keys and values that are not memory.
    table_HS: those of the log weights by distance.
    relative_RK: those of the vectors of distances, or None.
  """

  dq_BTHK: jax.Array
  dk_BNGK: jax.Array
  dv_BNGK: jax.Array
  table_HS: jax.Array
  relative_RK: jax.Array | None


class Sums(NamedTuple):
  """Gradients that all query blocks of a head add to.

  Attributes:
    dk, dv: local arrays for the keys and values that are not memory.
    table: (S,) the gradient of the head's log weights by distance.
    relative: the gradient of the vectors of distances, summed over this head
      and those before; or None.
  """

  dk: jax.Array
  dv: jax.Array
  table: jax.Array
  relative: jax.Array | None


def add_head(
  head: Head, local, relative, stream_BH, zero, gradients: Gradients
):
  """Returns (gradients, local) with the gradients of one head written.

  Args:
    head: the head with its walk.
    local: loaded local arrays by name; those of gradients are written over.
    relative: the vectors of distances, or None.
    stream_BH: `dropout.head_hash` of the streams and heads.
    zero: 0.0, which the compiler does not know before the arrays are there.
    gradients: the gradients with those of the heads before written.
  """
  h, first_x = head.h, head.first_new_y * head.stride
  dk, dv = (
    head.new_keys.clear(local[name], head.first_new_y) for name in ("dk", "dv")
  )
  table_S = jnp.full(gradients.table_HS.shape[1], zero)
  sums = Sums(dk, dv, table_S, gradients.relative_RK)
  dq, sums = _of_head(head, local, relative, stream_BH, zero, sums)
  written = Gradients(
    head.queries.store(dq, gradients.dq_BTHK, h, 0),
    head.new_keys.add(sums.dk, gradients.dk_BNGK, head.key_h, first_x),
    head.new_keys.add(sums.dv, gradients.dv_BNGK, head.key_h, first_x),
    lax.dynamic_update_index_in_dim(gradients.table_HS, sums.table, h, 0),
    sums.relative,
  )
  return written, local | {"dq": dq, "dk": sums.dk, "dv": sums.dv}


def _of_head(head: Head, local, relative, stream_BH, zero, sums: Sums):
  """Returns (dq as a local array, sums) of one head."""
  B, _, K = local["q"].shape

  def one_block(queries, carry):
    dq_local, sums = carry
    brought = _brought(head, local, queries)
    kept = head.kept(stream_BH, queries)

    def one_key_block(keys, carry):
      return _add_block(
        *(head.static, head.stride, local, brought, keys),
        *(relative, kept, carry),
      )

    dq_BQK, sums = head.over_key_blocks(
      queries, one_key_block, (jnp.full((B, BLOCK, K), zero), sums)
    )
    return put(dq_local, queries.row, dq_BQK / math.sqrt(K)), sums

  return head.over_query_blocks(one_block, (local["dq"], sums))


def _brought(head, local, queries) -> Queries:
  """Returns what the gradients of a query block are made of."""
  q_BQK, out_BQK, d_out_BQK, lse_BQ1 = (
    take(local[name], queries.row, BLOCK)
    for name in ("q", "out", "d_out", "lse")
  )
  # It is summed block by block: one sum over all queries would take XLA's CPU
  # backend as long as two products.
  mean_BQ1 = jnp.sum(d_out_BQK * out_BQK, axis=-1, keepdims=True)
  # Rows beyond the end of the residue class belong to others.
  exists_1Q1 = (queries.x < head.sizes.T)[None, :, None]
  lse_BQ1 = jnp.where(exists_1Q1, lse_BQ1, -LOW)
  q_BQK = q_BQK / math.sqrt(q_BQK.shape[-1])
  return Queries(q_BQK, d_out_BQK, mean_BQ1, lse_BQ1)


def _add_block(
  static, stride, local, queries: Queries, keys: KeyBlock, relative, kept, carry
):
  """Returns the carry (dq, sums) with the pairs of one block added."""
  dq_BQK, sums = carry
  k_BCK, v_BCK = (take(local[name], keys.row, BLOCK) for name in ("k", "v"))
  relative_DK = blocked_bias.at_distances(relative, keys.distance)
  added = keys.bias, keys.alike, relative_DK
  logits_BQC = blocked_bias.logits(queries.q_BQK, k_BCK, *added)
  weights_BQC = jnp.exp(logits_BQC - queries.lse_BQ1)
  d_weights_BQC = jnp.einsum("bqk,bck->bqc", queries.d_out_BQK, v_BCK)
  dropped_BQC = weights_BQC
  if static.dropout_rate:
    scale = 1 / (1 - static.dropout_rate)
    scale_BQC = jnp.where(kept(keys), scale, 0.0)
    dropped_BQC = weights_BQC * scale_BQC
    d_weights_BQC = d_weights_BQC * scale_BQC
  d_logits_BQC = weights_BQC * (d_weights_BQC - queries.mean_BQ1)
  table = blocked_bias.added_to_table(
    sums.table, keys.bias, keys.distance, stride, d_logits_BQC
  )
  sums = sums._replace(table=table)
  dq_BQK += jnp.einsum("bqc,bck->bqk", d_logits_BQC, k_BCK)
  if relative is not None:
    d_shifted_BQD = blocked_bias.unskew(d_logits_BQC)
    dq_BQK += jnp.einsum("bqd,dk->bqk", d_shifted_BQD, relative_DK)
    d_relative_DK = jnp.einsum("bqd,bqk->dk", d_shifted_BQD, queries.q_BQK)
    sums = sums._replace(
      relative=blocked_bias.added_at(
        sums.relative, keys.distance, d_relative_DK
      )
    )
  if not keys.older:
    dk_BCK = jnp.einsum("bqc,bqk->bck", d_logits_BQC, queries.q_BQK)
    dv_BCK = jnp.einsum("bqc,bqk->bck", dropped_BQC, queries.d_out_BQK)
    sums = _added_to_keys(static, sums, keys, dk_BCK, dv_BCK)
  return dq_BQK, sums


def _added_to_keys(static, sums, keys, dk_BCK, dv_BCK) -> Sums:
  """Returns the sums with the gradients of a key block added."""
  if static.memory:
    # Rows before the first new key belong to other residue classes.
    new_C = keys.x >= static.memory - static.sizes.older
    dk_BCK, dv_BCK = (
      jnp.where(new_C[None, :, None], x_BCK, 0.0) for x_BCK in (dk_BCK, dv_BCK)
    )

  def added(local_BRK, rows_BCK):
    there_BCK = take(local_BRK, keys.new_row, BLOCK)
    return put(local_BRK, keys.new_row, there_BCK + rows_BCK)

  return sums._replace(dk=added(sums.dk, dk_BCK), dv=added(sums.dv, dv_BCK))
