"""Training: from step 0 or the newest checkpoint to the last step."""

import collections
import dataclasses
import math
import pathlib
import signal
import time

import jax
import numpy as np
from ml_collections import ConfigDict

from adaptive_attention import (
  accounting,
  batches,
  checkpoint,
  evaluate,
  generate,
  logbook,
  parallel,
  settings,
  steps,
  weights,
)
from adaptive_attention.model import ModelConfig

_PROMPT_BYTES, _SAMPLE_BYTES = 32, 200


class TrainingError(Exception):
  """A run that cannot go on."""


class Stopped(Exception):
  """A signal ended the run after its step was finished and saved.

  Attributes:
    exit_code: 128 + the number of the signal, as a shell has it.
  """

  def __init__(self, message, signal_number):
    super().__init__(message)
    self.exit_code = 128 + signal_number


class _Signals:
  """Notes SIGTERM and SIGINT; a second one of the kind acts at once."""

  def __enter__(self):
    self.received = None
    self._previous = {
      number: signal.signal(number, self._note)
      for number in (signal.SIGTERM, signal.SIGINT)
    }
    return self

  def _note(self, number, _frame):
    self.received = number
    signal.signal(number, self._previous[number])

  def __exit__(self, *_):
    for number, handler in self._previous.items():
      signal.signal(number, handler)


def run(config, workdir, corpus, *, step=None):
  """Trains into `workdir`; called again, it goes on from the newest step.

  Args:
    config: all settings, checked.
    workdir: the run's folder, made if absent.
    corpus: `train` and `valid` splits, `name` and `sha256`.
    step: the checkpoint to go on from, instead of the newest; later ones are
      set aside.

  Raises:
    TrainingError: a loss or gradient that is not finite, or a workdir that
      belongs to other data.
    Stopped: SIGTERM or SIGINT, after the state was saved.
  """
  workdir = pathlib.Path(workdir)
  if not parallel.is_primary():
    return _run(config, workdir, corpus, step)
  workdir.mkdir(parents=True, exist_ok=True)
  with checkpoint.lock(workdir):
    return _run(config, workdir, corpus, step)


def _run(config, workdir, corpus, step):
  with (
    _Signals() as signals,
    checkpoint.Checkpoints(workdir, keep=config.keep_checkpoints) as saved,
  ):
    state, first_step = _start_state(config, corpus, saved, step)
    _say_start(config, workdir, corpus, state, first_step)
    if first_step >= config.steps:
      logbook.say(
        f"already trained for {first_step} of {config.steps} steps; give "
        "--config.steps more to go on"
      )
      return
    memory = _start_memory(config, saved, first_step)
    state = parallel.replicate(state)
    train_step = _compile(config, state, memory)
    with logbook.Logbook(workdir, config, first_step) as book:
      run = _Run(config, corpus, saved, book, signals, train_step)
      run.loop(state, memory, first_step)


def _start_state(config, corpus, saved, which):
  """The state to go on from and its step: restored, read in, or new."""
  state = jax.device_get(steps.init_state(config))
  if not saved.steps():
    if which is not None:
      raise TrainingError(
        f"--step={which} names no checkpoint, as there is none yet; leave it "
        "out to start from the beginning"
      )
    if config.init_from:
      params = weights.load(config.init_from, ModelConfig(**config.model))
      state = state.replace(params=params)
    return state, 0
  first_step = saved.resolve("latest" if which is None else which)
  params, opt_state, meta = saved.restore(
    first_step, state.params, state.opt_state
  )
  _check_resumed(config, corpus, meta, first_step)
  if which is not None and parallel.is_primary():
    moved = saved.set_aside_after(first_step)
    if moved:
      logbook.say(f"set aside: the later checkpoints {moved}")
  return (
    state.replace(
      step=np.asarray(first_step, np.int32), params=params, opt_state=opt_state
    ),
    first_step,
  )


def _start_memory(config, saved, first_step):
  """What this process' devices remember of their streams; None without."""
  memory = steps.start_memory(
    ModelConfig(**config.model), steps.streams_per_device(config)
  )
  if memory is None or not first_step:
    return memory
  N = parallel.device_count()
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((N, *x.shape[1:]), x.dtype), memory
  )
  restored = saved.restore_memory(first_step, like)
  if restored is None:
    logbook.say(
      "memory     empty: the streams restart, as the checkpoint's are not "
      f"those of {N} device(s) with {steps.streams_per_device(config)} "
      f"sequences each in {like.k[0].dtype}"
    )
    return memory
  return parallel.deal(
    jax.tree.map(lambda x: x[parallel.local_shards()], restored)
  )


