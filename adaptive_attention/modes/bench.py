"""Time and memory of attention, steps and decoding on named shapes.

Machines are noisy: what is compared runs side by side in one process, in turns,
and medians are told.
"""

import dataclasses
import functools
import math
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_attention import accounting, generation
from adaptive_attention.attention import IMPLEMENTATIONS, attend
from adaptive_attention.config import ModelConfig
from adaptive_attention.errors import Error
from adaptive_attention.mask_parameters import mask_params
from adaptive_attention.masks import Mask, Wave
from adaptive_attention.model import Transformer
from adaptive_attention.training import (
  batches,
  checkpoint,
  console,
  logbook,
  optimizer,
  parallel,
  steps,
)
from adaptive_attention.training.settings import model_config, training_config

_HEADS, _HEAD_WIDTH = 8, 64
_LEARNED = (10.0, 20.0, 30.0, 40.0, 60.0, 100.0, 200.0)
_MOST_PAIRS_BYTES = 1 << 30  # of one array over all pairs; several are held
# What the others of a case are measured by: the first of these that ran.
_MEASURES = (
  "reference",
  "torch dense causal",
  "dense, memory 8192",
  "dense",
  "window anew",
)


class BenchmarkError(Error):
  """A comparison that cannot be made."""


@dataclasses.dataclass(frozen=True)
class Shape:
  """A call of attention: B sequences of T tokens, H heads of width K.

  Attributes:
    spans: (H,) z in tokens; None for plain causal attention.
    period: an integer period with one residue open, or None.
    learned: a mask to take instead of these two.
  """

  name: str
  B: int
  T: int
  spans: tuple[float, ...] | None
  period: float | None = None
  learned: Mask | None = None
  H: int = _HEADS
  K: int = _HEAD_WIDTH

  def mask(self):
    if self.learned is not None or self.spans is None:
      return self.learned
    H = self.H
    wave = None
    if self.period:
      # r = -1/4 leaves just the crests above zero.
      wave = Wave(
        jnp.full(H, self.period), jnp.full(H, -0.25), None, integer=True
      )
    return Mask(jnp.array(self.spans), wave=wave)


SHAPES = (
  Shape("512", 4, 512, (*_LEARNED, 256.0)),
  Shape("2048", 2, 2048, (*_LEARNED, 1024.0)),
  Shape("8192", 1, 8192, (*_LEARNED, 4096.0)),
  Shape("8192 first spans", 1, 8192, (*_LEARNED, 256.0)),
  Shape("2048 first spans", 1, 2048, (*_LEARNED, 256.0)),
  Shape("8192 spans 4096", 1, 8192, (4096.0,) * 8),
  Shape("8192 spans 4096, period 4", 1, 8192, (4096.0,) * 8, 4.0),
)


@dataclasses.dataclass(frozen=True)
class Step:
  """A training step of four layers, width 512, dropout 0.2, B x T tokens.

  Attributes:
    spans: z of the eight heads of every layer, cut to what there is to see.
    runs: what is compared: the settings of each model by its name.
  """

  name: str
  B: int
  T: int
  spans: tuple[float, ...]
  runs: dict


_BY_IMPLEMENTATION = {
  name: {"attention": "span_wave", "implementation": name}
  for name in IMPLEMENTATIONS
}
_BY_MEMORY = {
  f"{attention}, memory {memory}": {
    "attention": attention,
    "position": "rotary",
    "memory_tokens": memory,
  }
  for attention, memory in (("span", 512), ("span", 8192), ("dense", 8192))
}
STEPS = (
  Step("step 4 x 512", 4, 512, (*_LEARNED, 256.0), _BY_IMPLEMENTATION),
  Step("step 1 x 2048", 1, 2048, (*_LEARNED, 1024.0), _BY_IMPLEMENTATION),
  Step(
    "step 4 x 512, memory",
    *(4, 512),
    (0.0, 0.0, 10.0, 20.0, 60.0, 150.0, 400.0, 1500.0),
    _BY_MEMORY,
  ),
)


