"""The loop of training: steps, and what follows them."""

import collections
import math
import time
from collections.abc import Callable
from typing import NamedTuple

from adaptive_attention.errors import Error
from adaptive_attention.training import parallel
from adaptive_attention.training.batches import Batches
from adaptive_attention.training.resume import Start
from adaptive_attention.training.signals import Signals
from adaptive_attention.training.training_config import Every


class TrainingError(Error):
  """A run cannot go on."""


class Clock:
  """Measures the time that training steps take, without the time between them.

  It runs only while steps are under way: it is stopped once the last of them is
  done.
  """

  def __init__(self):
    self._seconds, self._steps, self._began = 0.0, 0, time.perf_counter()

  def start(self):
    self._began = time.perf_counter()

  def stop(self, steps: int):
    """Stops, after `steps` steps since the start."""
    self._seconds += time.perf_counter() - self._began
    self._steps += steps

  def take(self) -> float | None:
    """Returns seconds per step since the last call; None without a step."""
    seconds = self._seconds / self._steps if self._steps else None
    self._seconds, self._steps = 0.0, 0
    return seconds


class Follow(NamedTuple):
  """What is called after steps.

  Attributes:
    record: with (step, its metrics, seconds per step or None).
    save: with (state, memory, step).
    evaluate, sample: with (state, step).
  """

  record: Callable
  save: Callable
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
):
  """Makes the steps after `start`, until the last one or a signal.

  The host reads the numbers of a step while the next one runs. It waits for the
  first step, which is not timed, and for steps that are recorded or saved.
  `start.state` and `memory`, on all devices, are donated to `train_step`.

  Raises:
    TrainingError: a loss or gradient that is not finite.
    Stopped: `ends` asked for the end, and the step is saved.
  """
  state, done, saved_step = start.state, start.step, start.saved_step
  first, clock, stop = start.step + 1, Clock(), False
  waiting = collections.deque()
  for step in range(first, every.last + 1):
    batch = batches.at(step - 1, stop=ends.reason is not None)
    state, memory, metrics = train_step(state, memory, batch)
    waiting.append((step, metrics))
    due = every.due(step)
    waits = due.record or due.save or step == first
    while len(waiting) > 1 or (waiting and (waits or stop)):
      metrics = _read(*waiting.popleft(), saved_step)
      stop = stop or _stops(ends, metrics)
    if waiting:
      continue
    clock.stop(step - done)
    done = step
    if step == first:
      clock.take()
    if due.record:
      follow.record(step, metrics, clock.take())
      stop = stop or _stops(ends)
    if due.save or stop:
      follow.save(state, memory, step)
      saved_step = step
    if stop or (due.save and _stops(ends)):
      raise ends.stopped(step)
    if due.evaluate:
      follow.evaluate(state, step)
    if due.sample:
      follow.sample(state, step)
    clock.start()


def _stops(ends, metrics=None) -> bool:
  """Tells whether all processes know that the run is to end.

  Several processes learn it together, from the numbers of a step.
  """
  if parallel.process_count() == 1:
    return ends.reason is not None
  return metrics is not None and metrics["stop"] > 0


def _read(step, metrics, saved_step) -> dict:
  """Waits for a step's numbers and checks that they are finite."""
  layers = metrics.pop("masks")
  metrics = {name: float(value) for name, value in metrics.items()}
  for name in ("loss", "grad_norm"):
    if not math.isfinite(metrics[name]):
      kept = (
        f"the checkpoint of step {saved_step} is kept"
        if saved_step is not None
        else "no checkpoint had been saved yet"
      )
      raise TrainingError(
        f"{name}={metrics[name]} at step {step}, which was not made ({kept}); "
        "lower optimizer.learning_rate or raise optimizer.warmup_steps"
      )
  return metrics | {"masks": layers}
