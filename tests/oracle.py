"""The oracle: all formulas in float64 and explicit loops, with no code of ours.

Lengths are in tokens; d = t - s >= 0 is the distance from a query at position
t back to a key at s. A head has a span z, and with a wave a period P and a
ratio r. Gradients are written out by hand; `finite_difference` checks them.
"""

import math
from typing import NamedTuple

import numpy as np

HIDDEN = 1e-6


class Mask(NamedTuple):
  """One mask of H heads; `integer` rounds the periods. All float64 inside."""

  span: tuple
  ramp: float
  period: tuple | None = None
  ratio: tuple | None = None
  harmonics: int | None = None
  integer: bool = False

  def head(self, h):
    """Returns (z, P as a phase, P as an amplitude, r) of head h."""
    if self.period is None:
      return float(self.span[h]), None, None, None
    period = float(self.period[h])
    if self.integer:
      period = float(round(period))
    return float(self.span[h]), period, period, float(self.ratio[h])


def clip(x):
  return min(max(x, 0.0), 1.0)


def clip_slope(x):
  """Returns the slope of `clip`: one on all of [0, 1], both ends included."""
  return 1.0 if 0.0 <= x <= 1.0 else 0.0


def span_weight(d, span, ramp):
  """m(d) = clip((R + z - d) / R, 0, 1)."""
  return clip((ramp + span - d) / ramp)


def nearest_multiple(d, period):
  """Returns the integer n whose multiple n P is nearest to d."""
  below = math.floor(d / period)
  return min((below, below + 1), key=lambda n: abs(d - n * period))


def unit_wave(d, period, harmonics):
  """tri(d) / A of the series: 8/pi^2 sum over odd k of cos(2 pi k d/P)/k^2."""
  total = 0.0
  for k in range(1, harmonics + 1, 2):
    total += math.cos(2 * math.pi * k * (d / period)) / k**2
  return 8 / math.pi**2 * total


def triangle(d, period, harmonics, height_period=None):
  """Returns tri(d). Its amplitude A = P/4 is of `height_period`, if given."""
  height = (period if height_period is None else height_period) / 4
  if harmonics is None:
    n = nearest_multiple(d, period)
    return height - abs(d - n * period)
  return height * unit_wave(d, period, harmonics)


def unclipped_wave(d, period, height_period, ratio, harmonics):
  """Returns tri(d) + 1/2 + P r, the wave before it is clipped."""
  tri = triangle(d, period, harmonics, height_period)
  return tri + 0.5 + height_period * ratio


def wave_weight(d, period, ratio, harmonics):
  """w(d) = clip(tri(d) + 1/2 + P r, 0, 1)."""
  return clip(unclipped_wave(d, period, period, ratio, harmonics))


def wave_slopes(d, period, ratio, harmonics, integer):
  """Returns (dw/dP, dw/dr); dw/dP of an integer period leaves out the phase."""
  slope = clip_slope(unclipped_wave(d, period, period, ratio, harmonics))
  if harmonics is None:
    n = nearest_multiple(d, period)
    by_height = 0.25
    by_phase = n * np.sign(d - n * period)
  else:
    by_height = unit_wave(d, period, harmonics) / 4
    by_phase = 0.0
    for k in range(1, harmonics + 1, 2):
      angle = 2 * math.pi * k * (d / period)
      by_phase += math.sin(angle) * angle / period / k**2
    by_phase *= period / 4 * 8 / math.pi**2
  by_period = by_height + ratio + (0.0 if integer else by_phase)
  return slope * by_period, slope * period


def weights(mask, h, d):
  """Returns (m, w) of head h at distance d."""
  span, period, _, ratio = mask.head(h)
  w = 1.0
  if period is not None:
    w = wave_weight(d, period, ratio, mask.harmonics)
  return span_weight(d, span, mask.ramp), w


def is_open(mask, h, d):
  """Returns whether distance d is open in head h: min(m, w) > 1e-6."""
  return min(weights(mask, h, d)) > HIDDEN


def log_weight(mask, h, d):
  """Returns log m + log w where the pair is open, else -inf."""
  m, w = weights(mask, h, d)
  return math.log(m) + math.log(w) if min(m, w) > HIDDEN else -math.inf


def log_weight_slopes(mask, h, d):
  """Returns the slopes of log m + log w by (z, P, r); zero where hidden."""
  if not is_open(mask, h, d):
    return 0.0, 0.0, 0.0
  span, period, _, ratio = mask.head(h)
  m, w = weights(mask, h, d)
  by_span = clip_slope((mask.ramp + span - d) / mask.ramp) / mask.ramp / m
  if period is None:
    return by_span, 0.0, 0.0
  by_period, by_ratio = wave_slopes(
    d, period, ratio, mask.harmonics, mask.integer
  )
  return by_span, by_period / w, by_ratio / w


