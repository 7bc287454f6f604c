"""AdamW as the published run has it, or Adagrad, as one optax chain."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptive_attention.config import OptimizerConfig
from adaptive_attention.parameters import (
  is_mask_parameter,
  is_matrix,
  stacked_axes,
)


class Optimizer(NamedTuple):
  """An optax transformation with its learning rate.

  Attributes:
    init, update: those of optax.
    learning_rate: step -> the learning rate of the update of this step.
    trained: parameters -> the same, of which those that are held still have no
      gradient.
  """

  init: Callable
  update: Callable
  learning_rate: optax.Schedule
  trained: Callable


def make(
  config: OptimizerConfig, total_steps: int, train_only: str = ""
) -> Optimizer:
  """Makes the optimizer of a run of `total_steps` steps.

  Args:
    train_only: "masks" to hold all but spans and waves still, which then take
      no gradient and no decay; "" to train all.
  """
  rate = learning_rate(config, total_steps)
  rule = transformation(config, rate)
  if not train_only:
    return Optimizer(rule.init, rule.update, rate, lambda params: params)
  rule = optax.chain(rule, optax.masked(optax.set_to_zero(), _is_held))
  return Optimizer(rule.init, rule.update, rate, _with_held)


def _is_held(params):
  """Returns a tree of booleans: False for the parameters of masks."""
  return jax.tree.map(lambda of_mask: not of_mask, is_mask_parameter(params))


def _with_held(params):
  """Returns the parameters, of which those of masks alone have a gradient."""
  return jax.tree.map(
    lambda x, held: jax.lax.stop_gradient(x) if held else x,
    params,
    _is_held(params),
  )


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
  """Returns step -> rate: linear from 0 to the peak, then a cosine to the end.

  The peak is `learning_rate`, the end `min_learning_rate`.
  """
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=config.warmup_steps,
    decay_steps=max(total_steps, config.warmup_steps + 1),
    end_value=config.min_learning_rate,
  )


def _clip_each(most):
  """Scales each gradient whose norm is more than `most` down to that norm.

  Of layers that are stacked each has a norm of its own.
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


def transformation(
  config: OptimizerConfig, rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
  """Makes the chain: clip -> Adam or Adagrad -> decay of matrices -> -rate.

  The updates of spans and waves are then multiplied by mask_lr_multiplier.
  Adagrad divides by the root of the sum of all squares so far (Duchi et al.
  2011), which starts at zero.

  Args:
    config: the optimizer's settings.
    rate: step -> learning rate, as of `learning_rate`, or a constant.
  """
  match config.clip:
    case "global":
      clip = optax.clip_by_global_norm(config.clip_norm)
    case "tensor":
      clip = _clip_each(config.clip_norm)
  match config.name:
    case "adamw":
      rule = optax.adamw(
        rate,
        b1=config.beta1,
        b2=config.beta2,
        eps=1e-8,
        weight_decay=config.weight_decay,
        mask=is_matrix,
      )
    case "adagrad":
      rule = optax.chain(
        optax.scale_by_rss(initial_accumulator_value=0.0, eps=1e-10),
        optax.add_decayed_weights(config.weight_decay, is_matrix),
        optax.scale_by_learning_rate(rate),
      )
  return optax.chain(
    clip,
    rule,
    optax.masked(optax.scale(config.mask_lr_multiplier), is_mask_parameter),
  )
