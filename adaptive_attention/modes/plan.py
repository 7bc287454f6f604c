"""What a run will take: counted and compiled, not allocated, not trained."""

import jax

from adaptive_attention import accounting
from adaptive_attention.config import ModelConfig
from adaptive_attention.mask_parameters import mask_params
from adaptive_attention.training import (
  checkpoint,
  console,
  parallel,
  steps,
)


def run(config, workdir, *, step=None):
  """Prints parameters, FLOPs and the compiled memory of one training step.

  Args:
    config: all settings, checked.
    workdir: the run's folder, or the one that a training would write.
    step: the checkpoint whose masks are counted; the initial ones if None.
  """
  if step is None:
    console.say(f"{'workdir':<10} {workdir}")
  model_config = ModelConfig(**config.model)
  state = jax.eval_shape(lambda: steps.init_state(config))
  T = model_config.context_tokens
  tokens = config.batch_size * T
  flops = accounting.train_flops_per_token(model_config)
  if step is None:
    # Of the initial state the compiler makes only what the masks are made of.
    layers = jax.jit(
      lambda: mask_params(steps.init_state(config).params, model_config)
    )()
  else:
    with checkpoint.Checkpoints(workdir) as saved:
      params, _ = saved.restore_params(step)
    layers = mask_params(params, model_config)
  macs = accounting.attention_macs_per_token(
    layers, model_config, T, model_config.memory_tokens
  )
  streams = steps.streams_per_device(config)
  _, memory = parallel.compile_step(
    steps.make_train_step(config),
    state,
    jax.eval_shape(lambda: steps.start_memory(model_config, streams)),
    steps.batch_shapes(config),
  )
  console.say(
    f"devices    {parallel.device_count()} x {jax.devices()[0].device_kind}"
  )
  console.say(
    f"parameters {accounting.parameter_count(state.params):,} "
    f"({model_config.attention})"
  )
  console.say(
    f"FLOPs      {flops:,.0f} a token, {flops * tokens:,.0f} a step of "
    f"{config.batch_size} x {T} tokens, with all causal pairs; "
    f"{flops * tokens * config.steps:.3g} in {config.steps:,} steps"
  )
  console.say(
    f"attention  {console.macs_text(macs, model_config)}, with the masks "
    f"of step {step or 0}"
  )
  for name, size in memory.items():
    console.say(
      f"memory     {console.bytes_text(size):>10} {name}, per device, compiled"
    )
