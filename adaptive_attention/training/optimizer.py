"""AdamW as the published run has it, or Adagrad, as one optax chain."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptive_attention.config import OptimizerConfig
from adaptive_attention.errors import SettingsError
from adaptive_attention.parameters import (
  is_found,
  is_mask_parameter,
  is_matrix,
  paths,
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
      no gradient and no decay; a regular expression to hold all still whose
      path it does not find; "" to train all.

  Raises:
    SettingsError: at the first use, the expression finds no parameter.
  """
  rate = learning_rate(config, total_steps)
  rule = transformation(config, rate)
  if not train_only:
    return Optimizer(rule.init, rule.update, rate, lambda params: params)
  is_held = functools.partial(_is_held, train_only)
  rule = optax.chain(rule, optax.masked(optax.set_to_zero(), is_held))

  def with_held(params):
    """Returns the parameters, of which those that are held have no gradient."""
    return jax.tree.map(
      lambda x, held: jax.lax.stop_gradient(x) if held else x,
      params,
      is_held(params),
    )

  return Optimizer(rule.init, rule.update, rate, with_held)


def _is_held(train_only: str, params):
  """Returns a tree of booleans: which parameters are held still."""
  if train_only == "masks":
    trained = is_mask_parameter(params)
  else:
    trained = is_found(train_only, params)
  if not any(jax.tree.leaves(trained)):
    some = ", ".join(sorted(paths(params))[:4])
    raise SettingsError(
      f"config.train_only={train_only!r} finds no parameter; give an "
      f"expression that finds some, as {some}"
    )
  return jax.tree.map(lambda one: not one, trained)


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
