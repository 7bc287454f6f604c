"""The transformer and its parts as Flax (linen) modules.

The block is the published one, unless settings ask for another: pre-norm, no
biases, GELU with erf, learned positions added before every block, the token
embedding tied to the output layer. The modules hold parameters. `masks` says
which pairs are open, and `state` is what a model keeps of earlier tokens.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from adaptive_attention.config import ModelConfig
from adaptive_attention.layer import (
  AdaptiveSelfAttention,
  Initializer,
  flat_dot_general,
  relative_vectors,
)
from adaptive_attention.state import (
  LayerState,
  State,
  Stateless,
)

_NORM_EPSILON = 1e-5
_INIT_STD = 0.02
_KERNEL_INIT = nn.initializers.normal(_INIT_STD)


def _recomputed(module: Any, method: str) -> Any:
  """Returns a module whose method (x, deterministic, ...) stores inputs only.

  The backward pass computes the activations inside it again.
  """
  return nn.remat(module, static_argnums=(2,), methods=[method])


class MLP(nn.Module):
  """down(gelu(up(x))).

  Attributes:
    hidden_features: the width of up(x).
    gelu: "erf" for GELU by the error function, "tanh" for its approximation.
    dropout_rate: the share of the output to drop.
    use_bias, dtype, kernel_init, out_kernel_init: as in the attention layer.
  """

  hidden_features: int
  gelu: str = "erf"
  dropout_rate: float = 0.0
  use_bias: bool = True
  dtype: Any = None
  kernel_init: Initializer = nn.linear.default_kernel_init
  out_kernel_init: Initializer = nn.linear.default_kernel_init

  @nn.compact
  def __call__(self, x_BTD: jax.Array, deterministic: bool = True) -> jax.Array:
    def dense(features: int, kernel_init: Initializer, name: str) -> nn.Dense:
      return nn.Dense(
        features,
        use_bias=self.use_bias,
        dtype=self.dtype,
        dot_general=flat_dot_general,
        kernel_init=kernel_init,
        name=name,
      )

    x_BTF = dense(self.hidden_features, self.kernel_init, "up")(x_BTD)
    x_BTF = nn.gelu(x_BTF, approximate=self.gelu == "tanh")
    x_BTD = dense(x_BTD.shape[-1], self.out_kernel_init, "down")(x_BTF)
    return nn.Dropout(self.dropout_rate)(x_BTD, deterministic=deterministic)


def _layer_norm(config: ModelConfig, name: str) -> nn.LayerNorm:
  return nn.LayerNorm(
    epsilon=_NORM_EPSILON,
    use_bias=config.bias,
    dtype=config.compute_dtype,
    name=name,
  )


def _branch_fields(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields that both branches of a block have."""
  return {
    "use_bias": config.bias,
    "dtype": config.compute_dtype,
    "kernel_init": _KERNEL_INIT,
    # The 2 n_layer branches that are added up together start with the variance
    # of one.
    "out_kernel_init": nn.initializers.normal(
      _INIT_STD / math.sqrt(2 * config.n_layer)
    ),
  }


def attention_layer(
  config: ModelConfig, name: str | None = None
) -> AdaptiveSelfAttention:
  """Returns the attention layer of a model of these settings."""
  return AdaptiveSelfAttention(
    num_heads=config.n_head,
    num_kv_heads=config.n_kv_head,
    dropout_rate=config.dropout,
    out_dropout_rate=config.dropout,
    max_span=config.mask_bounds.max_span,
    ramp=config.ramp,
    span_init=config.span_init,
    span_coef=config.span_coef,
    wave=config.wave,
    position=None if config.learns_positions else config.position,
    window_tokens=config.max_context_tokens,
    implementation=None
    if config.implementation == "auto"
    else config.implementation,
    name=name,
    **_branch_fields(config),
  )


def _mlp(config: ModelConfig) -> MLP:
  mlp = _recomputed(MLP, "__call__") if config.remat == "mlp" else MLP
  return mlp(
    hidden_features=4 * config.width,
    gelu=config.gelu,
    dropout_rate=config.dropout,
    name="mlp",
    **_branch_fields(config),
  )


class Block(nn.Module):
  """Adds attention(norm_1(x)) to x, then mlp(norm_2(x)) to that."""

  config: ModelConfig

  @nn.compact
  def extend(
    self,
    x_BTD: jax.Array,
    deterministic: bool = True,
    layer_state: LayerState | None = None,
    tokens_read: Any = 0,
    position: jax.Array | None = None,
    relative_RK: jax.Array | None = None,
  ) -> tuple[jax.Array, LayerState | None]:
    """Returns (y_BTD, the layer's state with these tokens).

    See `AdaptiveSelfAttention.extend` for the arguments.
    """
    normed_BTD = _layer_norm(self.config, "norm_1")(x_BTD)
    attention = attention_layer(self.config, name="attention")
    y_BTD, layer_state = attention.extend(
      normed_BTD,
      deterministic,
      layer_state,
      tokens_read,
      position,
      relative_RK,
    )
    x_BTD += y_BTD
    normed_BTD = _layer_norm(self.config, "norm_2")(x_BTD)
    x_BTD += _mlp(self.config)(normed_BTD, deterministic)
    return x_BTD, layer_state

  def __call__(self, x_BTD: jax.Array, deterministic: bool = True) -> jax.Array:
    return self.extend(x_BTD, deterministic)[0]


