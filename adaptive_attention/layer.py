"""Self-attention whose heads learn spans and waves, as a Flax (linen) layer."""

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from adaptive_attention import masks, positions, state
from adaptive_attention.config import ModelConfig
from adaptive_attention.mask_bounds import (
  LEAST_RAMP,
  MaskBounds,
  WaveBounds,
  require,
)
from adaptive_attention.mask_parameters import (
  initializer,
  mask_from_logits,
  parameter_names,
)

Initializer = Callable[..., jax.Array]
_RELATIVE_INIT = nn.initializers.normal(0.02)
POSITIONS = (None, "rotary", "relative")


def flat_dot_general(
  x: jax.Array,
  kernel: jax.Array,
  dimension_numbers: Any,
  precision: Any = None,
  **options: Any,
) -> jax.Array:
  """Returns x_...D @ kernel_DF as one product of two matrices, for `nn.Dense`.

  The same product over more than one leading axis has a gradient of the kernel
  for which XLA's CPU backend transposes all activations, element by element.
  """
  y = jax.lax.dot_general(
    x.reshape(-1, x.shape[-1]),
    kernel,
    (((1,), (0,)), ((), ())),
    precision,
    **options,
  )
  return y.reshape(*x.shape[:-1], kernel.shape[-1])


def relative_vectors(module: nn.Module, distances: int, K: int) -> jax.Array:
  """Returns (R, K) a vector for each distance, a parameter of the module."""
  return module.param("relative", _RELATIVE_INIT, (distances, K), jnp.float32)