@dataclasses.dataclass(frozen=True)
class Decode:
  """Writing on from a long text: 12 layers, width 512, B texts at once.

  Attributes:
    context_tokens: how far back the longest head could look.
    spans: z of the eight heads of every layer.
    runs: by name (settings of the model, the kind of cache, the position of the
      next token); the cache None reads the whole window anew for each token.
  """

  name: str
  B: int
  context_tokens: int
  spans: tuple[float, ...]
  runs: dict


_DECODED = (0.0, 0.0, 10.0, 20.0, 60.0, 150.0, 400.0, 1500.0)
_COMB = {"attention": "span_wave", "period": "integer", "harmonics": 0}
_LONG = {
  "spans": ({}, "spans", 20_000),
  "spans at 1000": ({}, "spans", 1_000),
  "spans, comb": (_COMB, "spans", 20_000),
  "dense": ({}, "dense", 20_000),
}
_SHORT = {"spans": ({}, "spans", 512), "window anew": ({}, None, 512)}
DECODES = tuple(
  Decode(f"decode {B} x {context}", B, context, spans, runs)
  for context, spans, runs in (
    (8192, _DECODED, _LONG),
    (512, (*_DECODED[:-1], 480.0), _SHORT),
  )
  for B in (1, 8)
)
_DECODE_TOKENS = 32  # a call


@dataclasses.dataclass
class _Runner:
  """Something to time: call it, then see when it is done.

  Attributes:
    name, kind: what runs, and which work of it is timed, as "forward".
    compile_seconds: None for what is not compiled.
  """

  case: str
  name: str
  kind: str
  call: object
  compile_seconds: float | None = None
  temporary_bytes: int | None = None
  counts: dict | None = None
  times: int = 1  # how often a call does what is timed
  seconds: list = dataclasses.field(default_factory=list)

  def row(self):
    return {
      "case": self.case,
      "run": f"{self.name} {self.kind}",
      "median_ms": 1e3 * float(np.median(self.seconds)) / self.times,
      "fastest_ms": 1e3 * min(self.seconds) / self.times,
      "compile_seconds": self.compile_seconds,
      "temporary_bytes": self.temporary_bytes,
      **(self.counts or {}),
    }


def _compiled(case, name, kind, function, *args, pairs=None):
  start = time.perf_counter()
  compiled = jax.jit(function).lower(*args).compile()
  return _Runner(
    case,
    name,
    kind,
    lambda: jax.block_until_ready(compiled(*args)),
    time.perf_counter() - start,
    compiled.memory_analysis().temp_size_in_bytes,
    pairs,
  )


def _arrays(shape):
  random = np.random.default_rng(0)
  size = (shape.B, shape.T, shape.H, shape.K)
  return [random.standard_normal(size, np.float32) for _ in range(4)]


def _attention_runners(shape, implementation):
  """Forward, and forward with all gradients."""
  q, k, v, d_out = map(jnp.asarray, _arrays(shape))
  mask = shape.mask()
  run = functools.partial(attend, implementation=implementation)

  def backward(q, k, v, mask, d_out):
    out, pull = jax.vjp(run, q, k, v, mask)
    return out, pull(d_out)

  T = shape.T
  pairs = {
    "open_pairs": T * (T + 1) // 2 * shape.H
    if mask is None
    else int(accounting.open_pairs(mask, T).sum()),
    "computed_pairs": T * T * shape.H
    if mask is None
    else int(accounting.computed_pairs(mask, T, implementation).sum()),
  }
  name = implementation
  runners = [
    _compiled(shape.name, name, "forward", run, q, k, v, mask, pairs=pairs),
    _compiled(
      shape.name, name, "both", backward, q, k, v, mask, d_out, pairs=pairs
    ),
  ]
  N = parallel.local_device_count()
  if N > 1 and shape.B % N == 0:
    dealt = [x.reshape(N, -1, *x.shape[1:]) for x in (q, k, v, d_out)]
    runners.append(_over_devices(shape, name, backward, mask, dealt, pairs))
  return runners


