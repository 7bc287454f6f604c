"""Training: from step 0 or the newest checkpoint to the last step."""

import collections
import contextlib
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
  generation,
  weights,
)
from adaptive_attention.config import ModelConfig
from adaptive_attention.errors import Error
from adaptive_attention.training import (
  batches,
  checkpoint,
  console,
  evaluator,
  logbook,
  parallel,
  resume,
  settings,
  signals,
  steps,
)

_PROMPT_BYTES, _SAMPLE_BYTES = 32, 200
_SIGPIPE = getattr(signal, "SIGPIPE", 13)


class TrainingError(Error):
  """A run that cannot go on."""


class Stopped(Error):
  """A run that was asked to end, after its step was finished and saved.

  Attributes:
    exit_code: 128 + the number of a signal, as a shell has it, or 1.
  """

  def __init__(self, message, exit_code):
    super().__init__(message)
    self.exit_code = exit_code


def run(config, workdir, *, corpus, step=None):
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
    Stopped: a signal, or a console or record that cannot be written to, after
      the state was saved.
  """
  workdir = pathlib.Path(workdir)
  if not parallel.is_primary():
    return _run(config, workdir, corpus, step)
  with logbook.writing(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "lock").touch()
  with resume.lock(workdir):
    return _run(config, workdir, corpus, step)


def _run(config, workdir, corpus, step):
  start_clock = time.perf_counter()
  with (
    signals.Signals(saving=True) as ends,
    console.failures(lambda error: _stop_unheard(ends, error)),
    checkpoint.Checkpoints(workdir, keep=config.keep_checkpoints) as saved,
  ):
    state, first_step, owed = _start_state(config, corpus, saved, step)
    _say_start(config, workdir, corpus, state, first_step)
    if first_step < config.steps or owed:
      state = parallel.replicate(state)
      made_again = ("valid",) if owed else ()
      with logbook.Logbook(workdir, config, first_step, made_again) as book:
        run = _Run(config, corpus, saved, book, ends, start_clock)
        if owed:
          run.evaluate(state, first_step)
        if first_step < config.steps:
          memory = _start_memory(config, saved, first_step)
          train_step = _compile(config, state, memory)
          run.loop(train_step, state, memory, first_step)
    else:
      console.say(
        f"already trained for {first_step} of {config.steps} steps; give "
        "--config.steps more to go on"
      )
    if ends.reason is not None:
      raise _stopped(ends, max(first_step, config.steps))


def _stop_unheard(ends, error):
  """Whoever closes the console asks for the end, as a signal does."""
  if isinstance(error, BrokenPipeError):
    ends.stop("a closed pipe", 128 + _SIGPIPE)
  else:
    ends.stop(f"a console that takes no more ({error.strerror})", 1)


def _stopped(ends, step):
  return Stopped(
    f"stopped by {ends.reason or 'SIGTERM'} after step {step}, which is saved; "
    "the same command goes on from there",
    ends.exit_code or 128 + signal.SIGTERM,
  )


def _start_state(config, corpus, saved, which):
  """(the state to go on from: restored, read in, or new; its step; whether its
  evaluation is owed, as the run ended before it)."""
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
    return state, 0, False
  first_step = saved.resolve("latest" if which is None else which)
  # Its settings first: what does not fit is then told by its name.
  meta = saved.read_meta(first_step)
  _check_resumed(config, corpus, meta, first_step)
  params, opt_state, _ = saved.restore(
    first_step, state.params, state.opt_state
  )
  if which is not None and parallel.is_primary():
    moved = saved.set_aside_after(first_step)
    if moved:
      console.say(f"set aside: the later checkpoints {moved}")
  return (
    state.replace(
      step=np.asarray(first_step, np.int32), params=params, opt_state=opt_state
    ),
    first_step,
    meta["bits_per_char"] is None and _evaluates(config, first_step),
  )


def _evaluates(config, step) -> bool:
  return step == config.steps or step % config.eval_every_steps == 0


def _start_memory(config, saved, first_step):
  """What this process' devices remember of their streams; None without."""
  memory = steps.start_memory(
    ModelConfig(**config.model), steps.streams_per_device(config)
  )
  if not jax.tree.leaves(memory) or not first_step:
    return memory
  N = parallel.device_count()
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((N, *x.shape[1:]), x.dtype), memory
  )
  restored = saved.restore_memory(first_step, like)
  if restored is None:
    console.say(
      "memory     empty: the streams restart, as the checkpoint's are not "
      f"those of {N} device(s) with {steps.streams_per_device(config)} "
      f"sequences each in {like.layers[0].k.dtype}"
    )
    return memory
  return parallel.deal(
    jax.tree.map(lambda x: x[parallel.local_shards()], restored)
  )


