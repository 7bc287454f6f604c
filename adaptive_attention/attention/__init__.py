"""Attention under learned masks: `attend` and `attend_ring`.

Here arguments are checked, the gradient of older keys is stopped, and an
implementation is chosen. All that is below takes checked arguments.

Implementations:
  "blocked": computes only blocks that hold an open pair. It has gradients and
    their forward derivatives (Hessian-vector products by jax.jvp of jax.grad),
    but no jax.jvp by itself and no gradient of a gradient, which JAX refuses.
    On a CPU it is the best.
  "reference": computes all pairs. It has derivatives of all orders and kinds.
  "pallas_tpu", "pallas_gpu": kernels that compute the same blocks as "blocked",
    on a TPU from v5e on and on a GPU from compute capability 8.0 on. They have
    gradients alone, no vectors of distances, and no segments.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from adaptive_attention import masks
from adaptive_attention.attention import (
  blocked,
  checks,
  choice,
  reference,
  walk,
)
from adaptive_attention.attention.choice import IMPLEMENTATIONS
from adaptive_attention.attention.heads_and_segments import segments_of
from adaptive_attention.attention.on_devices import explicit_axes
from adaptive_attention.attention.ring import Ring, append
from adaptive_attention.masks import Mask

__all__ = ["IMPLEMENTATIONS", "attend", "attend_ring", "computed_pairs"]


def attend(
  q_BTHK: ArrayLike,
  k_BSGK: ArrayLike,
  v_BSGK: ArrayLike,
  mask: Mask | None,
  *,
  memory: int = 0,
  first_key: ArrayLike = 0,
  segment_ids: ArrayLike | None = None,
  key_mask: ArrayLike | None = None,
  relative_RK: ArrayLike | None = None,
  dropout_rate: float = 0.0,
  dropout_seed: ArrayLike | None = None,
  implementation: str | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Attends from the last T of S positions to the open keys of each head.

  out = softmax_s(q.(k + p[d]) / sqrt(K) + log m(d) + log w(d)) v,
  d = S - T + t - s >= 0  (Sukhbaatar et al. 2019, eq. 1 and 3; w is the wave)

  Args:
    q_BTHK: queries; query t stands at key index S - T + t.
    k_BSGK, v_BSGK: keys and values, S >= T, of G heads that divide H; query
      head h reads head h // (H / G) (Ainslie et al. 2023, "GQA").
    mask: spans and waves of the H heads in tokens, or None for plain causal.
    memory: static; to this many first keys and values no gradient flows.
    first_key: runtime integer; keys before this index do not exist yet. What
      they hold, nan included, changes nothing.
    segment_ids: (B, S) integers above -2^31, as of packed sequences; no query
      attends across. Blocks before a segment's first key are not computed.
    key_mask: (B, S) booleans, false for keys, all finite, that are padding.
    relative_RK: p, a vector for each distance 0 .. R - 1; zero beyond.
    dropout_rate: static; the share of attention weights to drop, in [0, 1).
    dropout_seed: uint32 scalar; which ones is a pure function of
      (seed, b, h, t, s - (S - T)), the same for every implementation.
    implementation: one of IMPLEMENTATIONS, or None for the best that serves.
    interpret: True (or `pltpu.InterpretParams()`) runs a kernel anywhere.

  Returns:
    (B, T, H, K) in the dtype of q, by a softmax of float32; zeros for a query
    without an open key. Differentiable in q, k, v, `mask` and `relative_RK`.

  Raises:
    ValueError: an unknown implementation, or arguments that do not fit.
    NotImplementedError: a named implementation that cannot serve the case.
  """
  arrays = q_BTHK, k_BSGK, v_BSGK, segment_ids, key_mask
  options = mask, first_key, relative_RK, dropout_rate, dropout_seed
  return _over_keys(implementation, interpret, *arrays, memory, options)


def _over_keys(
  implementation, interpret, q, k, v, segment_ids, key_mask, memory, options
):
  """Attends to keys of which the first `memory` take no gradient."""
  q, k, v, segment_ids, key_mask = jax.tree.map(
    jnp.asarray, (q, k, v, segment_ids, key_mask)
  )
  memory = checks.whole_number("memory", memory)
  checks.queries_and_keys(q, k, v)
  checks.older_keys(q, k, memory)
  checks.segments(k, segment_ids, key_mask)
  options = _checked_options(q, *options)
  if memory:
    k, v = (
      jnp.concatenate([lax.stop_gradient(x[:, :memory]), x[:, memory:]], axis=1)
      for x in (k, v)
    )
  segments = segments_of(segment_ids, key_mask, q.shape[1])
  options |= {"ring": None, "memory": memory, "segments": segments}
  return _run(implementation, interpret, q, k, v, **options)


