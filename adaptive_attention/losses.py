"""What training minimises, in nats."""

import jax.numpy as jnp
import optax

from adaptive_attention import masks
from adaptive_attention.model import ModelConfig, mask_params


def cross_entropy(logits_BTV, targets_BT):
  """nats_BT = -log softmax(logits)[target], of each token, in float32."""
  return optax.softmax_cross_entropy_with_integer_labels(
    logits_BTV.astype(jnp.float32), targets_BT
  )


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
