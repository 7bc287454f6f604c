"""The GPU's three kernels: forward, dq with the lengths' gradients, dk and dv.

Logits are in units of log 2, so that exp2 needs no factor. In full blocks the
log weight is one number. In partial ones it is read from the head's table by
distance. The gradients of the lengths are sums of the logits' gradients times
tables of slopes, and no sum depends on the order of programs: two runs give
equal bits.
"""

import math

import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from adaptive_attention.attention.pallas_attend import LOW
from adaptive_attention.attention.pallas_gpu_head import (
  LOG2E,
  Head,
  dot,
  put,
  query_rows,
  rows,
)


def forward(static, blocks, ints, stream, table, q_ref, k_ref, v_ref, *outs):
  """Writes the output and the log of sums of a block of queries."""
  out_ref, lse_ref = outs
  head = Head(static, blocks, ints, stream)
  a, y, x, there = head.query_block()
  q = rows(q_ref, x, there)
  scale = LOG2E / math.sqrt(q_ref.shape[1])

  def body(pairs, carry):
    highest, total, acc = carry
    k, v = head.key_rows(k_ref, v_ref, pairs.x_k[0], pairs.exists[0])
    logits = head.logits(dot(q, k.T) * scale, table, pairs)
    new = jnp.maximum(highest, jnp.max(logits, axis=1))
    weights = jnp.exp2(logits - new[:, None])
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
  seen = total > 0
  safe = jnp.where(seen, total, 1.0)
  put(out_ref, x, there, acc / safe[:, None])
  # Where no key is open the backward pass must find exp2(...) = 0.
  lse = jnp.where(seen, highest + jnp.log2(safe), -LOW)
  plgpu.store(lse_ref.at[jnp.where(there, x, static.T)], lse, mask=there)


def dq(static, blocks, ints, stream, table, k_ref, v_ref, *refs):
  """Writes dq of a block of queries, and its share in those of the lengths."""
  of_queries, refs = refs[:4], refs[4:]
  slopes, dq_ref, share_ref = refs if static.masked else (None, *refs, None)
  head = Head(static, blocks, ints, stream)
  a, y, x, there = head.query_block()
  q, d_out, lse, mean = query_rows(of_queries, x, there)
  scale = LOG2E / math.sqrt(dq_ref.shape[1])

  def body(pairs, carry):
    acc, d_lengths = carry
    k, v = head.key_rows(k_ref, v_ref, pairs.x_k[0], pairs.exists[0])
    _, d_logits = head.gradients(
      *(dot(q, k.T) * scale, dot(d_out, v.T)),
      *(lse[:, None], mean[:, None], table, pairs),
    )
    # Only at the end summed over queries too, in one reduction.
    if not pairs.is_full:
      d_lengths = tuple(
        total + jnp.sum(d_logits * head.entries(slopes, pairs, g), axis=1)
        for g, total in enumerate(d_lengths)
      )
    elif static.strided and d_lengths:
      line = jnp.sum(d_logits, axis=1)
      d_lengths = tuple(
        total + line * slopes[g, head.lead + pairs.rho]
        for g, total in enumerate(d_lengths)
      )
    return acc + dot(d_logits.astype(k.dtype), k), d_lengths

  G = share_ref.shape[0] if static.masked else 0
  zeros = (jnp.zeros(blocks.block_q, jnp.float32),) * G
  nothing = jnp.zeros(q.shape, jnp.float32), zeros
  acc, d_lengths = head.over_keys(a, y, x, body, nothing)
  put(dq_ref, x, there, acc / math.sqrt(dq_ref.shape[1]))
  for g, total in enumerate(d_lengths):
    share_ref[g] = jnp.sum(jnp.where(there, total, 0.0))


def dkv(static, blocks, ints, stream, table, k_ref, v_ref, *refs):
  """Writes dk and dv of a block of keys that are not memory."""
  *of_queries, dk_ref, dv_ref = refs
  head = Head(static, blocks, ints, stream)
  c, y, x, there = head.key_block()
  exists = there & (x >= head.walked.first)
  k, v = head.key_rows(k_ref, v_ref, x, exists)
  scale = LOG2E / math.sqrt(dk_ref.shape[1])

  def body(pairs, carry):
    dk, dv = carry
    x_q = pairs.x_q[0]
    q, d_out, lse, mean = query_rows(
      of_queries, x_q, (x_q >= 0) & (x_q < static.T)
    )
    weights, d_logits = head.gradients(
      *(dot(k, q.T) * scale, dot(v, d_out.T)),
      *(lse[None, :], mean[None, :], table, pairs),
    )
    dv += dot(weights.astype(d_out.dtype), d_out)
    dk += dot(d_logits.astype(q.dtype), q)
    return dk, dv

  zero = jnp.zeros(k.shape, jnp.float32)
  dk, dv = head.over_queries(c, y, x, exists, body, (zero, zero))
  row = x + static.older - static.memory
  put(dk_ref, row, there, dk / math.sqrt(dk_ref.shape[1]))
  put(dv_ref, row, there, dv)
