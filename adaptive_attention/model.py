"""The transformer and its parts as Flax (linen) modules.

The block is the published one: pre-norm, no biases unless asked for, GELU with
erf, learned positions added before every block (or relative ones inside
attention), the token embedding tied to the output layer. The modules hold
parameters and call `attend`; what the heads look at is `masks`, and what they
keep of earlier tokens is `memory`.
"""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from adaptive_attention import (
  masks,
  parameters,
  positions,
)
from adaptive_attention import memory as memories
from adaptive_attention.attention import attend
from adaptive_attention.config import ModelConfig
from adaptive_attention.parameters import MASK_PARAMETERS

_NORM_EPSILON = 1e-5
_INIT_STD = 0.02
_KERNEL_INIT = nn.initializers.normal(_INIT_STD)


def mask_from_logits(params: Mapping, config: ModelConfig) -> masks.Mask:
  """The mask of one attention layer out of its own parameters."""
  wave = None
  if config.attention == "span_wave":
    wave = masks.Wave(
      period=masks.bounded(
        params["period_logit"], config.period_min, config.period_max
      ),
      ratio=masks.bounded(
        params["ratio_logit"], config.ratio_min, config.ratio_max
      ),
      harmonics=config.harmonics or None,
      integer=config.period == "integer",
    )
  span_H = masks.bounded(params["span_logit"], 0.0, config.max_span)
  return masks.Mask(span_H, config.ramp, wave)


def mask_params(params: Mapping, config: ModelConfig) -> tuple[masks.Mask, ...]:
  """One Mask per attention layer, first to last, from parameters alone.

  Works for any tree that holds `AdaptiveSelfAttention` modules of this config,
  somebody else's model too, apart or stacked by `nn.scan`; their order is that
  of `parameters.attention_layers`. A dense layer is open over its whole context
  and memory.

  Raises:
    ValueError: there is no such layer, or one is not of this config.
  """
  dense = config.attention == "dense"
  layers = parameters.attention_layers(params, dense)
  if not layers:
    raise ValueError(
      "the parameters hold no attention layer of model.attention="
      f"{config.attention!r}; give those of a model with AdaptiveSelfAttention "
      "modules of this config"
    )
  if dense:
    span_H = jnp.full(config.n_head, float(config.reach_tokens))
    return tuple(masks.Mask(span_H, config.ramp) for _ in layers)
  waves = config.attention == "span_wave"
  names = MASK_PARAMETERS if waves else MASK_PARAMETERS[:1]
  for path, layer in layers:
    for name in names:
      shape = jnp.shape(layer[name]) if name in layer else None
      if shape != (config.n_head,):
        raise ValueError(
          f"the attention layer {path!r} has {name} of the shape {shape}; "
          f"expected ({config.n_head},) of model.attention="
          f"{config.attention!r}, after the axes that stack layers; give the "
          "config that it was made with"
        )
  return tuple(mask_from_logits(layer, config) for _, layer in layers)


def init_memory(config: ModelConfig, streams: int, T: int) -> memories.Memory:
  """An empty memory of `config.memory_tokens`, for calls with T tokens each.

  Args:
    streams: sequences that are read side by side.
  """
  return memories.empty(
    layers=config.n_layer,
    streams=streams,
    heads=config.n_head,
    width=config.width // config.n_head,
    memory_tokens=config.memory_tokens,
    T=T,
    dtype=config.compute_dtype,
  )