def _over_devices(shape, name, backward, mask, dealt, pairs):
  """The same batch, dealt to all devices."""
  step = parallel.eval_step(
    lambda mask, _, x: (None, backward(*x[:3], mask, x[3]))
  )
  start = time.perf_counter()
  jax.block_until_ready(step(mask, None, dealt))
  return _Runner(
    shape.name,
    name,
    f"on {parallel.local_device_count()} devices both",
    lambda: jax.block_until_ready(step(mask, None, dealt)),
    time.perf_counter() - start,
    None,
    pairs,
  )


def _torch_runners(shape):
  """PyTorch's dense causal attention, and FlexAttention under the masks."""
  try:
    import torch
    from torch.nn.attention import flex_attention
  except ImportError as error:
    raise BenchmarkError(
      "config.bench.compare=torch needs PyTorch; pip install torch, or leave "
      "it empty"
    ) from error
  q, k, v, d_out = (
    torch.tensor(x).transpose(1, 2).contiguous() for x in _arrays(shape)
  )
  dense = functools.partial(
    torch.nn.functional.scaled_dot_product_attention, is_causal=True
  )
  leaves = [x.clone().requires_grad_() for x in (q, k, v)]

  def forward():
    with torch.no_grad():
      dense(q, k, v)

  def both():
    torch.autograd.grad(dense(*leaves), leaves, d_out)

  runners = [
    _Runner(shape.name, "torch dense causal", "forward", forward),
    _Runner(shape.name, "torch dense causal", "both", both),
  ]
  if shape.spans is not None and shape.period is None:
    runners += _flex_runner(torch, flex_attention, shape, q, k, v)
  return runners


def _flex_runner(torch, flex_attention, shape, q, k, v):
  """Forward alone: FlexAttention has no backward pass on a CPU."""
  spans_H, ramp = torch.tensor(shape.spans), 32.0
  # create_block_mask looks at all pairs by 64-bit indices, several at a time.
  indices = 8 * shape.H * shape.T**2
  if indices > _MOST_PAIRS_BYTES:
    console.say(
      f"{shape.name}: FlexAttention is left out, as its block mask is made of "
      f"{console.bytes_text(indices)} of indices"
    )
    return []

  def open_pair(b, h, t, s):
    return (t >= s) & (t - s < spans_H[h] + ramp)

  def weighted(score, b, h, t, s):
    weight = (spans_H[h] + ramp - (t - s)) / ramp
    return score + torch.log(torch.clamp(weight, 1e-6, 1.0))

  start = time.perf_counter()
  try:
    blocks = flex_attention.create_block_mask(
      open_pair, None, shape.H, shape.T, shape.T, device="cpu"
    )
    run = torch.compile(flex_attention.flex_attention)

    def forward():
      with torch.no_grad():
        run(q, k, v, score_mod=weighted, block_mask=blocks)

    forward()
  except Exception as error:  # of a compiler that may be missing or refuse
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    console.say(f"{shape.name}: FlexAttention does not run here ({reason})")
    return []
  return [
    _Runner(
      shape.name,
      "torch FlexAttention",
      "forward",
      forward,
      time.perf_counter() - start,
    )
  ]


def _step_runner(config, shape, name):
  """A whole training step, in the midst of a stream if there is a memory."""
  settings = shape.runs[name]
  seen = settings.get("memory_tokens") or shape.T
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.batch_size, config.accumulation_steps = shape.B, 1
    defaults = {
      "n_layer": 4,
      "n_head": _HEADS,
      "width": _HEADS * _HEAD_WIDTH,
      "context_tokens": shape.T,
      "max_span": seen,
      "dropout": 0.2,
    }
    config.model.update(defaults | settings)
  parts = training_config(config)
  model = Transformer(parts.model)
  rule = optimizer.make(parts.optimizer, parts.steps)
  state = jax.device_get(steps.init_state(model, rule, parts.seed))
  # Within (0, seen), as a sigmoid is.
  share_H = np.clip(np.array(shape.spans) / seen, 1e-6, 1 - 1e-6)
  params = _with_span_logits(state.params, np.log(share_H / (1 - share_H)))
  memory = steps.start_memory(parts.model, batches.per_device(shape.B))
  if jax.tree.leaves(memory):
    memory = memory.replace(
      tokens_read=memory.tokens_read + np.uint32(memory.layers[0].k.shape[2])
    )
  carried = [parallel.replicate(state.replace(params=params)), memory]
  shapes = batches.shapes(shape.B, 1, shape.T)
  batch = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
  start = time.perf_counter()
  step, sizes = parallel.compile_step(
    steps.make_train_step(model, rule, parts.seed), *carried, shapes
  )

  def call():  # state and memory are donated
    *carried[:], metrics = step(*carried, batch)
    jax.block_until_ready((carried, metrics))

  return _Runner(
    shape.name,
    name,
    "step",
    call,
    time.perf_counter() - start,
    sizes["temporary"],
  )


