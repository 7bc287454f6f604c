"""The settings of a model and of its parts: the one place of their defaults.

configs/base.py is filled from here. Names end in `_tokens` for lengths and in
`_coef` for weights of losses.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from adaptive_attention.attention import IMPLEMENTATIONS
from adaptive_attention.attention.choice import device
from adaptive_attention.mask_bounds import (
  LEAST_RAMP,
  MOST_HARMONICS,
  MaskBounds,
  WaveBounds,
  require,
)


def defaults(settings: type) -> dict[str, Any]:
  """Returns the default of each field of a dataclass, as it is written."""
  return {field.name: field.default for field in dataclasses.fields(settings)}


_MOST_LAYERS = 4096  # each is compiled by itself
_MOST = 2**31 - 1  # positions and tokens are 32-bit integers


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The settings of a `Transformer`.

  Attributes:
    vocab_size: V, how many tokens the model knows.
    n_layer, n_head, width: how many layers, H, and D. Heads have width D / H.
    n_kv_head: G, the heads of keys and values, each of which serves H / G heads
      (Ainslie et al. 2023, "GQA"); 0 for n_head.
    context_tokens: tokens of a training segment.
    memory_tokens: the most tokens before a segment that a head can reach.
    memory_margin: the share by which a head's memory is longer than its reach
      and a segment.
    position: "learned", "learned_once", "rotary" or "relative".
    attention: "dense", "span" (a learned span) or "span_wave" (and a wave).
    max_span: the longest span that a head can learn, in tokens; 0 for
      context_tokens.
    span_init: the share of max_span that spans begin with.
    ramp: R, the soft end of a span, in tokens.
    span_coef: nats per token of each layer's penalty; see `regularizer`.
    period: "real", or "integer" for periods that are rounded.
    period_min, period_max: bounds of the learned periods, in tokens.
    ratio_min, ratio_max: bounds of the learned ratios, shares of a period.
    harmonics: the highest harmonic of the wave's series; 0 for the exact wave.
    dropout: the share dropped of embeddings, attention weights and branches.
    bias: whether linear layers and norms have biases.
    gelu: GELU of the MLPs by "erf" or by its approximation with "tanh".
    dtype: of activations: "float32", "bfloat16", or "auto" for the device's.
    remat: what the backward pass computes again: "none", "mlp" or "block".
    implementation: one of `attend`, or "auto" for the best that serves.

  Raises:
    ValueError: a setting that is not possible, or two that do not fit.
  """

  vocab_size: int = 256  # bytes
  n_layer: int = 12
  n_head: int = 8
  # With fewer heads of keys, memory and cache take as much less.
  n_kv_head: int = 0
  width: int = 512
  # Learned positions are as many.
  context_tokens: int = 512
  # With a memory training reads streams, batch_size of them, and not random
  # parts of the text.
  memory_tokens: int = 0
  # A margin lets a span grow. A head that has used it up gets more, for which
  # the step is compiled again. At 0.2 a memory is made at most 1.3 times as
  # long as what heads reach.
  memory_margin: float = 0.2
  # "learned": added before every layer, as published. "learned_once": added
  # before the first, as in GPT-2. "rotary": queries and keys are turned (Su et
  # al. 2021), and there is no longest context. "relative": a learned vector for
  # each distance, as in Sukhbaatar et al. 2019. A memory refuses
  # learned ones, which do not tell a token from one of an earlier segment.
  position: str = "learned"
  attention: str = "span_wave"
  max_span: int = 0
  # A span that begins far from where it should end takes long: its logit moves
  # by about a learning rate a step.
  span_init: float = 0.5
  # A span has its gradient in its ramp.
  ramp: float = 32.0
  span_coef: float = 4e-6
  # A wave of an integer period is a stride, which can be skipped.
  period: str = "real"
  period_min: float = WaveBounds.period_min
  period_max: float = WaveBounds.period_max
  ratio_min: float = WaveBounds.ratio_min
  # At 0.5 a wave can open fully.
  ratio_max: float = WaveBounds.ratio_max
  harmonics: int = 5  # as published
  dropout: float = 0.0
  bias: bool = False
  gelu: str = "erf"  # as published; GPT-2 has "tanh"
  # "auto" is bfloat16 on GPU and TPU, and float32 on a CPU.
  dtype: str = "auto"
  # What is computed again need not be stored: "mlp" frees most activations,
  # "block" all but the input of each layer; it is not possible with a memory.
  remat: str = "none"
  # A name is used or refused; no other takes its place.
  implementation: str = "auto"

  def __post_init__(self) -> None:
    if self.max_span == 0:
      object.__setattr__(self, "max_span", self.context_tokens)
    if self.n_kv_head == 0:
      object.__setattr__(self, "n_kv_head", self.n_head)
    try:
      self._check_sizes()
      self._check_choices()
      self._check_memory()
      self._check_masks()
    except ValueError as error:
      raise ValueError(f"model.{error}") from None

  def _check_sizes(self) -> None:
    for name in ("vocab_size", "n_layer", "n_head", "width", "context_tokens"):
      most = _MOST_LAYERS if name == "n_layer" else _MOST
      require(
        self,
        name,
        1 <= getattr(self, name) <= most,
        f"an integer from 1 to {most}",
      )
    require(
      self,
      "width",
      self.width % self.n_head == 0,
      f"a multiple of model.n_head={self.n_head}",
    )
    require(
      self,
      "n_kv_head",
      self.n_kv_head >= 1 and self.n_head % self.n_kv_head == 0,
      f"0, or a number that divides model.n_head={self.n_head}",
    )
    require(
      self,
      "max_span",
      0 < self.max_span <= _MOST,
      f"more than 0 tokens, at most {_MOST}",
    )
    require(
      self,
      "ramp",
      LEAST_RAMP <= self.ramp <= _MOST,
      f"from {LEAST_RAMP} to {_MOST} tokens",
    )

  def _check_choices(self) -> None:
    choices = {
      "position": ("learned", "learned_once", "rotary", "relative"),
      "gelu": ("erf", "tanh"),
      "attention": ("dense", "span", "span_wave"),
      "period": ("real", "integer"),
      "dtype": ("auto", "float32", "bfloat16"),
      "remat": ("none", "mlp", "block"),
      "implementation": ("auto", *IMPLEMENTATIONS),
    }
    for name, allowed in choices.items():
      require(self, name, getattr(self, name) in allowed, f"one of {allowed}")
    require(
      self,
      "position",
      self.position != "rotary" or self.width // self.n_head % 2 == 0,
      f"learned, as heads of an odd width (model.width={self.width} / "
      f"model.n_head={self.n_head}) cannot be turned in pairs",
    )

  def _check_memory(self) -> None:
    most = _MOST - self.context_tokens
    require(
      self,
      "memory_tokens",
      0 <= self.memory_tokens <= most,
      f"from 0 to {most}, as positions are 32-bit integers",
    )
    require(
      self,
      "memory_margin",
      0 <= self.memory_margin <= 1e6,
      "from 0 to 1e6",
    )
    require(
      self,
      "position",
      not self.learns_positions or not self.memory_tokens,
      "rotary or relative, as learned positions do not tell a token from those "
      f"of the model.memory_tokens={self.memory_tokens} before",
    )
    require(
      self,
      "remat",
      self.remat != "block" or not self.memory_tokens,
      "none or mlp, as to compute attention again would append to a copy of "
      f"the model.memory_tokens={self.memory_tokens}",
    )

  def _check_masks(self) -> None:
    require(self, "span_init", 0 < self.span_init < 1, "between 0 and 1")
    require(
      self, "span_coef", 0 <= self.span_coef < math.inf, "0 or more, finite"
    )
    require(
      self, "dropout", 0 <= self.dropout < 1, "at least 0 and less than 1"
    )
    require(
      self,
      "harmonics",
      0 <= self.harmonics <= MOST_HARMONICS,
      f"0 for the exact wave, or at most {MOST_HARMONICS}",
    )
    self._wave_bounds()

  def _wave_bounds(self) -> WaveBounds:
    return WaveBounds(
      self.period_min,
      self.period_max,
      self.ratio_min,
      self.ratio_max,
      self.harmonics or None,
      self.period == "integer",
    )

  @property
  def wave(self) -> WaveBounds | None:
    """The bounds of the waves; None where the model has none."""
    return self._wave_bounds() if self.attention == "span_wave" else None

  @property
  def mask_bounds(self) -> MaskBounds:
    """The bounds that turn the parameters of any layer into masks."""
    return MaskBounds(
      self.n_head,
      None if self.attention == "dense" else self.max_span,
      self.ramp,
      self.wave,
      self.span_coef,
      float(self.max_context_tokens),
    )

  @property
  def key_value_bytes(self) -> int:
    """Bytes of a key and a value of one head."""
    return 2 * self.width // self.n_head * self.compute_dtype.itemsize

  @property
  def learns_positions(self) -> bool:
    """Whether there is a vector for each position, and none beyond them."""
    return self.position in ("learned", "learned_once")

  @property
  def max_context_tokens(self) -> int:
    """The most tokens that a query attends to in training, memory included."""
    return self.context_tokens + self.memory_tokens

  @property
  def relative_tokens(self) -> int:
    """How many distances have a vector where positions are "relative"."""
    if self.attention == "dense":
      return self.max_context_tokens
    return math.ceil(self.max_span + self.ramp)

  @property
  def cache_tokens(self) -> int:
    """The longest reach that a head can have in generation, in tokens.

    It is ceil(max_span + R), at most the context where positions are learned.
    Without spans it is context and memory.
    """
    if self.attention == "dense":
      return self.max_context_tokens
    reach = math.ceil(self.max_span + self.ramp)
    if self.learns_positions:
      return min(reach, self.context_tokens)
    return reach

  @property
  def compute_dtype(self) -> np.dtype:
    """The dtype of activations; "auto" is bfloat16 on GPU and TPU."""
    if self.dtype != "auto":
      return jnp.dtype(self.dtype)
    cpu = device().platform == "cpu"
    return jnp.dtype(jnp.float32 if cpu else jnp.bfloat16)


