"""AdamW as the published run has it, or Adagrad, as one optax chain."""

import jax
import jax.numpy as jnp
import optax

from adaptive_attention.parameters import (
  is_mask_parameter,
  is_matrix,
  stacked_axes,
)


def learning_rate(settings, total_steps: int):
  """Step -> rate: linear from 0 to the peak, then a cosine to the minimum."""
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=settings.learning_rate,
    warmup_steps=settings.warmup_steps,
    decay_steps=max(total_steps, settings.warmup_steps + 1),
    end_value=settings.min_learning_rate,
  )


def _clip_each(most):
  """Scales each gradient whose norm is more than `most` down to it.

  Each of one layer: of layers that are stacked every one has its own norm.
  """

  def clip(gradient):
    norm = optax.tree.norm(gradient)
    return gradient * jnp.minimum(1.0, most / jnp.maximum(norm, 1e-30))

  def clip_stacked(axes, gradient):
    of_each = clip
    for _ in range(axes):
      of_each = jax.vmap(of_each)
    return jax.tree.map(of_each, gradient)

  return optax.stateless(
    lambda gradients, _: jax.tree.map(
      clip_stacked, stacked_axes(gradients), gradients
    )
  )


def make(settings, schedule) -> optax.GradientTransformation:
  """clip -> Adam or Adagrad -> decay of matrices -> -rate.

  The updates of spans and waves are then multiplied by mask_lr_multiplier.
  Adagrad divides by the root of the sum of all squares so far (Duchi et al.
  2011), which starts at zero.

  Args:
    settings: config.optimizer.
    schedule: step -> learning rate, as of `learning_rate`, or a constant.
  """
  match settings.clip:
    case "global":
      clip = optax.clip_by_global_norm(settings.clip_norm)
    case "tensor":
      clip = _clip_each(settings.clip_norm)
  match settings.name:
    case "adamw":
      rule = optax.adamw(
        schedule,
        b1=settings.beta1,
        b2=settings.beta2,
        eps=1e-8,
        weight_decay=settings.weight_decay,
        mask=is_matrix,
      )
    case "adagrad":
      rule = optax.chain(
        optax.scale_by_rss(initial_accumulator_value=0.0, eps=1e-10),
        optax.add_decayed_weights(settings.weight_decay, is_matrix),
        optax.scale_by_learning_rate(schedule),
      )
  return optax.chain(
    clip,
    rule,
    optax.masked(optax.scale(settings.mask_lr_multiplier), is_mask_parameter),
  )
