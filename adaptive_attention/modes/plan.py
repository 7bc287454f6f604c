"""Plans a run: counts and compiles what it will take, and allocates nothing."""

import jax

from adaptive_attention import accounting
from adaptive_attention.mask_parameters import mask_params
from adaptive_attention.model import Transformer
from adaptive_attention.training import (
  batches,
  checkpoint,
  console,
  optimizer,
  parallel,
  settings,
  steps,
)


def run(config, workdir, *, step=None):
  """Prints parameters, FLOPs and the compiled memory of one training step.

  Args:
    config: all settings, checked.
    workdir: the run's folder, or the folder that training would write to.
    step: the checkpoint whose masks are counted; None for the initial masks.
  """
  if step is None:
    console.say(f"{'workdir':<10} {workdir}")
  parts = settings.training_config(config)
  model = Transformer(parts.model)
  rule = optimizer.make(parts.optimizer, parts.steps)

  def init():
    return steps.init_state(model, rule, parts.seed)

  if step is None:
    # The compiler makes only the part of the initial state that masks need.
    layers = jax.jit(lambda: mask_params(init().params, parts.model))()
  else:
    with checkpoint.Checkpoints(workdir) as saved:
      params, _ = saved.restore_params(step)
    layers = mask_params(params, parts.model)
  state = jax.eval_shape(init)
  streams = batches.per_device(parts.batch_size)
  T = parts.model.context_tokens
  _, sizes = parallel.compile_step(
    steps.make_train_step(model, rule, parts.seed),
    state,
    jax.eval_shape(lambda: steps.start_memory(parts.model, streams)),
    batches.shapes(parts.batch_size, parts.accumulation_steps, T),
  )
  _say_counts(parts, accounting.parameter_count(state.params))
  macs = accounting.attention_macs_per_token(
    layers, parts.model, T, parts.model.memory_tokens
  )
  console.say(
    f"attention  {console.macs_text(macs, parts.model)}, with the masks "
    f"of step {step or 0}"
  )
  for name, size in sizes.items():
    console.say(
      f"memory     {console.bytes_text(size):>10} {name}, per device, compiled"
    )


def _say_counts(parts, parameters: int):
  """Prints what follows from the settings alone."""
  T = parts.model.context_tokens
  tokens = parts.batch_size * T
  flops = accounting.train_flops_per_token(parts.model)
  console.say(
    f"devices    {parallel.device_count()} x {jax.devices()[0].device_kind}"
  )
  console.say(f"parameters {parameters:,} ({parts.model.attention})")
  console.say(
    f"FLOPs      {flops:,.0f} per token, {flops * tokens:,.0f} per step of "
    f"{parts.batch_size} x {T} tokens, with all causal pairs; "
    f"{flops * tokens * parts.steps:.3g} in {parts.steps:,} steps"
  )
