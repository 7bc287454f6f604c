"""AdamW as the published run has it, as one optax chain."""

import jax
import optax

from adaptive_attention.model import MASK_PARAMETERS


def learning_rate(settings, total_steps: int):
  """Step -> rate: linear from 0 to the peak, then a cosine to the minimum."""
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=settings.learning_rate,
    warmup_steps=settings.warmup_steps,
    decay_steps=max(total_steps, settings.warmup_steps + 1),
    end_value=settings.min_learning_rate,
  )


def is_mask_parameter(params):
  """A tree of booleans: True for the parameters of spans and waves."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key in MASK_PARAMETERS, params
  )


def make(settings, schedule) -> optax.GradientTransformation:
  """clip by global norm -> Adam -> decay of matrices -> -rate.

  The updates of spans and waves are then multiplied by mask_lr_multiplier.

  Args:
    settings: config.optimizer.
    schedule: step -> learning rate, as of `learning_rate`, or a constant.
  """
  return optax.chain(
    optax.clip_by_global_norm(settings.clip_norm),
    optax.adamw(
      schedule,
      b1=settings.beta1,
      b2=settings.beta2,
      eps=1e-8,
      weight_decay=settings.weight_decay,
      mask=lambda params: jax.tree.map(lambda p: p.ndim >= 2, params),
    ),
    optax.masked(optax.scale(settings.mask_lr_multiplier), is_mask_parameter),
  )