def attend_ring(
  ring: Ring,
  q_BTHK: ArrayLike,
  k_BTGK: ArrayLike,
  v_BTGK: ArrayLike,
  mask: Mask | None,
  *,
  first_key: ArrayLike = 0,
  relative_RK: ArrayLike | None = None,
  dropout_rate: float = 0.0,
  dropout_seed: ArrayLike | None = None,
  dropout_heads: ArrayLike | None = None,
  implementation: str | None = None,
  interpret: bool = False,
) -> tuple[jax.Array, Ring]:
  """Appends T keys and values to a ring, then attends to all its S positions.

  The same as `attend` over the S - T newest positions of the ring and these T,
  in this order, with memory=S - T: the gradient flows to the new keys and
  values alone, and no gradient flows into or out of a ring.

  Args:
    ring: keys and values of N >= B streams, in the dtype of q. It need not
      have been written: what is before `first_key` is hidden.
    q_BTHK, k_BTGK, v_BTGK: those of the T new tokens, T <= S.
    first_key: runtime integer; of the S positions after the new ones are
      appended, those before this index do not exist yet.
    mask, relative_RK, dropout_rate, dropout_seed, implementation, interpret: as
      in `attend`. "blocked" has no second derivatives over a ring.
    dropout_heads: (H,) integers, the h of each head where dropout is drawn, as
      the heads of a layer may come in several calls; by default 0 .. H - 1.

  Returns:
    (out_BTHK, ring): what `attend` returns, and the ring with the T tokens in
    place of the oldest, written in place where the given one is donated.

  Raises:
    ValueError, NotImplementedError: as `attend` does.
  """
  ring = jax.tree.map(jnp.asarray, ring)
  q_BTHK, k_BTGK, v_BTGK = map(jnp.asarray, (q_BTHK, k_BTGK, v_BTGK))
  checks.queries_and_keys(q_BTHK, k_BTGK, v_BTGK)
  checks.ring_rows(ring, q_BTHK, k_BTGK)
  draws = dropout_rate, dropout_seed, dropout_heads
  options = _checked_options(q_BTHK, mask, first_key, relative_RK, *draws)
  ring = append(jax.tree.map(lax.stop_gradient, ring), k_BTGK, v_BTGK)
  memory = ring.k_NSHK.shape[1] - jnp.shape(q_BTHK)[1]
  arrays = q_BTHK, k_BTGK, v_BTGK
  options |= {"ring": ring, "memory": memory, "segments": None}
  return _run(implementation, interpret, *arrays, **options), ring


def computed_pairs(
  mask: Mask,
  T: int,
  S: int,
  *,
  first_key: int = 0,
  implementation: str | None = None,
  head_width: int = 64,
  dtype: DTypeLike = jnp.float32,
) -> np.ndarray:
  """Returns (H,) how many pairs are computed for T queries and S keys.

  These are the open pairs and what is computed beside them: all of a block of
  which one pair is open, or for "reference" all T S pairs.

  Args:
    head_width, dtype: of q, k and v. The blocks of kernels depend on them.

  Raises:
    ValueError: an unknown implementation, or lengths that do not fit.
  """
  checks.positions(T, S)
  H, itemsize = len(mask.span), jnp.dtype(dtype).itemsize
  strided = mask.wave is not None and mask.wave.integer
  call = choice.Call(1, T, S, H, head_width, itemsize, strided)
  if implementation is None:
    implementation = choice.chosen(call).implementation
  choice.check_name(implementation)
  if implementation == "reference":
    return np.full(H, T * S, np.int64)
  block_q, block_k = choice.block_sizes(call, implementation)
  sizes = walk.Sizes(T, S, block_q, block_k, strided)
  block_H = _block_count(mask, first_key, sizes)
  return np.asarray(block_H, np.int64) * block_q * block_k


@functools.partial(jax.jit, static_argnums=2)
def _block_count(mask, first_key, sizes):
  table_HS = masks.log_weight(mask, jnp.arange(sizes.S, dtype=jnp.int32))
  heads = walk.heads_of(mask, table_HS, first_key, sizes)
  return walk.block_count(heads, sizes)


def _run(implementation, interpret, q, k, v, **options):
  """Attends by what serves the call; says what that is where it is None."""
  call = choice.call_of(q, k, **options)
  call = call._replace(axes=explicit_axes((q, k, v, options)))
  found = choice.chosen(call, implementation, interpret)
  if implementation is None:
    _say_once(found)
  return _attended(found.implementation, interpret, call, q, k, v, **options)


# The layers of a model have the same shapes: one is traced and lowered for all.
@functools.partial(
  jax.jit, static_argnums=(0, 1, 2), static_argnames=("memory", "dropout_rate")
)
def _attended(implementation, interpret, call, q, k, v, **options):
  """Attends by an implementation that serves the call."""
  match implementation:
    case "reference":
      return reference.attend(q, k, v, **options)
    case "blocked":
      return blocked.attend(q, k, v, **options)
    case name:
      options |= {"call": call, "interpret": interpret}
      del options["segments"], options["relative_RK"]  # refused already
      return choice.kernel(name).attend(q, k, v, **options)


@functools.cache
def _say_once(found: choice.Choice):
  logging.getLogger(__name__).info("attention runs as %s", found)


def _checked_options(
  q, mask, first_key, relative, dropout_rate, dropout_seed, dropout_heads=None
):
  """Returns by name, as arrays, what both functions take beside q, k and v.

  NumPy's arrays, lists and numbers are taken as JAX takes them anywhere, and a
  seed that is a Python integer of any size.
  """
  mask, first_key, relative = jax.tree.map(
    jnp.asarray, (mask, first_key, relative)
  )
  if isinstance(dropout_seed, int):
    dropout_seed = jnp.uint32(dropout_seed % 2**32)
  elif dropout_seed is not None:
    dropout_seed = jnp.asarray(dropout_seed)
  if dropout_heads is None:
    dropout_heads = np.arange(q.shape[2], dtype=np.int32)
  dropout_heads = jnp.asarray(dropout_heads)
  dropout_rate = checks.static_number("dropout_rate", dropout_rate)
  draws = dropout_rate, dropout_seed, dropout_heads
  checks.options(q, first_key, relative, *draws)
  checks.lengths(mask, q.shape[2])
  return {
    "mask": mask,
    "first_key": first_key,
    "relative_RK": relative,
    "dropout_rate": dropout_rate,
    "dropout_seed": dropout_seed,
    "dropout_heads": dropout_heads,
  }
