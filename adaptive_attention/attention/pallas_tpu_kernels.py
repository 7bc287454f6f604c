"""The TPU's four kernels: forward, the two backward ones, and both in one pass.

The grid is (streams, items). How many items there are is known at run time, and
which blocks an item reads follows from words in SMEM. So what is hidden costs
neither a copy nor a product, and the copies of the next item overlap this one
across the borders of rows and heads.

Logits are in units of log 2, so that exp2 needs no factor.
"""

import math

import jax.numpy as jnp
from jax.experimental import pallas as pl

from adaptive_attention.attention.pallas_attend import LOW
from adaptive_attention.attention.pallas_tpu_item import (
  LANES,
  Item,
  Scalars,
  dot,
)
from adaptive_attention.attention.walk_items import FIRST, LAST

_SCALARS = len(Scalars._fields)


def _item(geometry, K, refs):
  return Item(geometry, K, Scalars(*refs[:_SCALARS])), refs[_SCALARS:]


def _zero(*refs):
  for ref in refs:
    ref[...] = jnp.zeros_like(ref)


def forward(geometry, K, *refs):
  """Writes outT (K, block_q) and the log of sums (1, block_q)."""
  item, refs = _item(geometry, K, refs)
  qT, k, vT, table, outT, lse, highest, total, acc = refs

  @pl.when(item.has(FIRST))
  def _begin():
    highest[...] = jnp.full_like(highest, LOW)
    _zero(total, acc)

  def body(is_full):
    logits = item.logits(k, qT, table, is_full)
    scale = item.keep_scale()
    before = highest[...], total[...], acc[...]
    found = []
    for part in _parts(geometry.block_q):
      old, old_total, old_acc = (x[:, part] for x in before)
      new = jnp.maximum(old, jnp.max(logits[:, part], axis=0, keepdims=True))
      shrink = jnp.exp2(old - new)
      weights = jnp.exp2(logits[:, part] - new)
      new_total = old_total * shrink + jnp.sum(weights, axis=0, keepdims=True)
      if scale is not None:
        weights = weights * scale[:, part]
      new_acc = old_acc * shrink + dot(vT[...], weights.astype(vT.dtype))
      found.append((new, new_total, new_acc))
    for ref, parts in zip((highest, total, acc), zip(*found)):
      ref[...] = jnp.concatenate(parts, axis=1)

  item.either(body)

  @pl.when(item.has(LAST))
  def _end():
    has_open = total[...] > 0
    safe = jnp.where(has_open, total[...], 1.0)
    outT[...] = (acc[...] / safe).astype(outT.dtype)
    # Where no key is open the backward pass must find exp2(...) = 0.
    lse[...] = jnp.where(has_open, highest[...] + jnp.log2(safe), -LOW)


def _parts(block_q):
  """Returns the queries of a block in two halves, if each has whole vectors.

  The product of one half then overlaps the exponential of the other: 1 to 10%
  fewer bundles. Four parts take fewer on v5e and more on v6e than two. Parts in
  the backward kernel, which its products bound, took as many.
  """
  width = max(block_q // 2, LANES)
  return [slice(at, at + width) for at in range(0, block_q, width)]


def _gradients(item, is_full, refs):
  """Returns (dropped weights, gradients of the natural logits)."""
  qT, k, v, d_outT, lse, mean, table = refs
  weights = jnp.exp2(item.logits(k, qT, table, is_full) - lse[...])
  d_weights = dot(v[...], d_outT[...])
  dropped, scale = weights, item.keep_scale()
  if scale is not None:
    dropped, d_weights = weights * scale, d_weights * scale
  return dropped, weights * (d_weights - mean[...])


def dq(geometry, K, *refs):
  """Writes dqT, and the gradient of the head's log weights if it is wanted."""
  item, refs = _item(geometry, K, refs)
  given, (dqT, *d_table, acc) = refs[:7], refs[7:]
  pl.when(item.begins_a_head())(lambda: _zero(*d_table))
  pl.when(item.has(FIRST))(lambda: _zero(acc))
  k = given[1]

  def body(is_full):
    _, d_logits = _gradients(item, is_full, given)
    for ref in d_table:
      item.add_to_table(ref, d_logits, is_full)
    acc[...] += dot(k[...].T, d_logits.astype(k.dtype))

  item.either(body)

  @pl.when(item.has(LAST))
  def _end():
    dqT[...] = (acc[...] / math.sqrt(K)).astype(dqT.dtype)


def dkv(geometry, K, *refs):
  """Writes dk and dv of a block of keys."""
  item, refs = _item(geometry, K, refs)
  given, (dk, dv, *sums) = refs[:7], refs[7:]
  pl.when(item.has(FIRST))(lambda: _zero(*sums))

  def body(is_full):
    weights, d_logits = _gradients(item, is_full, given)
    _add_key_gradients(given, sums, weights, d_logits)

  item.either(body)
  _put_key_gradients(item, K, dk, dv, sums)


def _add_key_gradients(given, sums, weights, d_logits):
  qT, d_outT = given[0], given[3]
  dk_sum, dv_sum = sums
  dv_sum[...] += dot(weights.astype(d_outT.dtype), d_outT[...].T)
  dk_sum[...] += dot(d_logits.astype(qT.dtype), qT[...].T)


def _put_key_gradients(item, K, dk, dv, sums):
  dk_sum, dv_sum = sums

  @pl.when(item.has(LAST))
  def _end():
    dk[...] = (dk_sum[...] / math.sqrt(K)).astype(dk.dtype)
    dv[...] = dv_sum[...].astype(dv.dtype)


def backward(geometry, K, *refs):
  """Writes all gradients; a head's dqT stays in VMEM while it is walked.

  dqT is float32, and not yet divided by sqrt(K).
  """
  item, refs = _item(geometry, K, refs)
  given, (dk, dv, dqT, *d_table, dk_sum, dv_sum) = refs[:7], refs[7:]
  k, sums = given[1], (dk_sum, dv_sum)
  block = geometry.block_q
  pl.when(item.begins_a_head())(lambda: _zero(dqT, *d_table))
  pl.when(item.has(FIRST))(lambda: _zero(*sums))

  def body(is_full):
    weights, d_logits = _gradients(item, is_full, given)
    for ref in d_table:
      item.add_to_table(ref, d_logits, is_full)
    _add_key_gradients(given, sums, weights, d_logits)
    at = pl.ds(pl.multiple_of(item.place.q * block, LANES), block)
    dqT[:, at] += dot(k[...].T, d_logits.astype(k.dtype))

  item.either(body)
  _put_key_gradients(item, K, dk, dv, sums)