class AdaptiveSelfAttention(nn.Module):
  """Causal self-attention whose heads learn what to look at.

  Takes and returns x_BTD of any width D that `config.n_head` divides. Learns
  span_logit, and with the wave period_logit and ratio_logit, all (H,). With a
  memory, of one layer, it returns (x_BTD, what is kept then).

  Vectors of distances (position="relative") are its own unless given. Without
  spans a query looks at all tokens before it, or at the last `reach_tokens`,
  itself included, where these are given.
  """

  config: ModelConfig
  reach_tokens: int | None = None

  @nn.compact
  def __call__(
    self,
    x_BTD,
    train: bool = False,
    memory=None,
    relative_RK=None,
  ):
    cfg = self.config
    B, T, D = x_BTD.shape
    H = cfg.n_head
    qkv = _dense(cfg, 3 * D, _KERNEL_INIT, "qkv")(x_BTD)
    q_BTHK, k_BTHK, v_BTHK = (
      x.reshape(B, T, H, D // H) for x in jnp.split(qkv, 3, axis=-1)
    )
    match cfg.position:
      case "rotary":
        position = jnp.arange(T, dtype=jnp.uint32)
        if memory is not None:
          position = memory.positions(B, T)
        q_BTHK = positions.rotate(q_BTHK, position)
        k_BTHK = positions.rotate(k_BTHK, position)
      case "relative" if relative_RK is None:
        relative_RK = relative_vectors(self, cfg, D // H)
    dropout_rate = cfg.dropout if train else 0.0
    dropout_seed = None
    if dropout_rate:
      dropout_seed = jax.random.bits(self.make_rng("dropout"), (), jnp.uint32)
    look = attend if memory is None else memory.attend
    y_BTHK = look(
      q_BTHK,
      k_BTHK,
      v_BTHK,
      self._mask(T),
      dropout_rate=dropout_rate,
      dropout_seed=dropout_seed,
      implementation=None
      if cfg.implementation == "auto"
      else cfg.implementation,
      relative_RK=relative_RK,
    )
    if memory is not None:
      y_BTHK, kept = y_BTHK
    y_BTD = _dense(cfg, D, _residual_init(cfg), "out")(y_BTHK.reshape(B, T, D))
    y_BTD = nn.Dropout(cfg.dropout, deterministic=not train)(y_BTD)
    return y_BTD if memory is None else (y_BTD, kept)

  def _mask(self, T):
    cfg = self.config
    if cfg.attention == "dense":
      if self.reach_tokens is None or T <= cfg.context_tokens:
        return None
      # m(d) is one up to the last distance, and zero at the next.
      last_H = jnp.full(cfg.n_head, self.reach_tokens - 1.0)
      return masks.Mask(last_H, ramp=1.0)
    shape = (cfg.n_head,)
    logits = {
      "span_logit": self.param(
        "span_logit", _logit_init(cfg.span_init), shape, jnp.float32
      )
    }
    if cfg.attention == "span_wave":
      logits["period_logit"] = self.param(
        "period_logit", _uniform_after_sigmoid, shape, jnp.float32
      )
      # The ratio starts at zero, wherever that lies between its bounds.
      zero = -cfg.ratio_min / (cfg.ratio_max - cfg.ratio_min)
      logits["ratio_logit"] = self.param(
        "ratio_logit", _logit_init(zero), shape, jnp.float32
      )
    return mask_from_logits(logits, cfg)


def relative_vectors(module, cfg, K):
  """(R, K) a vector for each distance, as a parameter of the module."""
  return module.param(
    "relative",
    nn.initializers.normal(_INIT_STD),
    (cfg.relative_tokens, K),
    jnp.float32,
  )


def _logit_init(share):
  """Starts at the logit of a share between 0 and 1."""
  return nn.initializers.constant(math.log(share / (1 - share)))


def _uniform_after_sigmoid(key, shape, dtype=jnp.float32):
  return jax.random.logistic(key, shape, dtype)


def _flat_dot_general(x, kernel, dimension_numbers, precision=None, **kwargs):
  """x_...D @ kernel_DF as one product of two matrices, for `nn.Dense`.

  The same product over more than one leading axis has a gradient of the kernel
  for which XLA's CPU backend transposes all activations, element by element.
  """
  y = jax.lax.dot_general(
    x.reshape(-1, x.shape[-1]),
    kernel,
    (((1,), (0,)), ((), ())),
    precision,
    **kwargs,
  )
  return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _dense(cfg, features, kernel_init, name):
  return nn.Dense(
    features,
    use_bias=cfg.bias,
    dtype=cfg.compute_dtype,
    dot_general=_flat_dot_general,
    kernel_init=kernel_init,
    name=name,
  )


def _residual_init(cfg):
  """Each block adds two branches to the stream: keep its variance at start."""
  return nn.initializers.normal(_INIT_STD / math.sqrt(2 * cfg.n_layer))


def _recomputed(module):
  """A module (x, train, ...) of which only the inputs are kept for gradients.

  The backward pass computes what is inside again.
  """
  return nn.remat(module, static_argnums=(2,))


class MLP(nn.Module):
  """down(gelu(up(x))), four times as wide inside."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD, train: bool = False):
    cfg = self.config
    D = x_BTD.shape[-1]
    x_BTF = _dense(cfg, 4 * D, _KERNEL_INIT, "up")(x_BTD)
    x_BTD = _dense(cfg, D, _residual_init(cfg), "down")(
      nn.gelu(x_BTF, approximate=False)
    )
    return nn.Dropout(cfg.dropout, deterministic=not train)(x_BTD)


def _layer_norm(cfg, name):
  return nn.LayerNorm(
    epsilon=_NORM_EPSILON,
    use_bias=cfg.bias,
    dtype=cfg.compute_dtype,
    name=name,
  )


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)).

  With a memory it returns (x, what is kept), as `AdaptiveSelfAttention` does.
  """

  config: ModelConfig
  reach_tokens: int | None = None

  @nn.compact
  def __call__(self, x_BTD, train=False, memory=None, relative_RK=None):
    cfg = self.config
    normed_BTD = _layer_norm(cfg, "norm_1")(x_BTD)
    attention = AdaptiveSelfAttention(cfg, self.reach_tokens, name="attention")
    y_BTD = attention(normed_BTD, train, memory, relative_RK)
    if memory is not None:
      y_BTD, kept = y_BTD
    x_BTD += y_BTD
    normed_BTD = _layer_norm(cfg, "norm_2")(x_BTD)
    mlp = _recomputed(MLP) if cfg.remat == "mlp" else MLP
    x_BTD += mlp(cfg, name="mlp")(normed_BTD, train)
    return x_BTD if memory is None else (x_BTD, kept)


class Transformer(nn.Module):
  """A language model over bytes: tokens_BT -> logits_BTV in float32.

  Deterministic unless train=True, which then needs rngs={"dropout": key} when
  config.dropout is not zero.

  With a memory, of `init_memory` or a `generate.Cache`, the tokens go on where
  those before ended, and (logits_BTV, memory) is returned; `batch` is the first
  of its streams that these sequences belong to. Donate it, lest it be copied.

  What a token sees does not depend on how long the text is: without spans it is
  the `config.reach_tokens` up to itself.

  Raises:
    ValueError: more tokens than positions were learned for, or another number
      of them than the memory was made for. Where it is traced how far a memory
      has come, logits of positions beyond the learned ones are nan.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, tokens_BT, train: bool = False, memory=None, batch=0):
    cfg = self.config
    T = tokens_BT.shape[1]
    self._check_length(T, memory)
    embed = nn.Embed(
      cfg.vocab_size,
      cfg.width,
      embedding_init=nn.initializers.normal(_INIT_STD),
      name="embed",
    )
    x_BTD = embed(tokens_BT)
    relative_RK = None
    if cfg.position == "relative":
      relative_RK = relative_vectors(self, cfg, cfg.width // cfg.n_head)
    block = _recomputed(Block) if cfg.remat == "block" else Block
    layers = [None] * cfg.n_layer
    if memory is not None:
      layers = memory.layers(batch)
    kept = []
    for i, layer in enumerate(layers):
      if cfg.position == "learned":
        table = self.param(
          f"position_{i}",
          nn.initializers.normal(_INIT_STD),
          (cfg.context_tokens, cfg.width),
          jnp.float32,
        )
        x_BTD += _of_positions(table, T, memory)[None]
      x_BTD = x_BTD.astype(cfg.compute_dtype)
      if i == 0:
        x_BTD = nn.Dropout(cfg.dropout, deterministic=not train)(x_BTD)
      x_BTD = block(cfg, cfg.reach_tokens, name=f"block_{i}")(
        x_BTD, train, layer, relative_RK
      )
      if layer is not None:
        x_BTD, of_layer = x_BTD
        kept.append(of_layer)
    x_BTD = _layer_norm(cfg, "norm")(x_BTD)
    logits_BTV = jnp.einsum(
      "btd,vd->btv",
      x_BTD,
      embed.embedding.astype(cfg.compute_dtype),
      preferred_element_type=jnp.float32,
    )
    if memory is None:
      return logits_BTV
    return logits_BTV, memory.after(kept, T)

  def _check_length(self, T, memory):
    cfg = self.config
    if memory is not None:
      memory.check(T)
    read = 0 if memory is None else memory.tokens_read
    if isinstance(read, jax.core.Tracer):
      read = 0  # at least
    if cfg.position == "learned" and read + T > cfg.context_tokens:
      raise ValueError(
        f"{read + T} tokens are more than the {cfg.context_tokens} for which "
        "model.position='learned' was learned; give fewer"
      )


def _of_positions(table, T, memory):
  """(T, D) of the next T positions; nan where there are none."""
  if memory is None:
    return table[:T]
  position_T = memory.tokens_read + jnp.arange(T, dtype=jnp.uint32)
  return table.at[position_T].get(mode="fill", fill_value=jnp.nan)


def regularizer(params, config: ModelConfig):
  """Nats: span_coef * masks.penalty, summed over layers; zero when dense.

  A function of the parameters alone, of any model that holds
  `AdaptiveSelfAttention` modules; added to the loss in training only.

  Raises:
    ValueError: as `mask_params`.
  """
  layers = mask_params(params, config)
  if config.attention == "dense":
    return jnp.float32(0.0)
  return config.span_coef * sum(masks.penalty(mask) for mask in layers)
