"""A training run, from its start or its newest checkpoint to the last step.

Two modes make one: train, and export if it trains a hardened model on.
"""

import functools
import pathlib
import time

import jax

from adaptive_attention import accounting
from adaptive_attention.mask_parameters import mask_params
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
  regrouping,
  resume,
  room,
  signals,
  steps,
  units,
)
from adaptive_attention.training.training_config import TrainingConfig


def train(config: TrainingConfig, workdir, corpus, *, which: str | None = None):
  """Trains into `workdir`; called again, it goes on from the newest step.

  Args:
    config: the settings of the run, checked.
    workdir: its folder, made if absent.
    corpus: a `data.Corpus`.
    which: the checkpoint to go on from, instead of the newest; later ones are
      set aside.

  Raises:
    TrainingError: a loss or gradient is not finite.
    DataError: the workdir belongs to other data.
    Stopped: a signal came, or console or record cannot be written to; the
      train state was saved.
  """
  began = time.perf_counter()
  workdir = pathlib.Path(workdir)
  with (
    resume.lock(workdir),
    signals.Signals(
      saving=True,
      limit=config.stop_seconds if parallel.process_count() > 1 else None,
    ) as ends,
    console.failures(ends.stop_unheard),
    checkpoint.Checkpoints(workdir, keep=config.keep_checkpoints) as saved,
  ):
    model = Transformer(config.model)
    rule = optimizer.make(config.optimizer, config.steps, config.train_only)
    _check_room(model, rule)
    start = resume.start(saved, model, rule, config, corpus, which)
    _say_start(config, workdir, corpus, start)
    if start.step >= config.steps and not start.owed:
      console.say(
        f"already trained for {start.step} of {config.steps} steps; give "
        "--config.steps more to go on"
      )
    else:
      made_again = ("valid",) if start.owed else ()
      record = config.record, start.step, made_again, config.copies
      with logbook.Logbook(workdir, *record) as book:
        follow = _follow(config, model, corpus, saved, book, ends, began)
        _go_on(config, model, rule, corpus, saved, start, ends, follow)
    if ends.reason is not None:
      raise ends.stopped(max(start.step, config.steps))


def _go_on(config, model, rule, corpus, saved, start, ends, follow):
  """Makes up an evaluation that is owed, and the steps that are left."""
  start = start._replace(state=parallel.replicate(start.state))
  if start.owed:
    follow.evaluate(start.state, start.groups, start.step)
  if start.step >= config.steps:
    return
  source = _batches(config, corpus)
  memory = resume.start_memory(saved, config.model, source.per_device, start)
  train_step = steps.make_train_step(model, rule, config.seed)

  def compiled(state, memory):
    return _compile(train_step, state, memory, source.shapes)

  loop.train(
    *(compiled(start.state, memory), start, memory, source, config.every),
    *(ends, follow, _regroup(config.model, start.state.params, compiled)),
  )


def _regroup(config, params, compiled) -> loop.Regroup | None:
  """Binds how the memory follows the masks; None if there is no memory."""
  if not config.memory_tokens:
    return None
  return loop.Regroup(
    serves=lambda memory, layers, due: regrouping.serves(
      memory.groups, layers, config, shrinks=due.save or due.evaluate
    ),
    memory=functools.partial(regrouping.regrouped, config=config),
    compiled=compiled,
    nbytes=regrouping.device_bytes,
    masks=jax.jit(lambda params: mask_params(params, config))(params),
  )


def _follow(config, model, corpus, saved, book, ends, began) -> loop.Follow:
  """Binds what follows a step to what it works with in this run."""
  read = units.of(corpus)
  kept = {"saved": saved, "book": book}
  return loop.Follow(
    record=functools.partial(
      milestones.record,
      config=config.model,
      step_tokens=config.batch_size * config.model.context_tokens,
      units=read,
      last=config.steps,
      began=began,
      ends=ends,
      **kept,
    ),
    save=functools.partial(
      milestones.save,
      corpus=corpus,
      meta={"config": config.record, "data": units.source(corpus)},
      **kept,
    ),
    finish=functools.partial(milestones.finish, **kept),
    evaluate=functools.partial(
      milestones.evaluate,
      predict=evaluator.Evaluator(model, config.eval_batch_size),
      data=corpus.valid[: config.eval_tokens],
      units=read,
      last=config.steps,
      ends=ends,
      **kept,
    ),
    sample=functools.partial(
      milestones.sample,
      config=config.model,
      data=corpus.valid,
      units=read,
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


def _check_room(model, rule):
  """Checks that a device holds the train state, before any is drawn."""
  state = jax.eval_shape(lambda: steps.init_state(model, rule, 0))
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  room.check(size, "the train state (parameters and optimizer)")


def _compile(train_step, state, memory, shapes):
  """Compiles a step and prints how long that took and its memory."""
  start = time.perf_counter()
  step, sizes = parallel.compile_step(train_step, state, memory, shapes)
  if sizes:
    room.check(sizes["total"], "a training step")
    console.say(
      f"compiled   in {time.perf_counter() - start:.1f} s; memory per device "
      f"{console.bytes_text(sizes['total'])}, of which temporary "
      f"{console.bytes_text(sizes['temporary'])}"
    )
  return step


def _say_start(config, workdir, corpus, start):
  """Says what the run is made of, and where it stands."""
  T = config.model.context_tokens
  flops = accounting.train_flops_per_token(config.model)
  tokens = config.batch_size * T
  streams = batches.per_device(config.batch_size, config.accumulation_steps)
  lines = {
    "devices": f"{parallel.device_count()} x {jax.devices()[0].device_kind}, "
    f"{jax.process_count()} process(es)",
    "workdir": str(workdir),
    "data": f"{corpus.name}, sha256 {corpus.sha256}; train "
    f"{len(corpus.train):,}, valid {len(corpus.valid):,}, test "
    f"{len(corpus.test):,} {units.of(corpus).unit}s",
    "model": f"{config.model.attention}, "
    f"{accounting.parameter_count(start.state.params):,} parameters, "
    f"computed in {config.model.compute_dtype}",
    "attention": str(accounting.attention_choice(config.model, streams)),
    "step": f"{config.batch_size} x {T} = {tokens:,} tokens, "
    f"{flops * tokens / 1e12:.3g} TFLOP with all causal pairs",
    "start": f"step {start.step} of {config.steps}"
    + (" (resumed)" if start.step else ""),
  }
  for name, text in lines.items():
    console.say(f"{name:<10} {text}")
