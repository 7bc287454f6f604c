"""The masks of adaptive attention as pure functions of distance.

A query at position t and a key at position s have the distance d = t - s >= 0
in tokens; a query attends to itself too. Each head h multiplies its attention
by two weights in [0, 1], which depend on d alone:

* the span weight m, which falls to zero beyond a learned span (Sukhbaatar et
  al. 2019, "Adaptive Attention Span in Transformers", equation 3);
* the wave weight w, a triangle wave of a learned period.

A pair is hidden where min(m, w) <= 1e-6, and open otherwise. Lengths are in
tokens. All arithmetic is float32. `distance` may have any shape (...); the
results have the shape (H, ...).
"""

import contextlib
import dataclasses
from operator import index

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

HIDDEN = 1e-6  # a pair whose weight is not above this is hidden


def _static(x, kind):
  """Returns a static field as Python's own number, where it is an array of one.

  Static fields are part of the key of a compiled program, and an array cannot
  be one, as it may change. Other values are returned as they are, and checked
  where the mask is used.
  """
  if hasattr(x, "dtype"):
    with contextlib.suppress(TypeError, ValueError):
      return kind(x)
  return x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Wave:
  """The triangle wave of each head: its period P and its ratio r; a pytree.

  The wave weight of a distance d is w(d) = clip(tri(d) + 1/2 + P r, 0, 1). The
  exact wave is tri(d) = P / 4 - |d - n P|, n P the nearest multiple of P. Its
  series is tri(d) = (P / 4) (8 / pi^2) sum over odd k <= K of
  cos(2 pi k d / P) / k^2. The wave is that of the published program; see
  `triangle_wave` and `wave_weight`.

  Attributes:
    period: (H,) P in tokens.
    ratio: (H,) r, a share of the period; P r, in tokens, raises the wave.
    harmonics: static; None for the exact wave, or K for its series up to the
      odd harmonic K (the published program has K = 5).
    integer: static; whether P is rounded in the forward pass. The gradient then
      passes straight through the rounding where P scales the amplitude or
      raises the wave. It is cut off where P is a phase, as it grows with the
      distance there.

  Nothing is checked here, as periods may be traced: `attend` raises ValueError
  for shapes other than (H,) and for harmonics out of bounds, and `WaveBounds`
  for bounds of periods and ratios that are not possible.
  """

  period: jax.Array
  ratio: jax.Array
  harmonics: int | None = dataclasses.field(
    default=None, metadata={"static": True}
  )
  integer: bool = dataclasses.field(default=False, metadata={"static": True})

  def __post_init__(self):
    object.__setattr__(self, "harmonics", _static(self.harmonics, index))
    object.__setattr__(self, "integer", _static(self.integer, bool))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
  """The spans and waves of the heads of one layer; a pytree.

  The span weight of a distance d is m(d) = clip((R + z - d) / R, 0, 1)
  (Sukhbaatar et al. 2019, equation 3). With the wave weight w(d), or w = 1
  without waves, the pair is hidden where min(m, w) <= 1e-6, and otherwise
  log m + log w is added to its logit.

  Attributes:
    span: (H,) z in tokens: the span weight is one up to here.
    ramp: static; R in tokens: the span weight falls linearly from z to z + R.
    wave: the waves of the same heads, or None.

  Nothing is checked here, as spans may be traced: `attend` raises ValueError
  for shapes other than (H,) and for a ramp of 0 or less.
  """

  span: jax.Array
  ramp: float = dataclasses.field(default=32.0, metadata={"static": True})
  wave: Wave | None = None

  def __post_init__(self):
    object.__setattr__(self, "ramp", _static(self.ramp, float))


def _aligned(distance, *values_H):
  """Returns distances and values of heads that broadcast to (H, ...)."""
  d = jnp.asarray(distance, jnp.float32)
  arrays_H = [jnp.asarray(value_H, jnp.float32) for value_H in values_H]
  heads = max(array_H.ndim for array_H in arrays_H)
  return (
    d.reshape((1,) * heads + d.shape),
    *(array_H.reshape(array_H.shape + (1,) * d.ndim) for array_H in arrays_H),
  )


def _clip(x):
  """Returns clip(x, 0, 1) with slope one on all of [0, 1], as published."""
  return jnp.where(x < 0, 0.0, jnp.where(x > 1, 1.0, x))


def _periods(wave: Wave):
  """Returns P as an amplitude and P as a phase, whose gradients differ."""
  period_H = jnp.asarray(wave.period, jnp.float32)
  if not wave.integer:
    return period_H, period_H
  rounded_H = jax.lax.stop_gradient(jnp.round(period_H))
  # The difference of equal numbers is an exact zero with a gradient of one.
  return rounded_H + (period_H - jax.lax.stop_gradient(period_H)), rounded_H


def span_weight(
  distance: ArrayLike, span_H: ArrayLike, ramp: ArrayLike
) -> jax.Array:
  """Returns (H, ...) m(d) = clip((R + z - d) / R, 0, 1).

  Sukhbaatar et al. 2019, equation 3.
  """
  d, span = _aligned(distance, span_H)
  ramp = jnp.asarray(ramp, jnp.float32)
  return _clip((ramp + span - d) / ramp)