def open_share(mask, h, length):
  """Returns the share of the distances 0 .. length - 1 that are open."""
  return sum(is_open(mask, h, d) for d in range(length)) / length


def open_fraction(period, ratio):
  """f = u if u < 1 else 1 + (1/2 + P r - A), u = 1/P + 2 r + 1/2."""
  u = 1 / period + 2 * ratio + 0.5
  return u if u < 1 else 1 + (0.5 + period * ratio - period / 4)


def open_fraction_slopes(period, ratio):
  """(df/dP, df/dr)."""
  if 1 / period + 2 * ratio + 0.5 < 1:
    return -1 / period**2, 2.0
  return ratio - 0.25, period


def penalty(mask):
  """Returns the mean over heads of (z + R) f with a wave, of z without."""
  total = 0.0
  for h in range(len(mask.span)):
    span, period, _, ratio = mask.head(h)
    if period is None:
      total += span
    else:
      total += (span + mask.ramp) * open_fraction(period, ratio)
  return total / len(mask.span)


def penalty_slopes(mask):
  """Returns (H, 3) the slopes of the penalty by z, P and r of every head."""
  heads = len(mask.span)
  slopes = np.zeros((heads, 3))
  for h in range(heads):
    span, period, _, ratio = mask.head(h)
    if period is None:
      slopes[h, 0] = 1 / heads
    else:
      by_period, by_ratio = open_fraction_slopes(period, ratio)
      length = span + mask.ramp
      slopes[h, 0] = open_fraction(period, ratio) / heads
      slopes[h, 1] = length * by_period / heads
      slopes[h, 2] = length * by_ratio / heads
  return slopes


def tie_margin(mask, distances):
  """Returns how near the distances come to a jump of a slope, in tokens.

  Slopes jump at both ends of both clips, and at the troughs and crests of the
  exact wave where they are not clipped. Within rounding of a jump two correct
  programs may give different slopes.
  """
  margin = math.inf
  for h in range(len(mask.span)):
    span, period, _, ratio = mask.head(h)
    for d in distances:
      margin = min(margin, abs(span - d), abs(mask.ramp + span - d))
      if period is None or span_weight(d, span, mask.ramp) == 0:
        continue
      raw = unclipped_wave(d, period, period, ratio, mask.harmonics)
      margin = min(margin, abs(raw), abs(1 - raw))
      n = nearest_multiple(d, period)
      if mask.harmonics is None and n > 0 and 0 < raw < 1:
        gap = abs(d - n * period)
        margin = min(margin, gap, period / 2 - gap)
  return margin


class Attention(NamedTuple):
  """The value, the gradients of sum(out * dout), and what they are made of.

  `scale` holds by name what rounding is measured against. The absolute values
  of the terms are summed within one query's row. The rows are then added in
  squares, since they round independently. Zero means that there is no term at
  all.
  """

  out: np.ndarray
  dq: np.ndarray
  dk: np.ndarray
  dv: np.ndarray
  dspan: np.ndarray
  dperiod: np.ndarray
  dratio: np.ndarray
  drelative: np.ndarray
  scale: dict


