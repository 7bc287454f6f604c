"""The settings of a model and of its optimizer: the one place of defaults."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from adaptive_attention.attention import IMPLEMENTATIONS


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The settings of a model; each is explained in configs/base.py.

  Raises:
    ValueError: a setting that is out of bounds, or two that do not fit.
  """

  vocab_size: int = 256
  n_layer: int = 12
  n_head: int = 8
  width: int = 512
  context_tokens: int = 512
  memory_tokens: int = 0
  position: str = "learned"
  attention: str = "span_wave"
  max_span: int = 512
  span_init: float = 0.5
  ramp: float = 32.0
  span_coef: float = 4e-6
  period: str = "real"
  period_min: float = 2.0
  period_max: float = 8.0
  ratio_min: float = -0.25
  ratio_max: float = 0.25
  harmonics: int = 5
  dropout: float = 0.0
  bias: bool = False
  dtype: str = "auto"
  remat: str = "none"
  implementation: str = "auto"

  def __post_init__(self):
    def require(name, condition, expected):
      if not condition:
        raise ValueError(
          f"model.{name}={getattr(self, name)!r} is not possible; expected "
          f"{expected}"
        )

    for name in ("vocab_size", "n_layer", "n_head", "width", "context_tokens"):
      require(name, getattr(self, name) >= 1, "an integer of at least 1")
    require(
      "width",
      self.width % self.n_head == 0,
      f"a multiple of model.n_head={self.n_head}",
    )
    choices = {
      "position": ("learned", "rotary", "relative"),
      "attention": ("dense", "span", "span_wave"),
      "period": ("real", "integer"),
      "dtype": ("auto", "float32", "bfloat16"),
      "remat": ("none", "mlp", "block"),
      "implementation": ("auto", *IMPLEMENTATIONS),
    }
    for name, allowed in choices.items():
      require(name, getattr(self, name) in allowed, f"one of {allowed}")
    for name in ("max_span", "ramp"):
      value = getattr(self, name)
      require(name, 0 < value < math.inf, "more than 0 tokens, and finite")
    require(
      "position",
      self.position != "rotary" or self.width // self.n_head % 2 == 0,
      f"learned, as heads of an odd width (model.width={self.width} / "
      f"model.n_head={self.n_head}) cannot be turned in pairs",
    )
    require("memory_tokens", self.memory_tokens >= 0, "0 for none, or more")
    require(
      "position",
      self.position != "learned" or not self.memory_tokens,
      "rotary or relative, as learned positions do not tell a token from those "
      f"of the model.memory_tokens={self.memory_tokens} before",
    )
    require(
      "remat",
      self.remat != "block" or not self.memory_tokens,
      "none or mlp, as computing attention again would append to a copy of the "
      f"model.memory_tokens={self.memory_tokens}",
    )
    require("span_init", 0 < self.span_init < 1, "a share between 0 and 1")
    require("span_coef", 0 <= self.span_coef < math.inf, "0 or more, finite")
    require("dropout", 0 <= self.dropout < 1, "a share of at least 0, under 1")
    require("harmonics", self.harmonics >= 0, "0 for the exact wave, or more")
    require(
      "period_min", 1 <= self.period_min < math.inf, "a period of 1 token up"
    )
    require(
      "period_max",
      self.period_min < self.period_max < math.inf,
      f"more than model.period_min={self.period_min}, and finite",
    )
    require(
      "ratio_min",
      -0.25 <= self.ratio_min < 0,
      "-0.25 up to less than 0, lest a query cannot see itself",
    )
    require("ratio_max", 0 < self.ratio_max <= 0.5, "more than 0, up to 0.5")

  @property
  def reach_tokens(self) -> int:
    """How many tokens a query can look at, at most: context and memory."""
    return self.context_tokens + self.memory_tokens

  @property
  def relative_tokens(self) -> int:
    """How many distances have a vector where positions are "relative"."""
    if self.attention == "dense":
      return self.reach_tokens
    return math.ceil(self.max_span + self.ramp)

  @property
  def cache_tokens(self) -> int:
    """How many tokens back a head can look at most when a text is written.

    As far as its span may go: no token is out of its reach for being old.
    Without spans it is context and memory; with learned positions the context.
    """
    if self.attention == "dense":
      return self.reach_tokens
    reach = math.ceil(self.max_span + self.ramp)
    if self.position == "learned":
      return min(reach, self.context_tokens)
    return reach

  @property
  def compute_dtype(self):
    """What activations are computed in: bfloat16 on GPU and TPU when auto."""
    if self.dtype != "auto":
      return jnp.dtype(self.dtype)
    cpu = jax.default_backend() == "cpu"
    return jnp.dtype(jnp.float32 if cpu else jnp.bfloat16)


# Of the model's settings those that leave the function it computes as it is.
_FREE = (
  "span_init",
  "span_coef",
  "dropout",
  "dtype",
  "remat",
  "implementation",
)


def fixes_the_model(name: str) -> bool:
  """Whether a setting must stay what a checkpoint was trained with."""
  return name.startswith("model.") and name.split(".")[1] not in _FREE


def model_config(model: Mapping) -> ModelConfig:
  """The model that settings tell of, those of another version too.

  What they lack is at its default, and the largest span at the context.

  Raises:
    ValueError: a setting that is not possible, or unknown.
  """
  known = {field.name for field in dataclasses.fields(ModelConfig)}
  for name, value in model.items():
    if name not in known:
      raise ValueError(
        f"model.{name}={value!r} is unknown to this version; use the "
        "one that the model was trained with"
      )
  follows = {}
  if "context_tokens" in model:
    follows = {"max_span": model["context_tokens"]}
  return ModelConfig(**(follows | dict(model)))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The settings of an optimizer; rates per update, norms of gradients.

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
  # How much of AdamW's means of the gradient and of its square stays at an
  # update. The published run has 0.99 for the second.
  beta1: float = 0.9
  beta2: float = 0.99
  # Acts on matrices alone: norms, biases, spans and waves are not drawn to
  # zero.
  weight_decay: float = 0.1
  # What clip_norm bounds: "global", the norm of the gradient over all
  # parameters together, or "tensor", the norm of each parameter's own.
  clip: str = "global"
  clip_norm: float = 1.0
  # Spans and waves learn this many times as fast as the rest.
  mask_lr_multiplier: float = 1.0

  def __post_init__(self):
    def require(name, condition, expected):
      if not condition:
        raise ValueError(
          f"optimizer.{name}={getattr(self, name)!r} is not possible; expected "
          f"{expected}"
        )

    for name, value in vars(self).items():
      if not isinstance(value, str):
        require(name, math.isfinite(value), "a finite number")
        require(name, value >= 0, "at least 0")
    choices = {"name": ("adamw", "adagrad"), "clip": ("global", "tensor")}
    for name, allowed in choices.items():
      require(name, getattr(self, name) in allowed, f"one of {allowed}")
    for name in ("beta1", "beta2"):
      require(name, getattr(self, name) < 1, "less than 1")
    require(
      "min_learning_rate",
      self.min_learning_rate <= self.learning_rate,
      f"at most optimizer.learning_rate={self.learning_rate}",
    )
    require("clip_norm", self.clip_norm > 0, "more than 0")
