"""The runners of each case: what is timed on this machine."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_attention import accounting, generation, segment_memory
from adaptive_attention.attention import IMPLEMENTATIONS, attend, choice
from adaptive_attention.bench import cases, device, torch
from adaptive_attention.bench.cases import Case, Decode, Step
from adaptive_attention.bench.timing import Runner, compiled
from adaptive_attention.bench.trained import Pass, Writing
from adaptive_attention.config import ModelConfig
from adaptive_attention.mask_parameters import mask_params, with_lengths
from adaptive_attention.model import Transformer
from adaptive_attention.training import (
  batches,
  console,
  evaluator,
  optimizer,
  parallel,
  protocols,
  regrouping,
  steps,
)
from adaptive_attention.training.settings import with_model
from adaptive_attention.training.training_config import TrainingConfig

MOST_PAIRS_BYTES = 1 << 30  # of one array over all pairs; several are held
_DECODE_TOKENS = 32  # per call


def of(
  case: Case | Step | Decode | Pass | Writing,
  config: TrainingConfig,
  *,
  compare="",
) -> list[Runner]:
  """Returns the runners of a case.

  If the case cannot run here, a line says why, and the list is empty.

  Args:
    case: one of `cases` or `trained`; on an accelerator a call of attention is
      timed beside what others have there.
    config: the settings that a training step does not take from its case.
    compare: "torch" to time PyTorch's attention too.

  Raises:
    BenchmarkError: PyTorch is asked for and not installed.
  """
  match case:
    case Case() if jax.default_backend() != "cpu":
      theirs = torch.runners_on_gpu(case) if compare == "torch" else []
      return device.runners(case, MOST_PAIRS_BYTES) + theirs
    case Case():
      found = [
        runner
        for implementation in _serving(case)
        for runner in _attention_runners(case, implementation)
      ]
      theirs = compare == "torch"
      return found + (torch.runners(case, MOST_PAIRS_BYTES) if theirs else [])
    case Step() | Pass() if case.B % parallel.device_count():
      console.say(
        f"{case.name}: left out, as {case.B} sequences cannot be dealt to "
        f"{parallel.device_count()} devices"
      )
      return []
    case Step():
      return [
        _step_runner(config, case, name)
        for name, run in case.runs.items()
        if not choice.refusal_of_device(run.get("implementation", ""))
      ]
    case Decode():
      return [_decode_runner(case, name) for name in case.runs]
    case Pass():
      made = _training_runner if case.trains else _evaluation_runner
      return [made(config, case, name) for name in case.runs]
    case Writing():
      return [_writing_runner(case, name) for name in case.runs]


def _serving(case: Case) -> list[str]:
  """Returns which implementations serve a call on this device."""
  q, k, _, _ = jax.eval_shape(lambda: cases.inputs(case))
  call = choice.call_of(q, k, mask=case.mask, memory=case.memory)
  return [name for name in IMPLEMENTATIONS if not choice.refusal(call, name)]


def _attention_runners(case, implementation):
  """Makes the runners of forward, and of forward with all gradients."""
  logits = 4 * case.B * case.H * case.T * case.S
  if implementation == "reference" and logits > MOST_PAIRS_BYTES:
    console.say(
      f"{case.name}: reference is left out, as its logits alone are "
      f"{console.bytes_text(logits)}"
    )
    return []
  q, k, v, dout = cases.inputs(case)
  mask = case.mask
  run = functools.partial(attend, implementation=implementation, **case.options)

  def both(q, k, v, mask, dout):
    out, pull = jax.vjp(run, q, k, v, mask)
    return out, pull(dout)

  pairs = _pairs(mask, case, implementation)
  name = (case.name, implementation)
  found = [
    compiled(*name, "forward", run, q, k, v, mask, counts=pairs),
    compiled(*name, "both", both, q, k, v, mask, dout, counts=pairs),
  ]
  N = parallel.local_device_count()
  if N > 1 and case.B % N == 0:
    dealt = [x.reshape(N, -1, *x.shape[1:]) for x in (q, k, v, dout)]
    found.append(_over_devices(name, both, mask, dealt, pairs))
  return found


def _pairs(mask, case, implementation):
  """Counts the open and the computed pairs of all heads."""
  T = case.T
  if mask is None:
    opened, computed = T * (T + 1) // 2 * case.H, T * T * case.H
  else:
    opened = accounting.open_pairs(mask, T).sum()
    computed = accounting.computed_pairs(
      mask, T, implementation, head_width=case.K, dtype=case.dtype
    ).sum()
  return {"open_pairs": int(opened), "computed_pairs": int(computed)}


def _over_devices(name, both, mask, dealt, pairs):
  """Makes the runner of the same batch, dealt to all devices."""
  step = parallel.eval_step(lambda mask, _, x: (None, both(*x[:3], mask, x[3])))
  start = time.perf_counter()
  jax.block_until_ready(step(mask, None, dealt))
  return Runner(
    *name,
    f"on {parallel.local_device_count()} devices both",
    lambda: jax.block_until_ready(step(mask, None, dealt)),
    time.perf_counter() - start,
    None,
    pairs,
  )


def _step_runner(config, case, name):
  """Makes the runner of a training step.

  If the model has a memory, the step is in the middle of a stream.
  """
  defaults = {
    "n_layer": 4,
    "n_head": cases.HEADS,
    "n_kv_head": 0,
    "width": cases.HEADS * cases.HEAD_WIDTH,
    "context_tokens": case.T,
    "max_span": case.runs[name].get("memory_tokens") or case.T,
    "dropout": 0.2,
  }
  config = with_model(config, **defaults | case.runs[name])
  init = jax.jit(Transformer(config.model).init)
  params = init(jax.random.key(config.seed), jnp.zeros((1, 1), int))["params"]
  params = _with_spans(params, case.spans, config.model)
  return _runner_of_step(case, name, "step", config, params)


def _training_runner(config, case, name):
  """Makes the runner of a training step of a trained model, by its tokens."""
  params, model = case.runs[name]
  config = dataclasses.replace(config, model=model)
  runner = _runner_of_step(case, name, "token", config, params)
  return dataclasses.replace(runner, times=case.B * model.context_tokens)


def _evaluation_runner(_, case, name):
  """Makes the runner of an evaluation by a trained model, by its tokens."""
  params, model = case.runs[name]
  tokens = case.B * model.context_tokens
  data = np.arange(tokens + 1) % model.vocab_size
  predict = evaluator.Evaluator(Transformer(model), case.B)
  params = parallel.replicate(params)

  def call():
    predict.losses(params, data, "window")

  start = time.perf_counter()
  call()
  seconds = time.perf_counter() - start
  return Runner(case.name, name, "token", call, seconds, times=tokens)


def _runner_of_step(case, name, kind, config, params):
  """Makes the runner of a training step that begins with these parameters."""
  model = Transformer(config.model)
  rule = optimizer.make(config.optimizer, config.steps, config.train_only)
  layers = mask_params(params, config.model)
  groups = regrouping.groups_for(layers, config.model)
  memory = steps.start_memory(config.model, batches.per_device(case.B), groups)
  read = np.uint32(config.model.context_tokens + config.model.memory_tokens)
  memory = memory.at(memory.tokens_read + read)
  state = steps.TrainState(np.int32(0), params, jax.jit(rule.init)(params))
  carried = [parallel.replicate(state), memory]
  shapes = batches.shapes(case.B, 1, config.model.context_tokens)
  batch = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
  start = time.perf_counter()
  step, sizes = parallel.compile_step(
    steps.make_train_step(model, rule, config.seed), *carried, shapes
  )

  def call():  # state and memory are donated
    *carried[:], metrics = step(*carried, batch)
    jax.block_until_ready((carried, metrics))

  seconds = time.perf_counter() - start
  counts = _memory_counts(memory, layers, config.model, case.B)
  return Runner(
    case.name, name, kind, call, seconds, sizes["temporary"], counts
  )


def _memory_counts(memory, layers, config, streams):
  """Returns bytes of a memory, and of what heads reach of it and a segment."""
  if not config.memory_tokens:
    return None
  T = config.context_tokens
  reach_LG = np.array(segment_memory.reaches(layers, config, T))
  reached = int((reach_LG + T - 1).sum()) * config.key_value_bytes * streams
  return {"memory_bytes": memory.nbytes, "reach_bytes": reached}


def _decode_runner(case, name):
  """Makes the runner that writes token after token in the middle of a text."""
  settings, kind, position = case.runs[name]
  config = ModelConfig(
    context_tokens=case.context_tokens,
    max_span=case.context_tokens - ModelConfig.ramp,
    position="rotary",
    **{"attention": "span"} | settings,
  )
  model = Transformer(config)
  first_B1 = jnp.zeros((case.B, 1), int)
  params = jax.jit(model.init)(jax.random.key(0), first_B1)["params"]
  params = _with_waves(_with_spans(params, case.spans, config), config)
  if kind is not None:
    return _cache_runner(case, name, params, config, kind, position)
  start = time.perf_counter()
  call = _by_context(model, params, case)
  call()
  return Runner(case.name, name, "token", call, time.perf_counter() - start)


def _writing_runner(case, name):
  """Makes the runner of generation by a trained model."""
  memory, kind = case.runs[name]
  config = case.config
  if memory:
    config = protocols.model_for(f"memory:{memory}", config)
  position = max(1, config.max_context_tokens - _DECODE_TOKENS)
  params = jax.device_put(case.params)
  return _cache_runner(case, name, params, config, kind, position)


def _cache_runner(case, name, params, config, kind, position):
  """Makes the runner that draws tokens after `position` others."""
  start = time.perf_counter()
  cache, call = _by_cache(params, config, case, kind, position)
  call()
  return Runner(
    *(case.name, name, "token", call, time.perf_counter() - start),
    counts=_cache_counts(params, config, cache.nbytes // case.B, kind),
    times=_DECODE_TOKENS,
  )


def _by_context(model, params, case):
  """Makes a call that reads all of the context for one token."""
  tokens_BT = jnp.zeros((case.B, case.context_tokens), int)
  read = jax.jit(lambda params, x: model.apply({"params": params}, x)[:, -1])
  return lambda: jax.block_until_ready(read(params, tokens_BT))


def _by_cache(params, config, case, kind, position):
  """Makes (cache, a call that draws some tokens one after the other)."""
  first_B1 = jnp.zeros((case.B, 1), int)
  logits_BV, cache = generation.prefill(params, config, first_B1, kind)
  carried = [logits_BV, cache]

  def call():
    _, *carried[:] = generation.go_on(
      params,
      config,
      carried[1].at(jnp.uint32(position)),
      carried[0],
      jax.random.split(jax.random.key(0), case.B),
      0,
      _DECODE_TOKENS,
      (1.0, 0, 1.0),
    )
    jax.block_until_ready(carried)

  return cache, call


def _cache_counts(params, config, cache_bytes, kind):
  """Returns the bytes and keys of one text, as a row holds them."""
  layers = mask_params(params, config)
  reads = accounting.cache_reads(layers, config)
  return {
    "cache_bytes": cache_bytes,
    "reach_bytes": accounting.cache_bytes(layers, config)["reach"],
    "keys_read": reads["dense" if kind == "dense" else "cache"],
  }


def _with_spans(params, spans, config: ModelConfig):
  """Returns parameters with these spans, within their bounds.

  Args:
    spans: of the heads of every layer, or of each layer in turn.
  """
  shape = config.n_layer, config.n_head
  layers = iter(np.broadcast_to(np.array(spans), shape))

  def changed(name, length):
    return next(layers) if name == "span_logit" else length

  return with_lengths(params, config, changed)


def _with_waves(params, config: ModelConfig):
  """Returns parameters with other waves, if there are waves.

  The head of the longest span has period 4 and one open residue. The waves of
  the other heads leave everything open.
  """

  def changed(name, length):
    last = np.arange(len(length)) == len(length) - 1
    match name:
      case "period_logit":
        return np.where(last, 4.0, config.period_min)
      case "ratio_logit":
        return np.where(last, config.ratio_min, config.ratio_max)
    return length

  return with_lengths(params, config, changed)