def _decode_runner(shape, name):
  """Token after token out of one cache, which is in the midst of a text."""
  settings, cache, position = shape.runs[name]
  ramp = ModelConfig.ramp
  config = ModelConfig(
    context_tokens=shape.context_tokens,
    max_span=shape.context_tokens - ramp,
    position="rotary",
    **{"attention": "span"} | settings,
  )
  model = Transformer(config)
  tokens_BT = jnp.zeros(
    (shape.B, shape.context_tokens if cache is None else 1), int
  )
  params = jax.jit(model.init)(jax.random.key(0), tokens_BT[:, :1])["params"]
  share_H = np.clip(np.array(shape.spans) / config.max_span, 1e-6, 1 - 1e-6)
  params = _with_span_logits(params, np.log(share_H / (1 - share_H)))
  params = _with_combs(params)
  layers = mask_params(params, config)
  start = time.perf_counter()
  if cache is None:
    read = jax.jit(lambda params, x: model.apply({"params": params}, x)[:, -1])

    def call():
      jax.block_until_ready(read(params, tokens_BT))

    call()
    return _Runner(shape.name, name, "token", call, time.perf_counter() - start)
  logits_BV, kept = generation.prefill(params, config, tokens_BT, cache)
  carried = [logits_BV, kept.replace(tokens_read=jnp.uint32(position))]

  def call():
    _, *carried[:] = generation.go_on(
      params,
      config,
      carried[1],
      carried[0],
      jax.random.split(jax.random.key(0), shape.B),
      0,
      _DECODE_TOKENS,
      (1.0, 0, 1.0),
    )
    jax.block_until_ready(carried)

  call()
  reads = accounting.cache_reads(layers, config)
  return _Runner(
    shape.name,
    name,
    "token",
    call,
    time.perf_counter() - start,
    None,
    {
      "cache_bytes": kept.nbytes // shape.B,
      "seen_bytes": accounting.cache_bytes(layers, config)["seen"],
      "keys_read": reads["dense" if cache == "dense" else "rings"],
    },
    _DECODE_TOKENS,
  )


def _with_combs(params):
  """Where there are waves: of period 4 with one residue open in the head of the
  longest span, of a period that leaves all open in the others."""

  def changed(path, leaf):
    last = np.arange(len(leaf)) == len(leaf) - 1 if leaf.ndim == 1 else None
    match path[-1].key:
      case "period_logit":  # 2 + 6 / 3 = 4, and 2
        return jnp.where(last, -math.log(2), -20.0)
      case "ratio_logit":  # r = -1/4, and 1/4
        return jnp.where(last, -20.0, 20.0)
    return leaf

  return jax.tree_util.tree_map_with_path(changed, params)


def _with_span_logits(params, logit_H):
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: (
      logit_H.astype(leaf.dtype) if path[-1].key == "span_logit" else leaf
    ),
    params,
  )


def _learned_shapes(folder):
  """The layers of a trained run, as shapes with their masks."""
  with checkpoint.Checkpoints(folder) as saved:
    step = saved.resolve("latest")
    params, meta = saved.restore_params(step)
  config = model_config(meta["config"]["model"])
  return [
    Shape(
      f"layer {i} of step {step}",
      1,
      config.context_tokens,
      spans=None,
      learned=jax.tree.map(jnp.asarray, mask),
      H=config.n_head,
      K=config.width // config.n_head,
    )
    for i, mask in enumerate(mask_params(params, config))
  ]


