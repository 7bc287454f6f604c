"""The bounds between which the heads of a layer learn spans and waves."""

import dataclasses
import math
from typing import Any, NamedTuple

LEAST_RAMP = 1e-6  # tokens; gradients to spans grow as its inverse
MOST_HARMONICS = 255  # each is a cosine of its own in the compiled program


def require(
  settings: Any, name: str, condition: bool, expected: str, value: Any = None
) -> None:
  """Raises ValueError, naming a field, where its value is not possible.

  Args:
    value: what a field that is None stands for.
  """
  if not condition:
    value = getattr(settings, name) if value is None else value
    raise ValueError(f"{name}={value!r} is not possible; expected {expected}")


@dataclasses.dataclass(frozen=True)
class WaveBounds:
  """Bounds of the waves that the heads of a layer can learn.

  A head's period is P = P_min + (P_max - P_min) sigmoid(period_logit), its
  ratio r = r_min + (r_max - r_min) sigmoid(ratio_logit); the logits (H,) are
  parameters of the layer. This is the form of the published program, whose
  r_min and r_max are the defaults. See `Wave` for the wave of P and r.

  Attributes:
    period_min, period_max: P_min and P_max in tokens, from 1 to 2^31.
    ratio_min, ratio_max: r_min in [-1/4, 0) and r_max in (0, 1/2], shares of
      the period. At r_max = 1/2 a wave can open fully.
    harmonics: the highest harmonic of the wave's series, up to 255, or None for
      the exact wave.
    integer: whether periods are rounded. Then a wave is a stride, and the pairs
      that it hides can be skipped in whole blocks.

  Raises:
    ValueError: a bound out of these, or a P_max that is not above P_min.
  """

  period_min: float = 2.0
  period_max: float = 8.0
  ratio_min: float = -0.25
  ratio_max: float = 0.25
  harmonics: int | None = None
  integer: bool = False

  def __post_init__(self) -> None:
    require(
      self,
      "period_min",
      1 <= self.period_min < math.inf,
      "a period of at least 1 token",
    )
    require(
      self,
      "period_max",
      self.period_min < self.period_max <= 2**31,
      f"more than period_min={self.period_min}, up to {2**31}",
    )
    require(
      self,
      "ratio_min",
      -0.25 <= self.ratio_min < 0,
      "-0.25 up to less than 0, so that a query can attend to itself",
    )
    require(
      self, "ratio_max", 0 < self.ratio_max <= 0.5, "more than 0, up to 0.5"
    )
    require(
      self,
      "harmonics",
      self.harmonics is None or 1 <= self.harmonics <= MOST_HARMONICS,
      f"from 1 to {MOST_HARMONICS}, or None for the exact wave",
    )


class MaskBounds(NamedTuple):
  """The bounds that turn the parameters of a layer into masks.

  Attributes:
    num_heads: H.
    max_span: the longest span in tokens, or None where no span is learned.
    ramp: R in tokens.
    wave: the bounds of the waves, or None where there are none.
    span_coef: nats per token of the penalty.
    causal_span: the span of every head where none is learned, in tokens.
  """

  num_heads: int
  max_span: float | None
  ramp: float
  wave: WaveBounds | None
  span_coef: float
  causal_span: float = math.inf
