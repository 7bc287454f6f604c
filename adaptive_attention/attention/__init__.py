"""Attention under learned masks: `attend`, one function for all uses."""

import functools
import logging
import operator

import jax
import jax.numpy as jnp

from adaptive_attention.attention import blocked, reference
from adaptive_attention.attention.ring import Ring
from adaptive_attention.masks import Mask

IMPLEMENTATIONS = ("blocked", "reference")


def attend(
  q_BTHK,
  k_BSHK,
  v_BSHK,
  mask: Mask | None,
  memory: int = 0,
  first_key=0,
  dropout_rate: float = 0.0,
  dropout_seed=None,
  implementation: str | None = None,
  ring: Ring | None = None,
  relative_RK=None,
):
  """Attends from the last T of S positions to what each head may look at.

  out = softmax_s(q.k / sqrt(K) + log m(d) + log w(d)) v, d = S - T + t - s >= 0

  With `relative_RK` p the score is q.(k + p[d]) / sqrt(K): shared vectors per
  distance as in Sukhbaatar et al. 2019, eq. 1.

  Softmax and masks are float32 whatever the inputs are. A query that finds no
  open key at all gets zeros, and its gradients are zeros.

  Args:
    q_BTHK: queries; query t stands at key index S - T + t.
    k_BSHK: keys, S >= T. No length needs to be a multiple of anything.
    v_BSHK: values.
    mask: spans and waves of the H heads, or None for plain causal attention.
    memory: static; the first `memory` keys and values are older tokens, to
      which no gradient flows.
    first_key: runtime integer; keys before this index do not exist yet.
    dropout_rate: static; the share of attention weights to drop, in [0, 1).
    dropout_seed: uint32 scalar; which ones is a pure function of
      (seed, b, h, t, s), the same for every implementation.
    implementation: "blocked" (only tiles that hold an open pair), "reference"
      (all pairs), or None for the best one that serves.
    ring: where the keys and values of all S positions stand in the rows of a
      `Ring`, the last T included. `k_BSHK` and `v_BSHK` are then these T alone,
      to take the gradient; all that is older is memory, and `memory` stays 0.
    relative_RK: a vector for each distance 0 .. R - 1; zero beyond.

  Arrays may be NumPy's. What keys and values before `first_key` hold, nan
  included, changes nothing.

  Returns:
    (B, T, H, K) in the dtype of q. Differentiable in q, k, v, the arrays of
    `mask` and the relative vectors. "reference" has derivatives of all orders
    and kinds; "blocked" has gradients, and their forward derivatives (Hessian-
    vector products by jax.jvp of jax.grad), but no jax.jvp by itself and no
    gradient of a gradient, which JAX refuses.

  Raises:
    ValueError: an unknown implementation, or arguments that do not fit.
    NotImplementedError: a named implementation that cannot serve the case.
  """
  # NumPy's arrays, lists and numbers are taken as JAX takes them anywhere.
  q_BTHK, k_BSHK, v_BSHK, mask, first_key, ring, relative_RK = jax.tree.map(
    jnp.asarray, (q_BTHK, k_BSHK, v_BSHK, mask, first_key, ring, relative_RK)
  )
  memory = _whole_number("memory", memory)
  dropout_seed = _seed(dropout_seed)
  _check(
    q_BTHK, k_BSHK, v_BSHK, mask, memory, first_key, dropout_rate, dropout_seed
  )
  _check_positions(q_BTHK, k_BSHK, memory, ring, relative_RK)
  if implementation is None:
    implementation = IMPLEMENTATIONS[0]
    _say_once(implementation)
  match implementation:
    case "reference":
      run = reference.attend
    case "blocked":
      run = blocked.attend
    case _:
      raise ValueError(
        f"implementation={implementation!r} is unknown; choose one of "
        f"{', '.join(IMPLEMENTATIONS)}, or None for the best that serves"
      )
  return run(
    q_BTHK,
    k_BSHK,
    v_BSHK,
    mask,
    memory=memory,
    first_key=first_key,
    dropout_rate=dropout_rate,
    dropout_seed=dropout_seed,
    ring=ring,
    relative_RK=relative_RK,
  )


@functools.cache
def _say_once(implementation):
  logging.getLogger(__name__).info("attention runs as %r", implementation)