def triangle_wave(
  distance: ArrayLike, period_H: ArrayLike, harmonics: int | None = None
) -> jax.Array:
  """Returns (H, ...) tri(d) of period P, amplitude A = P / 4, crest at d = 0.

  Exact: tri(d) = A - |d - n P|, n P the nearest multiple; slope one per token.
  Series: tri(d) = A (8 / pi^2) sum over odd k <= K of cos(2 pi k d / P) / k^2.
  """
  return _triangle(distance, period_H, period_H, harmonics)


def _from_nearest_multiple(d, period):
  """Returns d - n P for the nearest n: at most half a period either way.

  n P in float32 would lose the last digits where distances are large. So P is
  taken as a sum of two parts. The first has 11 bits, and n times it is exact up
  to n = 8192. d / P may round to the wrong side of a trough, so the rest is
  reduced once more.
  """
  n = jax.lax.stop_gradient(jnp.round(d / period))
  coarse = jax.lax.stop_gradient(jax.lax.reduce_precision(period, 8, 10))
  rest = (d - n * coarse) - n * (period - coarse)
  return rest - period * jax.lax.stop_gradient(jnp.round(rest / period))


def rounded_period(wave: Wave) -> jax.Array:
  """Returns (H,) P in tokens, rounded if it is an integer."""
  return _periods(wave)[1]


def phase(x: ArrayLike, wave: Wave) -> jax.Array:
  """Returns (H, ...) x less the nearest multiple of P, in tokens.

  The phase of a distance is the difference between the phases of its two ends.
  Where that is beyond half a period, P is added or taken off.
  """
  positions, period = _aligned(x, rounded_period(wave))
  return _from_nearest_multiple(positions, period)


def _triangle(distance, amplitude_period_H, phase_period_H, harmonics):
  """Returns `triangle_wave` of periods whose gradients differ."""
  d, amplitude, period = _aligned(distance, amplitude_period_H, phase_period_H)
  amplitude = amplitude / 4
  rest = _from_nearest_multiple(d, period)
  if harmonics is None:
    return amplitude - jnp.abs(rest)
  series = sum(
    jnp.cos(2 * jnp.pi * k * rest / period) / k**2
    for k in range(1, harmonics + 1, 2)
  )
  return amplitude * (8 / jnp.pi**2) * series


def wave_weight(distance: ArrayLike, wave: Wave) -> jax.Array:
  """Returns (H, ...) w(d) = clip(tri(d) + 1/2 + P r, 0, 1)."""
  amplitude_period_H, phase_period_H = _periods(wave)
  offset_H = amplitude_period_H * jnp.asarray(wave.ratio, jnp.float32)
  tri = _triangle(distance, amplitude_period_H, phase_period_H, wave.harmonics)
  _, offset = _aligned(distance, offset_H)
  return _clip(tri + 0.5 + offset)


def _weights(mask: Mask, distance):
  """Returns (m, w or None, whether the pair is open), each (H, ...)."""
  span = span_weight(distance, mask.span, mask.ramp)
  wave = None if mask.wave is None else wave_weight(distance, mask.wave)
  lowest = span if wave is None else jnp.minimum(span, wave)
  return span, wave, lowest > HIDDEN


@jax.jit  # the host counts with it, for which one program is compiled, not 30
def is_open(mask: Mask, distance: ArrayLike) -> jax.Array:
  """Returns (H, ...) whether a pair is open: min(m(d), w(d)) > 1e-6."""
  return _weights(mask, distance)[2]


def log_weight(mask: Mask, distance: ArrayLike) -> jax.Array:
  """Returns (H, ...) log m(d) + log w(d), which is added to the logits.

  It is -inf, without a gradient, where the pair is hidden.
  """
  span, wave, is_open = _weights(mask, distance)
  # One inside the logarithm where it is not used: 0 * inf would be nan there.
  log = jnp.log(jnp.where(is_open, span, 1.0))
  if wave is not None:
    log += jnp.log(jnp.where(is_open, wave, 1.0))
  return jnp.where(is_open, log, -jnp.inf)


def open_share(mask: Mask, length: int) -> jax.Array:
  """Returns (H,) the open share of the distances 0, 1, ..., length - 1."""
  open_HS = is_open(mask, jnp.arange(length))
  return jnp.mean(open_HS, axis=-1, dtype=jnp.float32)


def open_fraction(wave: Wave) -> jax.Array:
  """Returns (H,) f, the open share u of a continuous period, continued past 1.

  f = u if u < 1 else 1 + (1/2 + P r - A), with u = 1/P + 2 r + 1/2. It is the
  wave's factor in `penalty` and no count of distances: see `open_share`.
  """
  period_H, _ = _periods(wave)
  ratio_H = jnp.asarray(wave.ratio, jnp.float32)
  share_H = 1 / period_H + 2 * ratio_H + 0.5
  beyond_H = 1 + (0.5 + period_H * ratio_H - period_H / 4)
  return jnp.where(share_H < 1, share_H, beyond_H)


def penalty(mask: Mask) -> jax.Array:
  """Returns the penalty of one layer's spans and waves, in tokens.

  It is mean_h[(z + R) f] with the wave, f of `open_fraction`, and mean_h[z]
  without one (the latter as in Sukhbaatar et al. 2019, section 2.2).
  """
  span_H = jnp.asarray(mask.span, jnp.float32)
  if mask.wave is None:
    return jnp.mean(span_H)
  ramp = jnp.asarray(mask.ramp, jnp.float32)
  return jnp.mean((span_H + ramp) * open_fraction(mask.wave))
