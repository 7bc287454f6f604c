"""The loop of training: steps, and what follows them."""

import collections
import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from adaptive_attention.errors import Error
from adaptive_attention.masks import Mask
from adaptive_attention.training import parallel
from adaptive_attention.training.batches import Batches
from adaptive_attention.training.resume import Start
from adaptive_attention.training.signals import Signals, Stopped
from adaptive_attention.training.training_config import Every


class TrainingError(Error):
  """A run that cannot go on."""


class Clock:
  """The time that training steps take, and nothing between them.

  It runs only while steps are under way: it is stopped once the last one of
  them is done.
  """

  def __init__(self):
    self._seconds, self._steps, self._began = 0.0, 0, 0.0

  def start(self):
    self._began = time.perf_counter()

  def stop(self, steps: int):
    """Stops after so many steps."""
    self._seconds += time.perf_counter() - self._began
    self._steps += steps

  @contextlib.contextmanager
  def stopped(self):
    """Leaves out what is done inside."""
    began = time.perf_counter()
    yield
    self._began += time.perf_counter() - began

  def take(self) -> float | None:
    """Seconds per step since this was called last; None without a step."""
    seconds = self._seconds / self._steps if self._steps else None
    self._seconds, self._steps = 0.0, 0
    return seconds


class Regroup(NamedTuple):
  """How the memory of a run follows its masks.

  Attributes:
    serves: tells of (memory, masks, what follows their step) whether it can
      stay as it is.
    memory: called with (memory, masks), returns the one to go on with.
    compiled: called with (train state, memory), returns the step to go on with.
    nbytes: called with a memory, returns its bytes on a device.
    masks: a mask per layer at the start.
  """

  serves: Callable
  memory: Callable
  compiled: Callable
  nbytes: Callable
  masks: Sequence[Mask]


class Follow(NamedTuple):
  """What is called after steps, as `Every` has them.

  Attributes:
    record: called with (step, its metrics, seconds per step or None).
    save: called with (train state, memory, step); it may end later.
    finish: called without arguments, to wait for the last save's end.
    evaluate: called with (train state, the memory's groups or None, step).
    sample: called with (train state, step).
  """

  record: Callable
  save: Callable
  finish: Callable
  evaluate: Callable
  sample: Callable


def train(
  train_step,
  start: Start,
  memory,
  batches: Batches,
  every: Every,
  ends: Signals,
  follow: Follow,
  regroup: Regroup | None = None,
):
  """Makes the steps after `start`, until the last one or a signal.

  The first step is not timed, as it sets up what later steps find ready. An
  evaluation or a sample, which may take long, begins once its step is saved.

  Args:
    train_step: of `steps.make_train_step`; train state and memory are donated
      to it.
    start: with the train state on all devices.
    memory: what these devices remember of their streams, or None.
    every: which steps are followed by what.
    ends: what asks for the end.
    follow: what is called then.
    regroup: how the memory follows the masks; None if it stays as it is.

  Raises:
    TrainingError: a loss or gradient that is not finite.
    Stopped: the end was asked for, and the step is saved.
  """
  try:
    clock = Clock()
    made = _steps(
      *(train_step, start, memory, batches, every, ends, regroup, clock)
    )
    _follow(made, start, every, ends, follow, clock)
  except (Stopped, TrainingError):  # which say what is saved
    follow.finish()
    raise
  follow.finish()


def _follow(made, start, every, ends, follow, clock):
  """Does what follows each of the steps that are made."""
  done = start.step
  clock.start()
  for step, state, memory, metrics, stop in made:
    clock.stop(step - done)
    done = step
    if step == start.step + 1:
      clock.take()
    due = every.due(step)
    if due.record:
      follow.record(step, metrics, clock.take())
      stop = stop or _stops(ends)
    if due.save or stop:
      follow.save(state, memory, step)
    if stop or (due.save and _stops(ends)):
      raise ends.stopped(step)
    if due.evaluate:
      follow.evaluate(state, getattr(memory, "groups", None), step)
    if due.sample:
      follow.sample(state, step)
    clock.start()


def _steps(train_step, start, memory, batches, every, ends, regroup, clock):
  """Makes the steps, and yields those at which the host has caught up.

  The host reads one step behind, but for the first step and those that
  something follows: it goes on when all steps are done. What it reads of a step
  decides on the memory after the next one, whether it has caught up or not.

  Yields:
    (step, train state, memory, its metrics, whether the run is to end).
  """
  state, waiting, stop = start.state, collections.deque(), False
  masks = {start.step: regroup.masks} if regroup else {}
  is_new = False
  for step in range(start.step + 1, every.last + 1):
    batch = batches.at(step - 1, stop=ends.reason is not None)
    with clock.stopped() if is_new else contextlib.nullcontext():
      if is_new:  # Several processes compile at the call below.
        train_step = regroup.compiled(state, memory)
      state, memory, metrics = train_step(state, memory, batch)
    is_new = False
    waiting.append((step, metrics))
    waits = any(every.due(step)) or step == start.step + 1
    while len(waiting) > 1 or (waiting and (waits or stop)):
      read, metrics = waiting.popleft()
      metrics = _read(read, metrics, start, every)
      if regroup:
        masks[read], _ = metrics["masks"]
      stop = stop or _stops(ends, metrics)
    if regroup:
      before = masks.pop(step - 1)
      if not regroup.serves(memory, before, every.due(step - 1)):
        jax.block_until_ready(memory)  # so that the step is timed
        with clock.stopped():
          memory, is_new = regroup.memory(memory, before), True
    if not waiting:
      if regroup:
        metrics["memory_bytes"] = regroup.nbytes(memory)
      yield step, state, memory, metrics, stop


def _stops(ends, metrics=None) -> bool:
  """Tells whether all processes know that the run is to end.

  Several learn it together, from the numbers of a step.
  """
  if parallel.process_count() == 1:
    return ends.reason is not None
  return metrics is not None and metrics["stop"] > 0


def _read(step, metrics, start, every) -> dict:
  """Waits for a step's numbers and checks that they are finite."""
  of_heads = metrics.pop("masks")
  metrics = {name: float(value) for name, value in metrics.items()}
  for name in ("loss", "grad_norm"):
    if not math.isfinite(metrics[name]):
      raise TrainingError(
        f"{name}={metrics[name]} at step {step}, which was not made "
        f"({_kept(step, start, every)}); lower optimizer.learning_rate "
        "or raise optimizer.warmup_steps"
      )
  return metrics | {"masks": of_heads}


def _kept(step, start, every) -> str:
  """Says, for an error, which checkpoint there is before `step`."""
  saved = (s for s in range(step - 1, start.step, -1) if every.due(s).save)
  newest = next(saved, start.saved_step)
  if newest is None:
    return "no checkpoint had been saved yet"
  return f"the checkpoint of step {newest} is kept"
