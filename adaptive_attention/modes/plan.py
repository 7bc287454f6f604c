"""Plans a run: counts and compiles what it will take, and allocates nothing."""

import contextlib
import dataclasses
import time

import jax
import numpy as np

from adaptive_attention import accounting
from adaptive_attention.errors import first_line
from adaptive_attention.mask_parameters import mask_params
from adaptive_attention.masks import Mask
from adaptive_attention.model import Transformer
from adaptive_attention.training import (
  batches,
  console,
  exported,
  optimizer,
  parallel,
  regrouping,
  room,
  settings,
  steps,
  targets,
)


def run(config: settings.Checked, workdir, *, step=None):
  """Prints parameters, FLOPs, attention and the memory of a training step.

  Args:
    config: all settings. With a `target` the step is compiled for one device of
      its kind, which has all sequences of the batch.
    workdir: the run's folder, or the folder that training would write to.
    step: the checkpoint whose masks are counted; None for the initial masks.

  Raises:
    SettingsError: the target's compiler is missing, or attention cannot be
      computed there as `model.implementation` says.
  """
  if step is None:
    console.say(f"{'workdir':<10} {workdir}")
  parts = settings.training_config(config)
  target = config.given.target
  model = Transformer(parts.model)
  rule = optimizer.make(parts.optimizer, parts.steps, parts.train_only)
  layers = _masks(parts, rule, workdir, step)
  device = targets.device_of(target) if target else None
  with _on(device):
    if device:
      settings.check_attention(parts.model)
    _say_counts(parts, model, rule, target)
    streams = batches.per_device(parts.batch_size, parts.accumulation_steps)
    found = accounting.attention_choice(parts.model, streams)
    # What is counted is then the same on any device.
    counted = dataclasses.replace(
      parts.model,
      implementation=found.implementation,
      dtype=parts.model.compute_dtype.name,
    )
  _say_attention(counted, found, layers, step or 0)
  with _on(device):
    _say_memory(parts, model, rule, layers, target)


def _on(device):
  """Compiles for a device that is not here, or None for those that are."""
  return parallel.compiling_for(device) if device else contextlib.nullcontext()


def _masks(parts, rule, workdir, step):
  """Returns the masks of all layers: a checkpoint's, or the initial ones."""
  if step is None:
    # Parameters do not depend on what computes attention, here or there.
    anywhere = dataclasses.replace(parts.model, implementation="reference")
    model = Transformer(anywhere)
    # The compiler makes only the part of the initial state that masks need.
    return jax.jit(
      lambda: mask_params(
        steps.init_state(model, rule, parts.seed).params, parts.model
      )
    )()
  with exported.opened(workdir) as saved:
    params, _ = saved.restore_params(step)
  return mask_params(params, parts.model)


def _state(parts, model, rule):
  return jax.eval_shape(lambda: steps.init_state(model, rule, parts.seed))


def _say_counts(parts, model, rule, target):
  """Prints what follows from the settings alone."""
  T = parts.model.context_tokens
  tokens = parts.batch_size * T
  flops = accounting.train_flops_per_token(parts.model)
  parameters = accounting.parameter_count(_state(parts, model, rule).params)
  kind = parallel.local_devices()[0].device_kind
  console.say(
    f"devices    {parallel.device_count()} x {kind}"
    + (f", which is not here, for {target}" if target else "")
  )
  console.say(f"parameters {parameters:,} ({parts.model.attention})")
  console.say(
    f"FLOPs      {flops:,.0f} per token, {flops * tokens:,.0f} per step of "
    f"{parts.batch_size} x {T} tokens, with all causal pairs; "
    f"{flops * tokens * parts.steps:.3g} in {parts.steps:,} steps"
  )


def _say_attention(config, found, layers, step):
  """Prints what computes attention, and how much of it."""
  T = config.context_tokens
  console.say(f"attention  {found}")
  macs = accounting.attention_macs_per_token(
    layers, config, T, config.memory_tokens
  )
  console.say(
    f"attention  {console.macs_text(macs, found)}, "
    f"with the masks of step {step}"
  )
  if found.blocks:
    console.say(
      f"attention  {_computed_share(config, layers):.1%} of the causal blocks "
      f"are computed, with the masks of step {step}"
    )


def _computed_share(config, layers) -> float:
  """Returns which part of the blocks that hold a causal pair is computed."""
  T, memory = config.context_tokens, config.memory_tokens
  whole = Mask(np.full(config.n_head, float(T + memory), np.float32), 1.0)

  def pairs(mask):
    return accounting.computed_pairs(
      *(mask, T, config.implementation, memory),
      *(config.width // config.n_head, config.compute_dtype),
    ).sum()

  return sum(map(pairs, layers)) / (len(layers) * pairs(whole))


def _say_memory(parts, model, rule, layers, target):
  """Compiles a training step and prints its bytes on a device."""
  memory = _memory(parts, layers)
  if parts.model.memory_tokens:
    streams = batches.per_device(parts.batch_size)
    regrouping.say(memory, parts.model, streams)
  if target:
    console.say(f"compiling  a step for {target}, which may take minutes")
  start = time.perf_counter()
  try:
    sizes = _compiled_sizes(parts, model, rule, memory)
  except jax.errors.JaxRuntimeError as error:
    if not target or "RESOURCE_EXHAUSTED" not in str(error):
      raise
    console.say(f"fits       no: {first_line(error)}; {room.ADVICE}")
    return
  for name, size in sizes.items():
    console.say(
      f"memory     {console.bytes_text(size):>10} {name}, per device, compiled"
    )
  if target:
    console.say(
      f"fits       {_fit_text(sizes['total'], target)}; compiled in "
      f"{time.perf_counter() - start:.0f} s"
    )


def _memory(parts, layers):
  """Returns the shapes of a memory for what these masks reach."""
  streams = batches.per_device(parts.batch_size)
  groups = regrouping.groups_for(layers, parts.model)
  return jax.eval_shape(
    lambda: steps.start_memory(parts.model, streams, groups)
  )


def _compiled_sizes(parts, model, rule, memory) -> dict:
  return parallel.compile_step(
    steps.make_train_step(model, rule, parts.seed),
    _state(parts, model, rule),
    memory,
    batches.shapes(
      parts.batch_size, parts.accumulation_steps, parts.model.context_tokens
    ),
  )[1]


def _fit_text(total: int, target: str) -> str:
  """Returns whether so many bytes fit on a target, and what to do if not."""
  there = targets.TARGETS[target].memory_bytes
  text = f"{console.bytes_text(total)} of {console.bytes_text(there)}"
  if total <= there:
    return f"yes, {text}"
  return f"no, {text}; {room.ADVICE}"