class Transformer(nn.Module):
  """A language model over tokens: tokens_BT -> logits_BTV in float32.

  x = embed(tokens), and in each layer x += attention(norm_1(x)) and then
  x += mlp(norm_2(x)); logits = norm(x) embed^T. That is the layout of GPT-2
  (Radford et al. 2019) and of nanoGPT, with the masks of
  `AdaptiveSelfAttention`. Position vectors are added to x, unless queries and
  keys have positions of their own. Logits are in nats, up to a constant.

  How far a token attends back does not depend on the length of the text: it is
  the reach of each head in tokens. Without spans that is
  `config.max_context_tokens`.

  Attributes:
    config: the settings. A `ModelConfig` raises ValueError where they are not
      possible, and the calls raise it for tokens that do not fit.
  """

  config: ModelConfig

  def __call__(
    self,
    tokens_BT: jax.Array,
    *,
    train: bool = False,
    state: State | Stateless | None = None,
  ) -> Any:
    """Returns logits_BTV, or (logits_BTV, state) where a state is given.

    Args:
      tokens_BT: B sequences of T tokens, integers in [0, V).
      train: whether dropout acts. Then `rngs={"dropout": key}` is needed where
        config.dropout is not zero.
      state: what `init_memory` or `init_cache` made, or an earlier call
        returned. The tokens follow those that it has read. Donate it, as it is
        copied otherwise. One token over a KV cache is computed in one way,
        whatever `config.implementation` says.

    Raises:
      ValueError: more tokens than learned positions, or a B or T that the state
        was not made for. Where the state's `tokens_read` is traced, the logits
        of positions beyond the learned ones are nan instead.
      NotImplementedError: a named implementation that cannot serve the call.
    """
    if state is None:
      alone = Stateless(self.config.n_layer)
      return self.extend(tokens_BT, not train, alone)[0]
    return self.extend(tokens_BT, not train, state)

  @nn.compact
  def extend(
    self, tokens_BT: jax.Array, deterministic: bool, state: State | Stateless
  ) -> tuple[jax.Array, State | Stateless]:
    """Returns (logits_BTV, the state with these tokens)."""
    cfg = self.config
    B, T = tokens_BT.shape
    self._check_length(T, state)
    embed = nn.Embed(
      cfg.vocab_size,
      cfg.width,
      embedding_init=nn.initializers.normal(_INIT_STD),
      name="embed",
    )
    x_BTD = embed(tokens_BT)
    relative_RK = None
    if cfg.position == "relative":
      K = cfg.width // cfg.n_head
      relative_RK = relative_vectors(self, cfg.relative_tokens, K)
    block = _recomputed(Block, "extend") if cfg.remat == "block" else Block
    position = state.positions(B, T)
    layers = []
    for i, layer_state in enumerate(state.layers):
      if cfg.position == "learned" or (i == 0 and cfg.learns_positions):
        x_BTD += self._learned_positions(i, T, state)[None]
      x_BTD = x_BTD.astype(cfg.compute_dtype)
      if i == 0:
        x_BTD = nn.Dropout(cfg.dropout)(x_BTD, deterministic=deterministic)
      x_BTD, layer_state = block(cfg, name=f"block_{i}").extend(
        x_BTD,
        deterministic,
        layer_state,
        state.tokens_read,
        position,
        relative_RK,
      )
      layers.append(layer_state)
    return self._logits(x_BTD, embed), state.after(layers, T)

  def _logits(self, x_BTD: jax.Array, embed: nn.Embed) -> jax.Array:
    return jnp.einsum(
      "btd,vd->btv",
      _layer_norm(self.config, "norm")(x_BTD),
      embed.embedding.astype(self.config.compute_dtype),
      preferred_element_type=jnp.float32,
    )

  def _learned_positions(
    self, layer: int, T: int, state: State | Stateless
  ) -> jax.Array:
    """Returns (T, D), the vectors of the next T positions; nan beyond them."""
    table = self.param(
      f"position_{layer}",
      nn.initializers.normal(_INIT_STD),
      (self.config.context_tokens, self.config.width),
      jnp.float32,
    )
    read = state.known_tokens_read
    if read is not None:
      return table[read : read + T]
    position_T = state.tokens_read + jnp.arange(T, dtype=jnp.uint32)
    return table.at[position_T].get(mode="fill", fill_value=jnp.nan)

  def _check_length(self, T: int, state: State | Stateless) -> None:
    cfg = self.config
    # At least so many; where `tokens_read` is traced there may be more.
    end = (state.known_tokens_read or 0) + T
    if cfg.learns_positions and end > cfg.context_tokens:
      raise ValueError(
        f"{end} tokens are more than the {cfg.context_tokens} for which "
        f"model.position={cfg.position!r} was learned; give fewer"
      )
