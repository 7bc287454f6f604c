"""A training run, from its start or its newest checkpoint to the last step.

Two modes make one: train, and export where it trains a hardened model on.
"""

import functools
import pathlib
import time

import jax

from adaptive_attention import accounting
from adaptive_attention.model import Transformer
from adaptive_attention.training import (
  batches,
  checkpoint,
  console,
  evaluator,
  logbook,
  loop,
  milestones,
  optimizer,
  parallel,
  resume,
  signals,
  steps,
)
from adaptive_attention.training.training_config import TrainingConfig


def train(config: TrainingConfig, workdir, corpus, *, which: str | None = None):
  """Trains into `workdir`; called again, it goes on from the newest step.

  Args:
    config: the settings of the run, checked.
    workdir: its folder, made if absent.
    corpus: `train`, `valid` and `test` splits, `name` and `sha256`.
    which: the checkpoint to go on from, instead of the newest; later ones are
      set aside.

  Raises:
    TrainingError: a loss or gradient that is not finite.
    DataError: a workdir that belongs to other data.
    Stopped: a signal, or a console or record that cannot be written to, after
      the state was saved.
  """
  began = time.perf_counter()
  workdir = pathlib.Path(workdir)
  with (
    resume.lock(workdir),
    signals.Signals(saving=True) as ends,
    console.failures(ends.stop_unheard),
    checkpoint.Checkpoints(workdir, keep=config.keep_checkpoints) as saved,
  ):
    model = Transformer(config.model)
    rule = optimizer.make(config.optimizer, config.steps)
    start = resume.start(saved, model, rule, config, corpus, which)
    _say_start(config, workdir, corpus, start)
    made_again = ("valid",) if start.owed else ()
    if start.step < config.steps or start.owed:
      with logbook.Logbook(
        workdir, config.record, start.step, made_again
      ) as book:
        follow = _follow(config, model, corpus, saved, book, ends, began)
        start = start._replace(state=parallel.replicate(start.state))
        if start.owed:
          follow.evaluate(start.state, start.step)
        if start.step < config.steps:
          source = _batches(config, corpus)
          memory = resume.start_memory(
            saved, config.model, source.per_device, start.step
          )
          step = steps.make_train_step(model, rule, config.seed)
          step = _compile(step, start.state, memory, source.shapes)
          loop.train(step, start, memory, source, config.every, ends, follow)
    if ends.reason is not None:
      raise ends.stopped(max(start.step, config.steps))


def _follow(config, model, corpus, saved, book, ends, began) -> loop.Follow:
  """Binds what follows a step to what it works with in this run."""
  data = {"name": corpus.name, "sha256": corpus.sha256}
  return loop.Follow(
    record=functools.partial(
      milestones.record,
      config=config.model,
      step_tokens=config.batch_size * config.model.context_tokens,
      last=config.steps,
      began=began,
      book=book,
      ends=ends,
    ),
    save=functools.partial(
      milestones.save, saved=saved, meta={"config": config.record, "data": data}
    ),
    evaluate=functools.partial(
      milestones.evaluate,
      predict=evaluator.Evaluator(model, config.eval_batch_size),
      data=corpus.valid[: config.eval_tokens],
      last=config.steps,
      saved=saved,
      book=book,
      ends=ends,
    ),
    sample=functools.partial(
      milestones.sample,
      config=config.model,
      data=corpus.valid,
      seed=config.seed,
      ends=ends,
    ),
  )


def _batches(config, corpus) -> batches.Batches:
  return batches.Batches(
    corpus.train,
    seed=config.seed,
    batch_size=config.batch_size,
    accumulation_steps=config.accumulation_steps,
    context_tokens=config.model.context_tokens,
    streams=config.model.memory_tokens > 0,
  )


def _compile(train_step, state, memory, shapes):
  """Compiles a step and says what it takes."""
  start = time.perf_counter()
  step, sizes = parallel.compile_step(train_step, state, memory, shapes)
  if sizes:
    console.say(
      f"compiled   in {time.perf_counter() - start:.1f} s; bytes per device "
      f"{console.bytes_text(sizes['total'])}, of it temporary "
      f"{console.bytes_text(sizes['temporary'])}"
    )
  return step


def _say_start(config, workdir, corpus, start):
  """Says what the run is made of, and where it stands."""
  T = config.model.context_tokens
  flops = accounting.train_flops_per_token(config.model)
  tokens = config.batch_size * T
  lines = {
    "devices": f"{parallel.device_count()} x {jax.devices()[0].device_kind}, "
    f"{jax.process_count()} process(es)",
    "workdir": str(workdir),
    "data": f"{corpus.name}, sha256 {corpus.sha256}; train "
    f"{len(corpus.train):,}, valid {len(corpus.valid):,}, test "
    f"{len(corpus.test):,} bytes",
    "model": f"{config.model.attention}, "
    f"{accounting.parameter_count(start.state.params):,} parameters, "
    f"computed in {config.model.compute_dtype}",
    "step": f"{config.batch_size} x {T} = {tokens:,} tokens, "
    f"{flops * tokens / 1e12:.3g} TFLOP with all causal pairs",
    "start": f"step {start.step} of {config.steps}"
    + (" (resumed)" if start.step else ""),
  }
  for name, text in lines.items():
    console.say(f"{name:<10} {text}")
  if start.step >= config.steps and not start.owed:
    console.say(
      f"already trained for {start.step} of {config.steps} steps; give "
      "--config.steps more to go on"
    )