# The settings that do not change the function which a model computes.
_FREE = (
  "span_init",
  "span_coef",
  "dropout",
  "dtype",
  "remat",
  "implementation",
  "memory_margin",
)


def fixes_the_model(name: str) -> bool:
  """Returns whether a setting must stay what a checkpoint was trained with."""
  return name.startswith("model.") and name.split(".")[1] not in _FREE


def model_config(settings: Mapping[str, Any]) -> ModelConfig:
  """Returns the ModelConfig of settings by name, also of an older version.

  A setting that is missing has its default.

  Raises:
    ValueError: a setting that is not possible, or unknown.
  """
  known = defaults(ModelConfig)
  for name, value in settings.items():
    if name not in known:
      raise ValueError(
        f"model.{name}={value!r} is unknown to this version; use the version "
        "that the model was trained with"
      )
  return ModelConfig(**settings)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The settings of an optimizer. Learning rates are per update.

  Raises:
    ValueError: a setting that is out of bounds, or two that do not fit.
  """

  # "adamw", or "adagrad" as Sukhbaatar et al. 2019 have it (rate 0.07, clip
  # 0.03 of each tensor, no weight decay).
  name: str = "adamw"
  # The peak, which a linear warmup reaches; a cosine leads from it to the
  # minimum.
  learning_rate: float = 1e-3
  min_learning_rate: float = 1e-4
  warmup_steps: int = 100
  # The share of AdamW's running means of the gradient (beta1) and of its square
  # (beta2) that stays at an update. The published run has beta2 = 0.99.
  beta1: float = 0.9
  beta2: float = 0.99
  # It acts on matrices alone: norms, biases, spans and waves are not drawn to
  # zero.
  weight_decay: float = 0.1
  # What clip_norm bounds: "global", the norm of the gradient over all
  # parameters together, or "tensor", the norm of each parameter's own.
  clip: str = "global"
  clip_norm: float = 1.0
  # Spans and waves learn this many times as fast as the rest.
  mask_lr_multiplier: float = 1.0

  def __post_init__(self) -> None:
    try:
      self._check()
    except ValueError as error:
      raise ValueError(f"optimizer.{error}") from None

  def _check(self) -> None:
    for name, value in vars(self).items():
      if not isinstance(value, str):
        require(self, name, math.isfinite(value), "a finite number")
        require(self, name, value >= 0, "at least 0")
    choices = {"name": ("adamw", "adagrad"), "clip": ("global", "tensor")}
    for name, allowed in choices.items():
      require(self, name, getattr(self, name) in allowed, f"one of {allowed}")
    for name in ("beta1", "beta2"):
      require(self, name, getattr(self, name) < 1, "less than 1")
    require(
      self,
      "min_learning_rate",
      self.min_learning_rate <= self.learning_rate,
      f"at most optimizer.learning_rate={self.learning_rate}",
    )
    require(self, "clip_norm", self.clip_norm > 0, "more than 0")