def _whole_number(name, value) -> int:
  try:
    return operator.index(value)
  except TypeError as error:
    raise ValueError(f"{name}={value!r} must be an integer") from error


def _seed(seed):
  """A seed as a uint32, of a Python integer of any size; None for none."""
  if isinstance(seed, int):
    return jnp.uint32(seed % 2**32)
  return None if seed is None else jnp.asarray(seed)


def _require(condition, message):
  if not condition:
    raise ValueError(message)


def _check_positions(q, k, memory, ring, relative):
  B, T, H, K = q.shape
  if ring is not None:
    shape = ring.k_NSHK.shape
    _require(
      memory == 0 and k.shape[1] == T,
      f"memory={memory} and {k.shape[1]} keys do not fit a ring and T={T} "
      "queries; give memory=0 and the keys of these queries, as the older ones "
      "are in the ring",
    )
    _require(
      shape == ring.v_NSHK.shape
      and shape[0] >= B
      and shape[1] >= T
      and shape[2:] == (H, K),
      f"the ring's keys {shape} and values {ring.v_NSHK.shape} must be alike, "
      f"of at least the {B} sequences and {T} positions of q {q.shape} and of "
      "its heads and width",
    )
  if relative is not None:
    _require(
      relative.ndim == 2 and relative.shape[1] == K,
      f"relative_RK {relative.shape} must hold a vector of the width {K} of "
      "one head for each distance",
    )


def _is_integer(x) -> bool:
  return x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer)


def _check(q, k, v, mask, memory, first_key, dropout_rate, dropout_seed):
  _require(
    q.ndim == 4 and k.ndim == 4,
    f"q {q.shape} and k {k.shape} must have the four axes "
    "(batch, position, head, width)",
  )
  _require(k.shape == v.shape, f"k {k.shape} and v {v.shape} must be alike")
  B, T, H, K = q.shape
  S = k.shape[1]
  _require(
    k.shape == (B, S, H, K),
    f"k {k.shape} must have the batch, heads and width of q {q.shape}",
  )
  _require(
    T >= 1 and H >= 1 and K >= 1,
    f"q {q.shape} must hold at least one query, one head and a width of 1",
  )
  _require(
    S >= T,
    f"S={S} keys are fewer than T={T} queries; the queries are the last T of "
    "the S positions",
  )
  _require(
    q.dtype == k.dtype == v.dtype and q.dtype in (jnp.float32, jnp.bfloat16),
    f"q, k, v have the dtypes {q.dtype}, {k.dtype}, {v.dtype}; expected all "
    "float32 or all bfloat16",
  )
  _require(
    0 <= memory <= S - T,
    f"memory={memory} must be an integer from 0 to S - T = {S - T}",
  )
  _require(_is_integer(first_key), f"first_key={first_key} must be one integer")
  _require(
    0 <= dropout_rate < 1,
    f"dropout_rate={dropout_rate} must be at least 0 and less than 1",
  )
  _require(
    not dropout_rate or dropout_seed is not None,
    f"dropout_rate={dropout_rate} needs a dropout_seed",
  )
  _require(
    dropout_seed is None or _is_integer(dropout_seed),
    f"dropout_seed={dropout_seed} must be one integer",
  )
  if mask is None:
    return
  lengths = {"span": mask.span}
  if mask.wave is not None:
    lengths |= {"period": mask.wave.period, "ratio": mask.wave.ratio}
    harmonics = mask.wave.harmonics
    _require(
      harmonics is None or (isinstance(harmonics, int) and harmonics >= 1),
      f"harmonics={harmonics!r} must be None or an integer of at least 1",
    )
  for name, value in lengths.items():
    _require(
      value.shape == (H,),
      f"{name} has the shape {value.shape}; expected one number for each of "
      f"the {H} heads of q",
    )
  _require(mask.ramp > 0, f"ramp={mask.ramp} must be more than 0 tokens")


def attend_ring(ring, q_BTHK, k_BTHK, v_BTHK, mask, **options):
  from adaptive_attention.attention.ring import append

  ring = append(ring, k_BTHK, v_BTHK)
  return attend(q_BTHK, k_BTHK, v_BTHK, mask, ring=ring, **options), ring
