"""What `attend` and `attend_ring` ask of their arguments.

Each function raises ValueError, in one sentence that names the value and what
was expected. The implementations take arguments that were checked here. The
last functions of this file are about derivatives.
"""

import contextlib
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_attention.mask_bounds import MOST_HARMONICS


def _require(condition, message):
  if not condition:
    raise ValueError(message)


def _is_integer(x) -> bool:
  return x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer)


def static_number(name, value) -> float:
  """Returns a number of any kind as a Python float; it must not be traced."""
  if not isinstance(value, str):
    with contextlib.suppress(TypeError, ValueError, OverflowError):
      return float(value)
  raise ValueError(
    f"{name} is a {type(value).__name__}; expected one number that is known as "
    "it is traced"
  )


def whole_number(name, value) -> int:
  """Returns a static integer."""
  try:
    return operator.index(value)
  except TypeError as error:
    raise ValueError(f"{name}={value!r} must be an integer") from error


def queries_and_keys(q, k, v):
  """Checks q (B, T, H, K) and k, v (B, S, G, K), S >= T, of one dtype."""
  _require(
    q.ndim == 4 and k.ndim == 4,
    f"q {q.shape} and k {k.shape} must have the four axes "
    "(batch, position, head, width)",
  )
  _require(k.shape == v.shape, f"k {k.shape} and v {v.shape} must be alike")
  B, T, H, K = q.shape
  S, G = k.shape[1:3]
  _require(
    k.shape == (B, S, G, K),
    f"k {k.shape} must have the batch and width of q {q.shape}",
  )
  _require(
    T >= 1 and H >= 1 and K >= 1,
    f"q {q.shape} must hold at least one query, one head and a width of 1",
  )
  _require(
    G >= 1 and H % G == 0,
    f"the {H} heads of q {q.shape} must be a multiple of the {G} heads of k "
    f"{k.shape}, each of which serves as many of them",
  )
  positions(T, S)
  _require(
    q.dtype == k.dtype == v.dtype and q.dtype in (jnp.float32, jnp.bfloat16),
    f"q, k, v have the dtypes {q.dtype}, {k.dtype}, {v.dtype}; expected all "
    "float32 or all bfloat16",
  )


def positions(T, S):
  """Checks that T queries are the last of S positions."""
  _require(
    S >= T,
    f"S={S} keys are fewer than T={T} queries; the queries are the last T of "
    "the S positions",
  )


def older_keys(q, k, memory):
  """Checks how many of the first keys take no gradient."""
  rest = k.shape[1] - q.shape[1]
  _require(
    0 <= memory <= rest,
    f"memory={memory} must be an integer from 0 to S - T = {rest}",
  )


def segments(k, segment_ids, key_mask):
  """Checks the segments of B sequences of S positions, and which keys serve."""
  for name, x, kind, expected in (
    ("segment_ids", segment_ids, jnp.integer, "integers"),
    ("key_mask", key_mask, jnp.bool_, "booleans"),
  ):
    _require(
      x is None or (x.shape == k.shape[:2] and jnp.issubdtype(x.dtype, kind)),
      f"{name} {None if x is None else (x.dtype.name, x.shape)} must hold "
      f"{expected} of the shape {k.shape[:2]}, one for each key of k",
    )


def ring_rows(ring, q, k):
  """Checks that T keys of B streams can be appended to a ring."""
  B, T, G, K = k.shape
  _require(
    q.shape[1] == T,
    f"{T} keys do not fit T={q.shape[1]} queries; give the keys of these "
    "queries alone, as the older ones are in the ring",
  )
  shape = ring.k_NSHK.shape
  _require(
    len(shape) == 4
    and shape == ring.v_NSHK.shape
    and shape[0] >= B
    and shape[1] >= T
    and shape[2:] == (G, K),
    f"the ring's keys {shape} and values {ring.v_NSHK.shape} must be alike, "
    f"of at least the {B} sequences and {T} positions of k {k.shape} and of "
    "its heads and width",
  )
  dtypes = ring.k_NSHK.dtype, ring.v_NSHK.dtype
  _require(
    dtypes == (k.dtype, k.dtype),
    f"the ring's keys and values have the dtypes {dtypes[0]} and {dtypes[1]}; "
    f"expected {k.dtype}, as q, k and v have",
  )
  for name, value in (("first_row", ring.first_row), ("batch", ring.batch)):
    _require(
      _is_integer(value), f"the ring's {name}={value} must be one integer"
    )


def options(q, first_key, relative, dropout_rate, dropout_seed, dropout_heads):
  """Checks what both functions take beside queries, keys and masks."""
  _require(_is_integer(first_key), f"first_key={first_key} must be one integer")
  _require(
    relative is None
    or (relative.ndim == 2 and relative.shape[1] == q.shape[3]),
    f"relative_RK {None if relative is None else relative.shape} must hold a "
    f"vector of the width {q.shape[3]} of one head for each distance",
  )
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
  H = q.shape[2]
  _require(
    jnp.issubdtype(dropout_heads.dtype, jnp.integer)
    and dropout_heads.shape == (H,),
    f"dropout_heads {dropout_heads.dtype}{list(dropout_heads.shape)} must be "
    f"one integer for each of the {H} heads of q",
  )


def lengths(mask, H):
  """Checks a mask of H heads; None is plain causal attention."""
  if mask is None:
    return
  values = {"span": mask.span}
  if mask.wave is not None:
    values |= {"period": mask.wave.period, "ratio": mask.wave.ratio}
    harmonics = mask.wave.harmonics
    _require(
      harmonics is None
      or (isinstance(harmonics, int) and 1 <= harmonics <= MOST_HARMONICS),
      f"harmonics={harmonics!r} must be None or an integer from 1 to "
      f"{MOST_HARMONICS}",
    )
  for name, value in values.items():
    _require(
      value.shape == (H,),
      f"{name} has the shape {value.shape}; expected one number for each of "
      f"the {H} heads of q",
    )
  ramp = static_number("ramp", mask.ramp)
  _require(ramp > 0, f"ramp={ramp} must be more than 0 tokens")


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def differentiated_once(x, refusal):
  """Returns x; NotImplementedError(refusal) where it has a tangent.

  The caller's backward pass is written by hand. To differentiate it once more
  would leave out terms without an error.
  """
  del refusal
  return x


@differentiated_once.defjvp
def _refuse(refusal, primals, tangents):
  del primals, tangents
  raise NotImplementedError(refusal)


def no_gradient(x):
  """Returns the gradient of what takes none: zeros, or float0 for integers."""
  if jnp.issubdtype(jnp.result_type(x), jnp.floating):
    return jnp.zeros_like(x)
  return np.zeros(np.shape(x), jax.dtypes.float0)