class AdaptiveSelfAttention(nn.Module):
  """Causal self-attention whose heads learn their spans and waves.

  y = out(attend(q, k, v, mask)), (q, k, v) = qkv(x). The mask of each head
  comes from the head's own parameters. See `attention.attend` and `masks` for
  the formulas, and Sukhbaatar et al. 2019, "Adaptive Attention Span in
  Transformers", for the span. Fields that
  `flax.linen.MultiHeadDotProductAttention` has too mean the same and have the
  same defaults.

  Attributes:
    num_heads: H.
    num_kv_heads: G, the heads of keys and values, each of which serves H / G
      heads (Ainslie et al. 2023, "GQA"); by default H.
    qkv_features: H K, the width of the queries of all heads; by default the
      last axis of the input. Keys and values have G K.
    out_features: the width of the output; by default the last axis of the
      input.
    dropout_rate: the share of attention weights to drop.
    deterministic: whether nothing is dropped; given here or at the call.
    dtype: the dtype of activations, float32 or bfloat16; by default that of
      inputs and parameters together. Masks and the softmax are always float32.
    param_dtype: the dtype of the linear layers' parameters; those of spans and
      waves are always float32.
    precision: the precision of the linear layers' products.
    kernel_init, out_kernel_init, bias_init: the initializers. `kernel_init`
      also serves the output's kernel if `out_kernel_init` is None.
    use_bias: whether the linear layers have biases.
    max_span: the longest span that a head can learn, in tokens. If it is None
      the heads learn no masks, and attend as far as `window_tokens` says.
    ramp: R, the soft end of a span, in tokens.
    span_init: the share of max_span that spans begin with.
    span_coef: nats per token of the penalty, for `regularizer`.
    wave: the bounds of the waves, or None for heads without waves.
    position: "rotary"; "relative", a vector for each distance, which is a
      parameter of the layer unless it is given to `extend`; or None.
    out_dropout_rate: the share of the output to drop.
    window_tokens: where `max_span` is None, the reach of all heads in tokens,
      the query itself included; None for all earlier tokens.
    implementation: as in `attention.attend`; None for the best that serves.

  Raises:
    ValueError: fields that are not possible or do not fit each other.
  """

  num_heads: int
  num_kv_heads: int | None = None
  qkv_features: int | None = None
  out_features: int | None = None
  dropout_rate: float = 0.0
  deterministic: bool | None = None
  dtype: Any = None
  param_dtype: Any = jnp.float32
  precision: Any = None
  kernel_init: Initializer = nn.linear.default_kernel_init
  out_kernel_init: Initializer | None = None
  bias_init: Initializer = nn.initializers.zeros_init()
  use_bias: bool = True
  max_span: float | None = None
  ramp: float = ModelConfig.ramp
  span_init: float = ModelConfig.span_init
  span_coef: float = ModelConfig.span_coef
  wave: WaveBounds | None = None
  position: str | None = None
  out_dropout_rate: float = 0.0
  window_tokens: int | None = None
  implementation: str | None = None

  @property
  def mask_bounds(self) -> MaskBounds:
    """The bounds that turn the parameters into masks."""
    return MaskBounds(
      self.num_heads, self.max_span, self.ramp, self.wave, self.span_coef
    )

  def __call__(
    self,
    x_BTD: jax.Array,
    *,
    deterministic: bool | None = None,
    segment_ids: jax.Array | None = None,
    key_mask: jax.Array | None = None,
  ) -> jax.Array:
    """Returns (B, T, out_features) y, where a token attends to none after it.

    Args:
      x_BTD: B sequences of T tokens.
      deterministic: whether nothing is dropped. Where a dropout rate is not
        zero, it must be given here or as the field; if it is False,
        `rngs={"dropout": key}` is needed.
      segment_ids: (B, T) integers; no token attends to one of another segment,
        as where sequences are packed.
      key_mask: (B, T), false for padding, to which no token attends.

    Raises:
      ValueError: fields that are not possible, arguments that do not fit them,
        or no word on `deterministic` where a dropout rate is not zero.
      NotImplementedError: a named implementation that cannot serve the call.
    """
    hidden = {"segment_ids": segment_ids, "key_mask": key_mask}
    hidden = {name: x for name, x in hidden.items() if x is not None}
    return self.extend(x_BTD, deterministic, hidden=hidden)[0]

  @nn.compact
  def extend(
    self,
    x_BTD: jax.Array,
    deterministic: bool | None = None,
    layer_state: state.LayerState | None = None,
    tokens_read: state.TokensRead = 0,
    position: jax.Array | None = None,
    relative_RK: jax.Array | None = None,
    hidden: Mapping[str, Any] = MappingProxyType({}),
  ) -> tuple[jax.Array, state.LayerState | None]:
    """Returns (y_BTD, the state with these tokens) of the next T tokens.

    Args:
      layer_state: the layer's part of a state, or None.
      tokens_read: how many tokens of each sequence came before.
      position: (T,) or (B, T) integers, the positions of these tokens; by
        default those from `tokens_read` on.
      relative_RK: the vectors of distances, in place of the layer's own.
      hidden: segment_ids and key_mask, where no state is given.
    """
    B, T, D = x_BTD.shape
    q_BTHK, k_BTGK, v_BTGK = self._qkv(x_BTD)
    drops = self._drops(deterministic)
    if position is None:
      position = jnp.arange(T, dtype=jnp.uint32) + tokens_read
    if self.position == "rotary":
      q_BTHK, k_BTGK = (positions.rotate(x, position) for x in (q_BTHK, k_BTGK))
    elif self.position == "relative" and relative_RK is None:
      relative_RK = self._relative(q_BTHK.shape[-1])
    y_BTHK, layer_state = state.attend(
      layer_state,
      q_BTHK,
      k_BTGK,
      v_BTGK,
      self._mask(T, layer_state is None),
      tokens_read=tokens_read,
      relative_RK=relative_RK,
      implementation=self.implementation,
      **self._dropout(drops),
      **hidden,
    )
    out_init = self.out_kernel_init or self.kernel_init
    y_BTD = self._dense(self.out_features or D, out_init, "out")(
      y_BTHK.reshape(B, T, math.prod(y_BTHK.shape[2:]))
    )
    y_BTD = nn.Dropout(self.out_dropout_rate)(y_BTD, deterministic=not drops)
    return y_BTD, layer_state

  def _qkv(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (q_BTHK, k_BTGK, v_BTGK)."""
    B, T, D = x_BTD.shape
    features = self.qkv_features or D
    self._check(features)
    K = features // self.num_heads
    of_keys = (self.num_kv_heads or self.num_heads) * K
    qkv = self._dense(features + 2 * of_keys, self.kernel_init, "qkv")(x_BTD)
    q, k, v = (
      x.reshape(B, T, x.shape[-1] // K, K)
      for x in jnp.split(qkv, [features, features + of_keys], axis=-1)
    )
    return q, k, v

  def _drops(self, deterministic: bool | None) -> bool:
    """Returns whether anything is dropped in this call."""
    if not max(self.dropout_rate, self.out_dropout_rate):
      return False
    return not nn.merge_param(
      "deterministic", self.deterministic, deterministic
    )

  def _relative(self, K: int) -> jax.Array:
    """Returns the layer's own vectors of distances."""
    if self.max_span is None:
      raise ValueError(
        "position='relative' needs max_span, which says of how many distances "
        "vectors are learned; give it, or relative_RK at the call"
      )
    return relative_vectors(self, math.ceil(self.max_span + self.ramp), K)

  def _dense(
    self, features: int, kernel_init: Initializer, name: str
  ) -> nn.Dense:
    return nn.Dense(
      features,
      use_bias=self.use_bias,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      precision=self.precision,
      dot_general=flat_dot_general,
      kernel_init=kernel_init,
      bias_init=self.bias_init,
      name=name,
    )

  def _dropout(self, drops: bool) -> dict[str, Any]:
    """Returns the options of `attend` that drop attention weights."""
    if not drops or not self.dropout_rate:
      return {}
    seed = jax.random.bits(self.make_rng("dropout"), (), jnp.uint32)
    return {"dropout_rate": self.dropout_rate, "dropout_seed": seed}

  def _mask(self, T: int, alone: bool) -> masks.Mask | None:
    """Returns the mask of T tokens; None where it would hide nothing.

    Args:
      alone: whether no tokens came before these.
    """
    if self.max_span is None:
      reach = self.window_tokens
      if reach is None or (alone and T <= reach):
        return None
      # m(d) is one up to the last distance, and zero at the next.
      last_H = jnp.full(self.num_heads, reach - 1.0)
      return masks.Mask(last_H, ramp=1.0)
    logits = {
      name: self.param(
        name,
        initializer(name, self.span_init, self.mask_bounds),
        (self.num_heads,),
        jnp.float32,
      )
      for name in parameter_names(self.mask_bounds)
    }
    return mask_from_logits(logits, self.mask_bounds)

  def _check(self, features: int) -> None:
    check = functools.partial(require, self)
    H = self.num_heads
    check("num_heads", H >= 1, "an integer of at least 1")
    G = H if self.num_kv_heads is None else self.num_kv_heads
    check(
      "num_kv_heads",
      G >= 1 and H % G == 0,
      f"None, or a number that divides num_heads={H}",
    )
    check(
      "qkv_features", features % H == 0, f"a multiple of {H} heads", features
    )
    for name in ("dropout_rate", "out_dropout_rate"):
      check(name, 0 <= getattr(self, name) < 1, "at least 0, less than 1")
    check("position", self.position in POSITIONS, f"one of {POSITIONS}")
    check(
      "position",
      self.position != "rotary" or features // H % 2 == 0,
      f"another, as heads of an odd width, {features // H}, cannot be turned",
    )
    check(
      "wave",
      self.wave is None or self.max_span is not None,
      "None where there is no max_span",
    )
    if self.max_span is None:
      return
    check("max_span", 0 < self.max_span < math.inf, "more than 0 tokens")
    check(
      "ramp",
      LEAST_RAMP <= self.ramp < math.inf,
      f"at least {LEAST_RAMP} tokens, finite",
    )
    check("span_init", 0 < self.span_init < 1, "between 0 and 1")