def _check_resumed(config, corpus, meta, step):
  if meta["data"]["sha256"] != corpus.sha256:
    raise TrainingError(
      f"the checkpoint of step {step} was trained on {meta['data']['name']} "
      f"(sha256 {meta['data']['sha256'][:12]}...), not on {corpus.name} "
      f"({corpus.sha256[:12]}...); give that data, or another --workdir"
    )
  changed = settings.changes(meta["config"], config)
  for name, (old, new) in changed.items():
    if settings.fixes_the_model(name):
      raise settings.SettingsError(
        f"config.{name}={new!r} does not fit the checkpoint of step {step}, "
        f"which was trained with {old!r}; leave it so, or give another "
        "--workdir"
      )
  if changed:
    logbook.say(
      "changed since the checkpoint: "
      + ", ".join(
        f"{n}={new!r} (was {old!r})" for n, (old, new) in changed.items()
      )
    )


def _compile(config, state, memory):
  start = time.perf_counter()
  step, sizes = parallel.compile_step(
    steps.make_train_step(config), state, memory, steps.batch_shapes(config)
  )
  if sizes:
    logbook.say(
      f"compiled   in {time.perf_counter() - start:.1f} s; bytes per device "
      f"{logbook.bytes_text(sizes['total'])}, of it temporary "
      f"{logbook.bytes_text(sizes['temporary'])}"
    )
  return step


def _say_start(config, workdir, corpus, state, first_step):
  model_config = ModelConfig(**config.model)
  T = model_config.context_tokens
  flops = accounting.train_flops_per_token(model_config)
  tokens = config.batch_size * T
  lines = {
    "devices": f"{parallel.device_count()} x {jax.devices()[0].device_kind}, "
    f"{jax.process_count()} process(es)",
    "workdir": str(workdir),
    "data": f"{corpus.name}, sha256 {corpus.sha256}; train "
    f"{len(corpus.train):,}, valid {len(corpus.valid):,}, test "
    f"{len(corpus.test):,} bytes",
    "model": f"{model_config.attention}, "
    f"{accounting.parameter_count(state.params):,} parameters, "
    f"computed in {model_config.compute_dtype}",
    "step": f"{config.batch_size} x {T} = {tokens:,} tokens, "
    f"{flops * tokens / 1e12:.3g} TFLOP with all causal pairs",
    "start": f"step {first_step} of {config.steps}"
    + (" (resumed)" if first_step else ""),
  }
  for name, text in lines.items():
    logbook.say(f"{name:<10} {text}")