def _check_resumed(config, corpus, meta, step):
  resume.check_same_data(corpus, meta, step)
  changed = settings.check_resumed(meta["config"], config, step)
  if changed:
    console.say(
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
    console.say(
      f"compiled   in {time.perf_counter() - start:.1f} s; bytes per device "
      f"{console.bytes_text(sizes['total'])}, of it temporary "
      f"{console.bytes_text(sizes['temporary'])}"
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
    console.say(f"{name:<10} {text}")


class _Clock:
  """The time that training steps take, and nothing between them.

  It runs only while steps are under way: it is stopped once the last one of
  them is done.
  """

  def __init__(self):
    self._seconds, self._steps, self._began = 0.0, 0, 0.0

  def start(self):
    self._began = time.perf_counter()

  def stop(self, steps: int):
    """After so many steps."""
    self._seconds += time.perf_counter() - self._began
    self._steps += steps

  def take(self) -> float | None:
    """Seconds a step since this was called last; None if there was no step."""
    seconds = self._seconds / self._steps if self._steps else None
    self._seconds, self._steps = 0.0, 0
    return seconds


@dataclasses.dataclass
class _Run:
  """What the loop works with, and where its clocks stand."""

  config: ConfigDict
  corpus: object
  saved: checkpoint.Checkpoints
  book: logbook.Logbook
  ends: signals.Signals
  start_clock: float

  def __post_init__(self):
    config = self.config
    self.model_config = ModelConfig(**config.model)
    self.evaluator = evaluator.Evaluator(
      self.model_config, config.eval_batch_size
    )
    self.evaluated = False
    shards = parallel.local_shards()
    self.shards = {
      i: batches.shard(self.corpus.train, i, parallel.device_count())
      for i in shards
    }
    self.clock = _Clock()

  def loop(self, train_step, state, memory, first_step):
    """Steps until the last one or a signal.

    The host reads one step behind, but for the first step, which is not timed,
    and those that something follows: it begins when all steps are done. What
    may take long begins when they are saved.
    """
    config = self.config
    self.saved_step = first_step if self.saved.steps() else None
    waiting = collections.deque()
    started, stop = first_step, False
    self.clock.start()
    for done in range(first_step + 1, config.steps + 1):
      state, memory, metrics = train_step(state, memory, self._batch(done - 1))
      waiting.append((done, metrics))
      logs, saves, evaluates, samples = self._due(done)
      waits = logs or saves or done == first_step + 1
      while len(waiting) > 1 or (waiting and (waits or stop)):
        metrics = self._read(*waiting.popleft())
        stop = stop or self._stops(metrics)
      if waiting:
        continue
      self.clock.stop(done - started)
      started = done
      if done == first_step + 1:
        self.clock.take()
      if logs:
        self._log(done, metrics)
        stop = stop or self._stops()
      if saves or stop:
        self._save(state, memory, done)
      if stop or (saves and self._stops()):
        raise _stopped(self.ends, done)
      if evaluates:
        self.evaluate(state, done)
      if samples:
        self._sample(state, done)
      self.clock.start()

  def _due(self, done):
    """Whether a step is followed by (a log, a save, an evaluation, a sample).

    What may take long follows a save: nothing is lost if it does not end.
    """
    config = self.config
    every = config.sample_every_steps
    evaluates = _evaluates(config, done)
    samples = bool(every) and done % every == 0
    saves = done % config.checkpoint_every_steps == 0
    logs = done % config.log_every_steps == 0 or done == config.steps
    return logs, saves or evaluates or samples, evaluates, samples

  def _stops(self, metrics=None) -> bool:
    """Whether all processes know that the run is to end.

    Several learn it together, from the numbers of a step.
    """
    if parallel.process_count() == 1:
      return self.ends.reason is not None
    return metrics is not None and metrics["stop"] > 0

  @contextlib.contextmanager
  def _interrupting(self, done):
    """Around what can be done again: a signal ends it, and the run.

    Not so under several processes, where each waits for all others.
    """
    if parallel.process_count() > 1:
      yield
      return
    try:
      with self.ends.interrupting():
        yield
    except signals.Interrupted:
      raise _stopped(self.ends, done) from None

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
      np.full(N, self.ends.reason is not None, np.int32),
      np.full(N, restart),
    )

  def _read(self, done, metrics) -> dict:
    """Waits for a step's numbers, which are finite."""
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
    return metrics | {"masks": layers}

  def _write(self, done, split, **values):
    """A line of the record; where it fails the run ends as at a signal."""
    try:
      self.book.write(done, split, **values)
    except logbook.LogbookError as error:
      self.ends.stop(f"a record that takes no more ({error})", 1)

  def _log(self, done, metrics):
    config, layers = self.config, metrics["masks"]
    seconds = self.clock.take()
    tokens, timed = None, ""  # where no step was timed yet
    if seconds is not None:
      tokens = config.batch_size * config.model.context_tokens / seconds
      remaining = console.duration_text(seconds * (config.steps - done))
      timed = f"  {1000 * seconds:.0f} ms  {tokens:,.0f} tok/s  eta {remaining}"
    bits_per_char = metrics["cross_entropy"] / math.log(2)
    console.say(
      f"step {done:>6} {100 * done / config.steps:5.1f}%  "
      f"loss {metrics['loss']:.4f}  bpc {bits_per_char:.4f}  "
      f"lr {metrics['learning_rate']:.2e}  grad {metrics['grad_norm']:.3f}  "
      f"span {metrics['span_mean']:.1f}  open {metrics['open_share']:.3f}"
      f"{timed}"
    )
    wall_seconds = time.perf_counter() - self.start_clock
    self._write(
      done,
      "train",
      loss=metrics["loss"],
      bits_per_char=bits_per_char,
      tokens_per_second=tokens,
      seconds=self.book.seconds + wall_seconds,
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

  def evaluate(self, state, done):
    """Of a step that is saved, whose checkpoint then has the figure too."""
    data = self.corpus.valid
    if self.config.eval_tokens:
      data = data[: self.config.eval_tokens]
    protocol = evaluator.default_protocol(self.model_config)
    with self._interrupting(done):
      result = self.evaluator(
        state.params, data, protocol, warm=not self.evaluated
      )
    self.evaluated = True
    text = (
      f"valid {done:>5} bpc {result.bits_per_char:.4f} +- {result.stderr:.4f} "
      f"over {result.bytes:,} bytes in "
      f"{result.bytes / result.tokens_per_second:.1f} s"
    )
    if done == self.config.steps:
      text += (
        f"; the same bytes have an order-0 entropy of "
        f"{evaluator.order0_entropy(data):.4f}, and lzma takes "
        f"{evaluator.lzma_bits_per_char(data):.4f}"
      )
    console.say(text)
    self._write(
      done,
      "valid",
      loss=result.loss,
      bits_per_char=result.bits_per_char,
      stderr=result.stderr,
      bytes=result.bytes,
      tokens_per_second=result.tokens_per_second,
    )
    if parallel.is_primary():
      self.saved.record_evaluation(done, result.bits_per_char)

  def _sample(self, state, done):
    """Says what the model writes now; no figure, and no setting, follows."""
    if not parallel.is_primary():
      return
    prompt = np.asarray(self.corpus.valid[:_PROMPT_BYTES])
    with self._interrupting(done):
      written = generation.generate(
        jax.device_get(state.params),
        self.model_config,
        prompt[None],
        _SAMPLE_BYTES,
        jax.random.fold_in(jax.random.key(self.config.seed), done),
        temperature=0.8,
        # Of one shape throughout, where spans go on changing.
        cache="dense",
        draw_below=generation.BYTES,
      )[0]
    text = console.text_of(np.concatenate([prompt, written]))
    console.say(f"sample {done:>4} {text}")

  def _save(self, state, memory, done):
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
        memory=memory,
      )
    self.saved_step = done
