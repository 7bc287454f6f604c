"""The loop by itself: what follows which step, and when it ends."""

import time
import types

import numpy as np
import pytest

from adaptive_attention.training import loop
from adaptive_attention.training.resume import Start
from adaptive_attention.training.signals import Signals, Stopped
from adaptive_attention.training.training_config import Every

EVERY = Every(last=6, record=2, save=3, evaluate=4, sample=5)


class Run:
  """A run whose step counts, and that notes all that happens, in order."""

  def __init__(self, start=0, saved_step=None, every=EVERY, nan_at=None):
    self.events, self.rates, self.ends = [], [], Signals(saving=True)
    self.start = Start(start, saved_step, False)
    self.every, self.nan_at = every, nan_at

  def step(self, state, memory, batch):
    assert batch == state  # the batch of the step that is made
    self.events.append(("step", state + 1))
    loss = np.nan if state + 1 == self.nan_at else 1.0
    metrics = {"loss": loss, "grad_norm": 1.0, "stop": 0, "masks": []}
    return state + 1, memory, metrics

  def record(self, step, metrics, seconds):
    assert metrics["loss"] == 1.0
    self.events.append(("record", step))
    self.rates.append(seconds)

  def note(self, name):
    def noted(state, *rest):
      assert rest[-1] == state
      self.events.append((name, state))

    return noted

  def train(self, regroup=None):
    follow = loop.Follow(
      record=self.record,
      finish=lambda: self.events.append(("finish", None)),
      **{name: self.note(name) for name in ("save", "evaluate", "sample")},
    )
    batches = types.SimpleNamespace(at=lambda step, stop: step)
    loop.train(
      *(self.step, self.start, None, batches),
      *(self.every, self.ends, follow, regroup),
    )

  def followed(self):
    assert self.events[-1] == ("finish", None)
    return [event for event in self.events[:-1] if event[0] != "step"]


def test_what_follows_comes_in_order_and_after_its_save():
  run = Run()
  run.train()
  assert run.events == [
    *(("step", 1), ("step", 2), ("record", 2)),
    *(("step", 3), ("save", 3)),
    *(("step", 4), ("record", 4), ("save", 4), ("evaluate", 4)),
    *(("step", 5), ("save", 5), ("sample", 5)),
    *(("step", 6), ("record", 6), ("save", 6), ("evaluate", 6)),
    ("finish", None),
  ]
  assert all(seconds > 0 for seconds in run.rates)


def test_the_first_step_is_not_timed():
  run = Run(every=Every(last=2, record=1, save=9, evaluate=9, sample=0))
  run.train()
  assert run.rates[0] is None
  assert run.rates[1] > 0


def test_it_goes_on_after_the_step_it_starts_from():
  run = Run(start=4, saved_step=4)
  run.train()
  assert run.followed() == [
    *(("save", 5), ("sample", 5)),
    *(("record", 6), ("save", 6), ("evaluate", 6)),
  ]


@pytest.mark.parametrize("step", range(1, 7))
def test_a_signal_saves_the_step_and_nothing_else_is_begun(step):
  run = Run()
  made = run.step

  def signalled(state, memory, batch):
    if state + 1 == step:
      run.ends.stop("SIGTERM", 143)
    return made(state, memory, batch)

  run.step = signalled
  with pytest.raises(Stopped, match=f"by SIGTERM after step {step}, ") as error:
    run.train()
  assert error.value.exit_code == 143
  assert run.events[-2:] == [("save", step), ("finish", None)]
  assert run.events.count(("step", step)) == 1
  assert ("step", step + 1) not in run.events


@pytest.mark.parametrize(
  ("start", "saved_step", "nan_at", "kept"),
  [
    (0, None, 2, "no checkpoint had been saved yet"),
    (0, None, 4, "the checkpoint of step 3 is kept"),
    (4, 4, 5, "the checkpoint of step 4 is kept"),
    (4, 4, 6, "the checkpoint of step 5 is kept"),
  ],
)
def test_a_step_that_is_not_finite_ends_it(start, saved_step, nan_at, kept):
  run = Run(start, saved_step, nan_at=nan_at)
  with pytest.raises(loop.TrainingError) as error:
    run.train()
  assert f"loss=nan at step {nan_at}, which was not made ({kept})" in str(
    error.value
  )
  assert run.events[-2:] == [("step", nan_at), ("finish", None)]


def test_the_host_is_one_step_behind():
  """What is not finite is found while the next step is under way."""
  run = Run(nan_at=2, every=Every(9, record=9, save=9, evaluate=9, sample=0))
  with pytest.raises(loop.TrainingError, match="at step 2,"):
    run.train()
  assert run.events[-2] == ("step", 3)


def test_masks_of_a_step_decide_on_the_memory_after_the_next(monkeypatch):
  """Whether the host has caught up or not, and wherever the run began."""
  passed = [0.0]
  monkeypatch.setattr(
    loop,
    "time",
    types.SimpleNamespace(perf_counter=lambda: time.perf_counter() + passed[0]),
  )
  for start in (0, 3):
    every = Every(9, record=2, save=4, evaluate=4, sample=0)
    run = Run(start, saved_step=start or None, every=every)
    made, asked, memories = run.step, [], []

    def step(state, memory, batch, made=made, memories=memories):
      if memories and memories[-1] != memory:
        passed[0] += 1000.0  # as where it compiles when it is called
      memories.append(memory)
      state, memory, metrics = made(state, memory, batch)
      return state, memory, metrics | {"masks": (state, None)}

    def serves(memory, layers, due, asked=asked):
      asked.append((layers, due.save))
      return layers != 5

    def compiled(state, memory, step=step):
      passed[0] += 1000.0
      return step

    run.step = step
    run.train(
      loop.Regroup(
        serves=serves,
        memory=lambda memory, layers: f"for {layers}",
        compiled=compiled,
        nbytes=lambda _: 1,
        masks=start,
      )
    )
    assert asked == [(i, i % 4 == 0) for i in range(start, 9)]
    # The step after step 6 is the first with the memory for step 5.
    assert memories == [None] * (6 - start) + ["for 5"] * 3
    assert all(seconds is None or seconds < 100 for seconds in run.rates)
