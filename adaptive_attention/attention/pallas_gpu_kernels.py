"""The GPU's three kernels: forward, dq with the lengths' gradients, dk and dv.

Logits are in units of log 2, so that exp2 needs no factor. The gradients of the
lengths are sums of the logits' gradients times slopes, and no sum depends on
the order of programs: two runs give equal bits.

The first arguments of a kernel are static: `Static`, `Blocks`, and a function
that makes the weights of `pallas_gpu_weights` from refs.
"""

import math

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from adaptive_attention.attention.pallas_attend import LOW
from adaptive_attention.attention.pallas_gpu_head import (
  LOG2E,
  Head,
  dot,
)


def forward(static, blocks, weights_of, ints, stream, *refs):
  """Writes the output and the log of sums of a block of queries."""
  *weights, q_ref, k_ref, v_ref, out_ref, lse_ref = refs
  head = Head(static, blocks, weights_of, weights, ints, stream)
  a, y, x, there = head.query_block()
  q = head.rows(q_ref, x, there)
  scale = LOG2E / math.sqrt(q_ref.shape[2])

  def body(pairs, carry):
    highest, total, acc = carry
    k, v = head.key_rows(k_ref, v_ref, pairs.x_k[0], pairs.exists[0])
    logits, factor = head.weigh(dot(q, k.T) * scale, pairs)
    new = jnp.maximum(highest, jnp.max(logits, axis=1))
    weights = jnp.exp2(logits - new[:, None]) * factor
    shrink = jnp.exp2(highest - new)
    total = total * shrink + jnp.sum(weights, axis=1)
    if static.dropout_rate:
      weights *= head.keep_scale(pairs)
    acc = acc * shrink[:, None] + dot(weights.astype(v.dtype), v)
    return new, total, acc

  nothing = (
    jnp.full(blocks.block_q, LOW, jnp.float32),
    jnp.zeros(blocks.block_q, jnp.float32),
    jnp.zeros(q.shape, jnp.float32),
  )
  highest, total, acc = head.over_keys(a, y, x, body, nothing)
  has_open = total > 0
  safe = jnp.where(has_open, total, 1.0)
  head.put(out_ref, x, there, acc / safe[:, None])
  # Where no key is open the backward pass must find exp2(...) = 0.
  lse = jnp.where(has_open, highest + jnp.log2(safe), -LOW)
  at = head.numbers(lse_ref, jnp.where(there, x, static.T))
  plgpu.store(at, lse, mask=there)


def dq(static, blocks, weights_of, ints, stream, *refs):
  """Writes dq of a block of queries, and its share in those of the lengths."""
  *refs, share_ref = refs if static.masked else (*refs, None)
  *weights, k_ref, v_ref, q_ref, d_out_ref, lse_ref, mean_ref, dq_ref = refs
  of_queries = q_ref, d_out_ref, lse_ref, mean_ref
  head = Head(static, blocks, weights_of, weights, ints, stream)
  a, y, x, there = head.query_block()
  q, d_out, lse, mean = head.query_rows(of_queries, x, there)
  scale = LOG2E / math.sqrt(dq_ref.shape[2])

  def body(pairs, carry):
    acc, d_lengths = carry
    k, v = head.key_rows(k_ref, v_ref, pairs.x_k[0], pairs.exists[0])
    _, d_logits = head.gradients(
      *(dot(q, k.T) * scale, dot(d_out, v.T)),
      *(lse[:, None], mean[:, None], pairs),
    )
    # Only at the end summed over queries too, in one reduction.
    if static.masked and not pairs.is_full:
      d_lengths = tuple(
        total + jnp.sum(d_logits * slope, axis=1)
        for total, slope in zip(
          d_lengths, head.weights.slopes(pairs), strict=True
        )
      )
    elif static.masked and static.strided:
      line = jnp.sum(d_logits, axis=1)
      d_lengths = tuple(
        total + line * slope
        for total, slope in zip(
          d_lengths, head.weights.slopes_of_residue(pairs.rho), strict=True
        )
      )
    return acc + dot(d_logits.astype(k.dtype), k), d_lengths

  G = share_ref.shape[2] if static.masked else 0
  zeros = (jnp.zeros(blocks.block_q, jnp.float32),) * G
  nothing = jnp.zeros(q.shape, jnp.float32), zeros
  acc, d_lengths = head.over_keys(a, y, x, body, nothing)
  head.put(dq_ref, x, there, acc / math.sqrt(dq_ref.shape[2]))
  for g, total in enumerate(d_lengths):
    share = jnp.sum(jnp.where(there, total, 0.0))
    share_ref[head.place, pl.program_id(0), g] = share


def dkv(static, blocks, weights_of, ints, stream, *refs):
  """Writes dk and dv of a block of keys that are not memory."""
  *refs, dk_ref, dv_ref = refs
  *weights, k_ref, v_ref, q_ref, d_out_ref, lse_ref, mean_ref = refs
  of_queries = q_ref, d_out_ref, lse_ref, mean_ref
  head = Head(static, blocks, weights_of, weights, ints, stream)
  c, y, x, there = head.key_block()
  exists = there & (x >= head.walked.first)
  k, v = head.key_rows(k_ref, v_ref, x, exists)
  scale = LOG2E / math.sqrt(dk_ref.shape[2])

  def body(pairs, carry):
    dk, dv = carry
    x_q = pairs.x_q[0]
    q, d_out, lse, mean = head.query_rows(
      of_queries, x_q, (x_q >= 0) & (x_q < static.T)
    )
    weights, d_logits = head.gradients(
      *(dot(k, q.T) * scale, dot(v, d_out.T)),
      *(lse[None, :], mean[None, :], pairs),
    )
    dv += dot(weights.astype(d_out.dtype), d_out)
    dk += dot(d_logits.astype(q.dtype), q)
    return dk, dv

  zero = jnp.zeros(k.shape, jnp.float32)
  dk, dv = head.over_queries(c, y, x, exists, body, (zero, zero))
  row = x + static.older - static.memory
  head.put(dk_ref, row, there, dk / math.sqrt(dk_ref.shape[2]))
  head.put(dv_ref, row, there, dv)
