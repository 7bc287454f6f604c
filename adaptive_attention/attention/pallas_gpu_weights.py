"""The masks' weights of the pairs of a block on a GPU, and slopes by lengths.

To read a number for each pair costs more than to compute a span's or an exact
wave's weight, as a block of pairs takes as many addresses. So only a series,
and a wave of float32, are read from a table by distance. What is computed is a
factor of the exponentials, as logarithms cost as much as the rest.

A class has two sides. `arrays` makes what all programs read, outside of the
kernels. An object is made inside of one, of a program's part of these arrays.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from adaptive_attention import masks
from adaptive_attention.attention.pallas_attend import (
  Inputs,
  Static,
  slopes_of,
  table_of,
)


class Pairs(NamedTuple):
  """The pairs of a block: queries and keys by their x, along its axes.

  Attributes:
    x_q, x_k: positions relative to the first query.
    exists: of keys.
    rho: the residue of all distances.
    is_full: static.
  """

  x_q: object
  x_k: object
  exists: object
  rho: object
  is_full: bool


def kind_of(mask, itemsize: int):
  """Returns the class that serves a mask.

  Args:
    itemsize: bytes of a number of q, k and v. A phase of float32 has an error
      of 1e-7 of a period, which only bfloat16 hides.
  """
  if mask.wave is None:
    return Spans
  if mask.wave.harmonics is None and itemsize == 2:
    return Waves
  return Tables


class Spans:
  """Of masks without a wave: m = clip((R + z - d) / R, 0, 1)."""

  @staticmethod
  def arrays(inputs: Inputs, static: Static, beyond: int, slopes: bool):
    """Returns what programs read, each (H, ...).

    Args:
      beyond: how far positions may go past those that exist, at either end.
      slopes: whether slopes are asked for.
    """
    del static, beyond, slopes
    return [_lengths(inputs)]

  def __init__(self, static: Static, mask, beyond, refs, h):
    """Takes what a program reads.

    Args:
      mask: whose static fields are read.
      beyond: as above.
      refs: of the arrays.
      h: the program's head.
    """
    del static, beyond
    # A number of Python's, as a kernel holds no arrays.
    self.ramp, self.lengths, self.h = float(mask.ramp), refs[0], h

  def weigh(self, scores, pairs: Pairs):
    """Returns (logits in units of log 2, a factor of their exponentials).

    Logits are -inf where pairs are hidden.
    """
    share, is_open, _ = self._span(pairs)
    return jnp.where(is_open, scores, -jnp.inf), share

  def slopes(self, pairs: Pairs):
    """Returns the slopes of the natural log weights by each length.

    They are finite where a pair is hidden, whose gradients are zero.
    """
    share, is_open, left = self._span(pairs)
    return (self._span_slope(share, is_open, left),)

  def _span(self, pairs):
    """Returns (m, whether a pair is open, R + z - d)."""
    x_k = jnp.where(pairs.exists, pairs.x_k.astype(jnp.float32), _NEVER)
    x_q = pairs.x_q.astype(jnp.float32)
    # The distance is exact, whatever the positions and the span. It is not
    # compared, for which registers would keep it.
    left = (self.ramp + self.lengths[self.h, 0]) - (x_q - x_k)
    is_open = (left > masks.HIDDEN * self.ramp) & (x_q >= x_k)
    share = jnp.minimum(left * (1 / self.ramp), 1.0)
    return share, is_open, left

  def _span_slope(self, share, is_open, left):
    return jnp.where(is_open & (left <= self.ramp), 1 / left, 0.0)


_NEVER = 1e9  # the x of a key that does not exist, as no query comes after it


class Waves(Spans):
  """Of masks with an exact wave: w = clip(P / 4 - |rest| + 1/2 + P r, 0, 1).

  `rest` is the distance from the nearest multiple of P: a difference of the
  phases of a query and a key, less P if these are on both sides of one.
  """

  @staticmethod
  def arrays(inputs, static, beyond, slopes):
    del slopes
    ends = -static.older - beyond, static.T + beyond
    x = jnp.arange(*ends, dtype=jnp.int32)
    return [_lengths(inputs), masks.phase(x, inputs.mask.wave)]

  def __init__(self, static, mask, beyond, refs, h):
    super().__init__(static, mask, beyond, refs[:1], h)
    self.integer, self.phases = mask.wave.integer, refs[1]
    self.lead = static.older + beyond

  def weigh(self, scores, pairs):
    share, is_open, _ = self._span(pairs)
    wave = self._wave(self._rest(pairs))
    is_open &= wave > masks.HIDDEN
    logits = jnp.where(is_open, scores, -jnp.inf)
    return logits, share * jnp.minimum(wave, 1.0)

  def slopes(self, pairs):
    share, is_open, left = self._span(pairs)
    wave = self._wave(self._rest(pairs))
    is_open &= wave > masks.HIDDEN
    distance = (pairs.x_q - pairs.x_k).astype(jnp.float32)
    return (
      self._span_slope(share, is_open, left),
      *self._wave_slopes(wave, is_open, distance),
    )

  def log2_of_residue(self, rho):
    """Returns log2 of the weight of a full block, which is in its span."""
    wave = self._wave(self._rest_of(rho))
    return jnp.log2(jnp.minimum(wave, 1.0))

  def slopes_of_residue(self, rho):
    """Returns the slopes in such a block."""
    wave = self._wave(self._rest_of(rho))
    return 0.0, *self._wave_slopes(wave, wave > masks.HIDDEN, None)

  def _rest(self, pairs):
    """Returns |rest| of the distances."""
    phase_q, phase_k = (
      plgpu.load(self.phases.at[jnp.full_like(x, self.h), self.lead + x])
      for x in (pairs.x_q, pairs.x_k)
    )
    apart = jnp.abs(phase_q - phase_k)
    return jnp.minimum(apart, jnp.abs(apart - self._period))

  def _rest_of(self, rho):
    return jnp.abs(self.phases[self.h, self.lead + rho])

  @property
  def _period(self):
    """P, rounded if it is an integer."""
    return self.lengths[self.h, 1]

  def _wave(self, rest):
    """Returns the weight before it is cut off at 0 and 1."""
    P, r = self._period, self.lengths[self.h, 2]
    return (0.25 * P + (0.5 + P * r)) - rest

  def _wave_slopes(self, wave, is_open, distance):
    """Returns the slopes by P and r."""
    P, r = self._period, self.lengths[self.h, 2]
    by_P = 0.25 + r
    if not self.integer:
      n = jnp.floor(distance * (1 / P) + 0.5)
      # The sign of the rest, and zero for zero.
      sign = jnp.minimum(jnp.maximum((distance - n * P) * 1e30, -1.0), 1.0)
      by_P = by_P + n * sign
    one = jnp.where(is_open & (wave <= 1.0), 1 / wave, 0.0)
    return by_P * one, P * one


class Tables:
  """Of any mask: read by distance."""

  @staticmethod
  def arrays(inputs, static, beyond, slopes):
    distance_L = jnp.arange(-beyond, static.S + beyond, dtype=jnp.int32)
    heads = len(inputs.head_H), len(distance_L)
    distance_HL = jnp.broadcast_to(distance_L, heads)
    lines = [table_of(inputs, distance_HL, static.S)]
    if slopes:
      lines += slopes_of(inputs, distance_HL, static.S)
    return [jnp.stack(lines, axis=1)]

  def __init__(self, static, mask, beyond, refs, h):
    del static, mask
    self.table, self.lead, self.h = refs[0], beyond, h

  def weigh(self, scores, pairs):
    bias = self._entries(0, pairs)
    return scores + (bias + jnp.where(pairs.exists, 0.0, -jnp.inf)), 1.0

  def slopes(self, pairs):
    lines = range(1, self.table.shape[1])
    return tuple(self._entries(line, pairs) for line in lines)

  def log2_of_residue(self, rho):
    return self.table[self.h, 0, self.lead + rho]

  def slopes_of_residue(self, rho):
    lines = range(1, self.table.shape[1])
    return tuple(self.table[self.h, line, self.lead + rho] for line in lines)

  def _entries(self, line, pairs):
    at = self.lead + pairs.x_q - pairs.x_k
    h, line = (jnp.full_like(at, x) for x in (self.h, line))
    return plgpu.load(self.table.at[h, line, at])


def _lengths(inputs):
  """Returns (H, G) what is learned of the masks; P rounded as it acts."""
  mask = inputs.mask
  leaves = [mask.span]
  if mask.wave is not None:
    leaves += [masks.rounded_period(mask.wave), mask.wave.ratio]
  return jnp.stack(leaves, axis=-1).astype(jnp.float32)