def attention(
  q_BTHK,
  k_BSHK,
  v_BSHK,
  mask,
  dout_BTHK,
  memory=0,
  first_key=0,
  keep=None,
  relative_RK=None,
  alike_BTS=None,
):
  """Returns attention, computed row by row, and its gradients.

  Query t stands at key index S - T + t. `mask` None is plain causal
  attention. `keep` is the pair (kept_BHTS of bool, rate): the softmax weights
  that survive, divided by 1 - rate. The first `memory` keys get no gradient.
  A row without an open key is zero and has no gradient. `relative_RK` holds
  a vector p for each distance, zero beyond the last: the score is q.(k + p).
  `alike_BTS` says which pairs are hidden from nobody by segments or padding.
  Each head of k and v serves as many heads of q, one after the other.
  """
  q, k, v, dout = (
    np.asarray(x, np.float64) for x in (q_BTHK, k_BSHK, v_BSHK, dout_BTHK)
  )
  (B, T, H, K), (_, S, G, _) = q.shape, k.shape
  log_HS = np.zeros((H, S))
  slopes_HS3 = np.zeros((H, S, 3))
  if mask is not None:
    for h in range(H):
      for d in range(S):
        log_HS[h, d] = log_weight(mask, h, d)
        slopes_HS3[h, d] = log_weight_slopes(mask, h, d)
  R = 0 if relative_RK is None else len(relative_RK)
  p_SK = np.zeros((S, K))
  if R:
    p_SK[:R] = np.asarray(relative_RK, np.float64)[:S]
  out, dq, dk, dv, dp_SK = (np.zeros_like(x) for x in (q, q, k, v, p_SK))
  dmask_H3 = np.zeros((H, 3))
  squares = [np.zeros_like(x) for x in (q, q, k, v, dp_SK, dmask_H3)]
  for b in range(B):
    for h in range(H):
      for t in range(T):
        position = S - T + t
        keys = np.arange(first_key, position + 1)
        keys = keys[np.isfinite(log_HS[h, position - keys])]
        if alike_BTS is not None:
          keys = keys[alike_BTS[b, t, keys]]
        if not keys.size:
          continue
        slopes = slopes_HS3[h, position - keys]
        g = h * G // H
        rows_k = k[b, keys, g] + p_SK[position - keys]
        rows_v = v[b, keys, g]
        logits = rows_k @ q[b, t, h] / math.sqrt(K)
        logits += log_HS[h, position - keys]
        p = np.exp(logits - logits.max())
        p /= p.sum()
        kept = np.ones(len(keys))
        if keep is not None:
          kept = keep[0][b, h, t, keys] / (1 - keep[1])
        d = dout[b, t, h]
        out[b, t, h] = (kept * p) @ rows_v
        dp = kept * (rows_v @ d)
        dlogits = p * (dp - p @ dp)
        dq[b, t, h] = dlogits @ rows_k / math.sqrt(K)
        dk[b, keys, g] += np.outer(dlogits, q[b, t, h]) / math.sqrt(K)
        dv[b, keys, g] += np.outer(kept * p, d)
        dp_SK[position - keys] += np.outer(dlogits, q[b, t, h]) / math.sqrt(K)
        dmask_H3[h] += dlogits @ slopes

        dp = kept * (np.abs(rows_v) @ np.abs(d))
        size = p * (dp + p @ dp)
        squares[0][b, t, h] = ((kept * p) @ np.abs(rows_v)) ** 2
        squares[1][b, t, h] = (size @ np.abs(rows_k)) ** 2 / K
        squares[2][b, keys, g] += np.outer(size, q[b, t, h]) ** 2 / K
        squares[3][b, keys, g] += np.outer(kept * p, d) ** 2
        squares[4][position - keys] += np.outer(size, q[b, t, h]) ** 2 / K
        squares[5][h] += (size @ np.abs(slopes)) ** 2
  for of_keys in (dk, dv, squares[2], squares[3]):
    of_keys[:, :memory] = 0
  *of_arrays, of_p, of_masks = (np.sqrt(x) for x in squares)
  dp_RK, of_p_RK = np.zeros((2, R, K))
  dp_RK[:S], of_p_RK[:S] = dp_SK[:R], of_p[:R]
  scale = dict(zip(Attention._fields, (*of_arrays, *of_masks.T, of_p_RK)))
  return Attention(out, dq, dk, dv, *dmask_H3.T, dp_RK, scale)


def _mix(x):
  """Returns lowbias32(x), in uint64 arithmetic with the upper half cut off."""
  word = np.uint64(0xFFFFFFFF)
  x = x ^ (x >> np.uint64(16))
  x = (x * np.uint64(0x7FEB352D)) & word
  x = x ^ (x >> np.uint64(15))
  x = (x * np.uint64(0x846CA68B)) & word
  return x ^ (x >> np.uint64(16))


def dropout_keep(seed, shape_BHTS, rate):
  """Returns (B, H, T, S) which weights dropout leaves, by a hash of indices.

  row = mix(mix(mix(mix(seed) + b) + h) + t)
  keep = mix(row + (s - (S - T)) 0x9e3779b9) >= floor(rate 2^32)

  All arithmetic is modulo 2^32.
  """
  word = np.uint64(0xFFFFFFFF)
  _, _, T, S = shape_BHTS
  b, h, t, s = np.indices(shape_BHTS, dtype=np.uint64, sparse=True)
  row = np.uint64(seed) & word
  for index in (b, h, t):
    row = (_mix(row) + index) & word
  x = (s + np.uint64(2**32 - (S - T))) & word
  bits = _mix((_mix(row) + x * np.uint64(0x9E3779B9)) & word)
  return bits >= np.uint64(math.floor(rate * 2**32))


def finite_difference(function, x, step=1e-6):
  """Returns central differences of a scalar function by every entry of x."""
  x = np.asarray(x, np.float64)
  slopes = np.zeros_like(x)
  for index in np.ndindex(x.shape):
    above, below = x.copy(), x.copy()
    above[index] += step
    below[index] -= step
    slopes[index] = (function(above) - function(below)) / (2 * step)
  return slopes