@dataclasses.dataclass
class _Run:
  """What the loop works with, and where its clock stands."""

  config: ConfigDict
  corpus: object
  saved: checkpoint.Checkpoints
  book: logbook.Logbook
  signals: _Signals
  train_step: object

  def __post_init__(self):
    config = self.config
    self.model_config = ModelConfig(**config.model)
    self.evaluator = evaluate.Evaluator(
      self.model_config, config.eval_batch_size
    )
    shards = parallel.local_shards()
    self.shards = {
      i: batches.shard(self.corpus.train, i, parallel.device_count())
      for i in shards
    }
    self.start_clock = time.perf_counter()

  def loop(self, state, memory, first_step):
    """Steps until the last one or a signal; the host reads one step behind."""
    self.logged_step, self.logged_at = first_step, time.perf_counter()
    self.saved_step = first_step if self.saved.steps() else None
    config = self.config
    waiting = collections.deque()
    for done in range(first_step + 1, config.steps + 1):
      state, memory, metrics = self.train_step(
        state, memory, self._batch(done - 1)
      )
      waiting.append((done, metrics))
      stop = len(waiting) > 1 and self._read(*waiting.popleft())
      last = done == config.steps
      evaluates = last or done % config.eval_every_steps == 0
      saves = evaluates or done % config.checkpoint_every_steps == 0
      if stop or saves:
        # Nothing is saved that was not seen to be finite.
        stop |= self._read(*waiting.popleft())
        bits_per_char = self._evaluate(state, done) if evaluates else None
        self._save(state, memory, done, bits_per_char)
      if config.sample_every_steps and done % config.sample_every_steps == 0:
        self._sample(state, done)
      if stop and not last:
        name = signal.Signals(self.signals.received or signal.SIGTERM).name
        raise Stopped(
          f"stopped by {name} after step {done}, which is saved; the same "
          "command goes on from there",
          self.signals.received or signal.SIGTERM,
        )

  def _batch(self, step) -> steps.Batch:
    config = self.config
    A = config.accumulation_steps
    B, T = steps.streams_per_device(config), config.model.context_tokens
    draw, restart = batches.train_batch, False
    if config.model.memory_tokens:
      draw = batches.stream_batch
      shard = next(iter(self.shards.values()))  # all are of one length
      restart = step % batches.segments(len(shard), B, T) == 0
    tokens_NBT = np.stack(
      [
        draw(
          data,
          seed=config.seed,
          step=step,
          shard_index=i,
          batch_size=B,
          context_tokens=T,
        )
        for i, data in self.shards.items()
      ]
    )
    N = len(self.shards)
    return steps.Batch(
      tokens_NBT.reshape(N, A, B // A, T + 1),
      np.full(N, self.signals.received is not None, np.int32),
      np.full(N, restart),
    )

  def _read(self, done, metrics) -> bool:
    """Waits for a step's numbers, logs them; whether a signal came in."""
    layers = metrics.pop("masks")
    metrics = {name: float(value) for name, value in metrics.items()}
    for name in ("loss", "grad_norm"):
      if not math.isfinite(metrics[name]):
        kept = (
          f"the checkpoint of step {self.saved_step} is kept"
          if self.saved_step is not None
          else "no checkpoint had been saved yet"
        )
        raise TrainingError(
          f"{name}={metrics[name]} at step {done}, which was not made ({kept});"
          " lower optimizer.learning_rate or raise optimizer.warmup_steps"
        )
    config = self.config
    if done % config.log_every_steps == 0 or done == config.steps:
      self._log(done, metrics, layers)
    return metrics["stop"] > 0

  def _log(self, done, metrics, layers):
    config = self.config
    now = time.perf_counter()
    seconds = (now - self.logged_at) / (done - self.logged_step)
    self.logged_step, self.logged_at = done, now
    tokens_per_second = (
      config.batch_size * config.model.context_tokens / seconds
    )
    bits_per_char = metrics["cross_entropy"] / math.log(2)
    self.book.write(
      done,
      "train",
      loss=metrics["loss"],
      bits_per_char=bits_per_char,
      tokens_per_second=tokens_per_second,
      **{
        name: metrics[name]
        for name in ("learning_rate", "grad_norm", "span_mean", "open_share")
      },
      span_max=max(float(np.max(mask.span)) for mask in layers),
      span_by_layer=[float(np.mean(mask.span)) for mask in layers],
      attention_macs_per_token=accounting.attention_macs_per_token(
        layers,
        self.model_config,
        config.model.context_tokens,
        config.model.memory_tokens,
      ),
    )
    remaining = logbook.duration_text(seconds * (config.steps - done))
    logbook.say(
      f"step {done:>6} {100 * done / config.steps:5.1f}%  "
      f"loss {metrics['loss']:.4f}  bpc {bits_per_char:.4f}  "
      f"lr {metrics['learning_rate']:.2e}  grad {metrics['grad_norm']:.3f}  "
      f"span {metrics['span_mean']:.1f}  open {metrics['open_share']:.3f}  "
      f"{1000 * seconds:.0f} ms  {tokens_per_second:,.0f} tok/s  "
      f"eta {remaining}"
    )

  def _evaluate(self, state, done) -> float:
    began = time.perf_counter()
    data = self.corpus.valid
    if self.config.eval_tokens:
      data = data[: self.config.eval_tokens]
    protocol = evaluate.default_protocol(self.model_config)
    result = self.evaluator(state.params, data, protocol)
    seconds = time.perf_counter() - began
    self.logged_at += seconds  # the rate of training is without it
    self.book.write(
      done,
      "valid",
      loss=result.loss,
      bits_per_char=result.bits_per_char,
      stderr=result.stderr,
      bytes=result.bytes,
      tokens_per_second=result.tokens_per_second,
    )
    text = (
      f"valid {done:>5} bpc {result.bits_per_char:.4f} +- {result.stderr:.4f} "
      f"over {result.bytes:,} bytes in {seconds:.1f} s"
    )
    if done == self.config.steps:
      text += (
        f"; the same bytes have an order-0 entropy of "
        f"{evaluate.order0_entropy(data):.4f}, and lzma takes "
        f"{evaluate.lzma_bits_per_char(data):.4f}"
      )
    logbook.say(text)
    return result.bits_per_char

  def _sample(self, state, done):
    """Says what the model writes now; no figure, and no setting, follows."""
    began = time.perf_counter()
    if parallel.is_primary():
      prompt = np.asarray(self.corpus.valid[:_PROMPT_BYTES])
      written = generate.generate(
        jax.device_get(state.params),
        self.model_config,
        prompt[None],
        _SAMPLE_BYTES,
        jax.random.fold_in(jax.random.key(self.config.seed), done),
        temperature=0.8,
        # Of one shape throughout, where spans go on changing.
        cache="dense",
        draw_below=generate.BYTES,
      )[0]
      text = generate.text_of(np.concatenate([prompt, written]))
      logbook.say(f"sample {done:>4} {text}")
    self.logged_at += time.perf_counter() - began

  def _save(self, state, memory, done, bits_per_char):
    began = time.perf_counter()
    memory = parallel.gather(memory)  # by all processes; saved by one
    if parallel.is_primary():
      corpus = self.corpus
      self.saved.save(
        done,
        state.params,
        state.opt_state,
        {
          "config": self.config.to_dict(),
          "data": {"name": corpus.name, "sha256": corpus.sha256},
        },
        bits_per_char,
        memory,
      )
    self.saved_step = done
    self.logged_at += time.perf_counter() - began