def _time(runners, repeats):
  """All of them once to warm up, then in turns."""
  for turn in range(repeats + 1):
    for runner in runners:
      start = time.perf_counter()
      runner.call()
      if turn:
        runner.seconds.append(time.perf_counter() - start)


def run(config, workdir):
  """Times every shape by every implementation; a table, and bench.json.

  bench.json is whole after each case, so that a bench that is stopped keeps
  what it has timed.

  Args:
    config: `bench` says what to compare with, how often, and on which shapes.
    workdir: the folder for bench.json, made if absent.

  Raises:
    BenchmarkError: a shape that there is not, or PyTorch is missing.
    LogbookError: bench.json cannot be written; its rows are told first.
  """
  settings = config.bench
  cases = (*SHAPES, *STEPS, *DECODES)
  if settings.checkpoint:
    cases = _learned_shapes(settings.checkpoint)
  names = [case.name for case in cases]
  wanted = settings.shapes.split(";") if settings.shapes else names
  for name in wanted:
    if name not in names:
      raise BenchmarkError(
        f"config.bench.shapes has {name!r}; expected some of {names}, "
        "parted by ;"
      )
  path = pathlib.Path(workdir) / "bench.json"
  with logbook.writing(path.parent):
    path.parent.mkdir(parents=True, exist_ok=True)
  content = {"environment": logbook.environment(), "rows": []}
  for case in cases:
    runners = _runners(config, case) if case.name in wanted else []
    if not runners:
      continue
    _time(runners, settings.repeats)
    content["rows"] += [runner.row() for runner in runners]
    try:  # told first, and kept even if nobody reads it
      _say(runners)
    finally:
      logbook.write_json(path, content)
  if content["rows"]:
    console.say(f"written to {path}")


def _runners(config, case):
  """What is timed of a case, in turns; nothing if it cannot be here."""
  match case:
    case Shape():
      return _shape_runners(case, config.bench)
    case Step() if case.B % parallel.device_count():
      console.say(
        f"{case.name}: left out, as {case.B} sequences cannot be dealt to "
        f"{parallel.device_count()} devices"
      )
      return []
    case Step():
      return [_step_runner(config, case, name) for name in case.runs]
    case Decode():
      return [_decode_runner(case, name) for name in case.runs]


def _shape_runners(shape, settings):
  runners = []
  for implementation in IMPLEMENTATIONS:
    logits = 4 * shape.B * shape.H * shape.T**2
    if implementation == "reference" and logits > _MOST_PAIRS_BYTES:
      console.say(
        f"{shape.name}: reference is left out, as its logits alone are "
        f"{console.bytes_text(logits)}"
      )
      continue
    runners += _attention_runners(shape, implementation)
  if settings.compare == "torch":
    runners += _torch_runners(shape)
  return runners


def _say(runners):
  """A table of one case, each row beside what it is measured by."""
  for runner in runners:
    row = runner.row()
    text = f"{row['case']:<26} {row['run']:<28} {row['median_ms']:9.1f} ms"
    measure = _measure(runner, runners)
    if measure is not None:
      times = row["median_ms"] / measure.row()["median_ms"]
      text += f"  {times:5.2f} x of {measure.name}"
    if runner.compile_seconds is not None:
      text += f"  compiled in {runner.compile_seconds:5.1f} s"
    if runner.temporary_bytes is not None:
      text += f"  temporary {console.bytes_text(runner.temporary_bytes)}"
    if row.get("open_pairs"):
      ratio = row["computed_pairs"] / row["open_pairs"]
      text += f"  computed / open {ratio:.2f}"
    if "cache_bytes" in row:
      text += (
        f"  cache {console.bytes_text(row['cache_bytes'])} a text, "
        f"{row['keys_read']:,} keys read"
      )
    console.say(text)


def _measure(runner, runners):
  """Whatever does the same work and is what others are measured by, or None."""
  others = {other.name: other for other in runners if other.kind == runner.kind}
  found = next((others[name] for name in _MEASURES if name in others), None)
  return None if found is runner else found
