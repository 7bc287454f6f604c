"""Turns logits into lengths and back; only here do masks meet parameters.

A length x between two bounds is low + (high - low) * sigmoid(logit); its logit
is log(share / (1 - share)) with share = (x - low) / (high - low).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_attention import masks, parameters
from adaptive_attention.config import ModelConfig
from adaptive_attention.mask_bounds import MaskBounds, WaveBounds
from adaptive_attention.parameters import MASK_PARAMETERS

_EDGE = 1e-7  # of a share: at 0 and 1 there is no finite logit


class HasMasks(Protocol):
  """A layer or a `ModelConfig`: what has bounds for its masks."""

  @property
  def mask_bounds(self) -> MaskBounds: ...


def to_length(logit: jax.Array, low: float, high: float) -> jax.Array:
  """Returns low + (high - low) * sigmoid(logit), in the units of the bounds."""
  return low + (high - low) * jax.nn.sigmoid(logit)


def to_logit(length: Any, low: float, high: float) -> np.ndarray:
  """Returns the float32 logit of a length, the inverse of `to_length`.

  It is computed in float64 on the host. A length at a bound or beyond it gets
  the logit of a length just inside the bound.
  """
  share = (np.asarray(length, np.float64) - low) / (high - low)
  return _logit(np.clip(share, _EDGE, 1 - _EDGE))


def _logit(share: Any) -> np.ndarray:
  return np.log(share / (1 - share)).astype(np.float32)


def _bounds_of(name: str, bounds: MaskBounds) -> tuple[float, float]:
  """Returns (low, high), the bounds of the length of a mask parameter."""
  wave = bounds.wave or WaveBounds()
  match name:
    case "span_logit":
      return 0.0, bounds.max_span or 0.0
    case "period_logit":
      return wave.period_min, wave.period_max
    case "ratio_logit":
      return wave.ratio_min, wave.ratio_max
  raise ValueError(
    f"{name!r} is not a mask parameter; expected one of {MASK_PARAMETERS}"
  )


def parameter_names(bounds: MaskBounds) -> tuple[str, ...]:
  """Returns the names of the mask parameters that a layer has."""
  if bounds.max_span is None:
    return ()
  return MASK_PARAMETERS if bounds.wave else MASK_PARAMETERS[:1]


def initializer(
  name: str, span_init: float, bounds: MaskBounds
) -> Callable[..., jax.Array]:
  """Returns the Flax initializer of a mask parameter.

  Spans begin at the share `span_init` of the longest one, periods uniformly
  between their bounds, and ratios at zero wherever that lies between theirs.
  """
  if name == "period_logit":
    # The logit of a uniform share has the logistic distribution.
    return jax.random.logistic
  share = span_init
  if name == "ratio_logit":
    low, high = _bounds_of(name, bounds)
    share = -low / (high - low)
  return jax.nn.initializers.constant(_logit(np.float64(share)))


def open_logits(bounds: MaskBounds, tokens: int) -> dict[str, np.ndarray]:
  """Returns mask parameters (H,) by name that hide nothing, m = w = 1.

  Spans end half a token after the last distance, so that the penalty moves them
  and soon the loss as well. Periods lie evenly between their bounds.

  Args:
    bounds: of the layer.
    tokens: the distances 0 .. tokens - 1 are open.

  Raises:
    ValueError: no length between the bounds opens so much.
  """
  lengths = {"span_logit": np.full(bounds.num_heads, tokens - 0.5)}
  if bounds.max_span is None or bounds.max_span < tokens:
    raise ValueError(
      f"max_span={bounds.max_span} leaves no span open over {tokens} tokens; "
      f"give at least {tokens}, or {2 * tokens} for spans that move readily"
    )
  if bounds.wave:
    wave = bounds.wave
    share_H = (np.arange(bounds.num_heads) + 0.5) / bounds.num_heads
    period_H = wave.period_min + (wave.period_max - wave.period_min) * share_H
    # At a trough w = 1/2 + P r - P/4, and at least that in a series.
    lowest_H = np.round(period_H) if wave.integer else period_H
    ratio_H = 0.25 + 0.501 / lowest_H
    if ratio_H.max() >= wave.ratio_max:
      raise ValueError(
        f"ratio_max={wave.ratio_max} opens no wave of the period "
        f"{period_H.min():g} fully; give ratio_max=0.5, and a period_min of "
        "more than 2 where that is not enough"
      )
    lengths |= {"period_logit": period_H, "ratio_logit": ratio_H}
  return {
    name: to_logit(length_H, *_bounds_of(name, bounds))
    for name, length_H in lengths.items()
  }


def mask_from_logits(
  logits: Mapping[str, jax.Array], bounds: MaskBounds
) -> masks.Mask:
  """Returns the mask of one layer from its own parameters, given by name."""
  lengths = {
    name: to_length(logits[name], *_bounds_of(name, bounds))
    for name in parameter_names(bounds)
  }
  wave = None
  if bounds.wave:
    wave = masks.Wave(
      lengths["period_logit"],
      lengths["ratio_logit"],
      bounds.wave.harmonics,
      bounds.wave.integer,
    )
  return masks.Mask(lengths["span_logit"], bounds.ramp, wave)


def mask_params(
  params: Mapping, layer_or_config: HasMasks
) -> tuple[masks.Mask, ...]:
  """Returns one Mask per attention layer, first to last, from parameters alone.

  z = max_span sigmoid(span_logit)  (Sukhbaatar et al. 2019, section 2.2)
  P = P_min + (P_max - P_min) sigmoid(period_logit)
  r = r_min + (r_max - r_min) sigmoid(ratio_logit)

  Logits and lengths are (H,), z and P in tokens, r a share of P. The tree may
  be that of any model that holds `AdaptiveSelfAttention` layers, apart or
  stacked by `nn.scan`. Their order is that of `parameters.attention_layers`.
  Where no span is learned, all spans are the context and memory of a
  ModelConfig, or infinite for a layer by itself.

  Args:
    params: the tree of parameters.
    layer_or_config: the ModelConfig, or an `AdaptiveSelfAttention` whose fields
      are those of all layers.

  Raises:
    ValueError: no such layer exists, or one lacks a parameter or has it in
      another shape than (H,).
  """
  bounds = layer_or_config.mask_bounds
  dense = bounds.max_span is None
  layers = parameters.attention_layers(params, dense)
  if not layers:
    kind = "without spans" if dense else "with spans"
    raise ValueError(
      f"the parameters hold no attention layer {kind}; give those of a model "
      "that has AdaptiveSelfAttention layers of these settings"
    )
  if dense:
    span_H = jnp.full(bounds.num_heads, bounds.causal_span)
    return tuple(masks.Mask(span_H, bounds.ramp) for _ in layers)
  for path, layer in layers:
    _check_layer(path, layer, bounds)
  return tuple(mask_from_logits(layer, bounds) for _, layer in layers)


def _check_layer(
  path: str, layer: Mapping[str, jax.Array], bounds: MaskBounds
) -> None:
  for name in parameter_names(bounds):
    shape = jnp.shape(layer[name]) if name in layer else None
    if shape != (bounds.num_heads,):
      raise ValueError(
        f"the attention layer {path!r} has {name} of the shape {shape}; "
        f"expected ({bounds.num_heads},), one for each head, after the axes "
        "that stack layers; give the settings that it was made with"
      )


def regularizer(params: Mapping, layer_or_config: HasMasks) -> jax.Array:
  """Returns the penalty of all layers in nats, a float32 scalar.

  It is span_coef sum over layers of mean_h[(z + R) f] with the wave, f the open
  share of `masks.open_fraction`, and span_coef sum over layers of mean_h[z]
  without (Sukhbaatar et al. 2019, section 2.2). It is zero where no spans are
  learned. It depends on the parameters alone, and is added to the loss in
  training only.

  Args:
    params: the tree of parameters.
    layer_or_config: as in `mask_params`; `span_coef` is in nats per token.

  Raises:
    ValueError: no such layer exists, or one lacks a parameter or has it in
      another shape than (H,).
  """
  bounds = layer_or_config.mask_bounds
  layers = mask_params(params, layer_or_config)
  total = jnp.float32(0.0)
  if bounds.max_span is None:
    return total
  for mask in layers:
    total += masks.penalty(mask)
  return bounds.span_coef * total


def with_lengths(
  params: Any,
  layer_or_config: HasMasks,
  change: Callable[[str, np.ndarray], np.ndarray],
) -> Any:
  """Returns the parameters with other lengths of spans and waves.

  Args:
    params: the tree of parameters.
    layer_or_config: the layer or ModelConfig that the parameters belong to.
    change: (name of a mask parameter, its lengths in float64) -> new lengths,
      in tokens for spans and periods. A parameter whose lengths are returned as
      they were given stays the same to the bit.
  """
  bounds = layer_or_config.mask_bounds

  def of_leaf(path: Any, leaf: Any) -> Any:
    name = jax.tree_util.keystr(path[-1:], simple=True)
    if name not in parameter_names(bounds):
      return leaf
    low, high = _bounds_of(name, bounds)
    length = np.asarray(to_length(jnp.asarray(leaf), low, high), np.float64)
    changed = change(name, length)
    return leaf if changed is length else to_logit(changed, low, high)

  return jax.tree_util.tree_map_with_path(of_leaf, params)


def hardened(params: Any, config: ModelConfig) -> tuple[Any, ModelConfig]:
  """Returns (params, config) with spans of whole tokens and integer periods.

  A wave is then a stride, and generation does not read the keys that it hides.
  Ratios stay as they are.

  Args:
    params: the tree of parameters, concrete.
    config: the ModelConfig that they belong to.
  """

  def rounded(name: str, length: np.ndarray) -> np.ndarray:
    return length if name == "ratio_logit" else np.round(length)

  whole = with_lengths(params, config, rounded)
  if config.attention == "span_wave":
    config = dataclasses.replace(config, period="integer")
  return whole, config
