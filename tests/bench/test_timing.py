"""Runners take turns, and rows of the same work are compared."""

import pytest

from adaptive_attention.bench import timing
from adaptive_attention.bench.timing import Runner


def timed(name, kind, *seconds, **more):
  return Runner("case", name, kind, lambda: None, seconds=[*seconds], **more)


def test_runners_take_turns_after_one_call_that_does_not_count():
  calls = []
  runners = [
    Runner("case", name, "forward", lambda name=name: calls.append(name))
    for name in ("a", "b")
  ]
  timing.time_in_turns(runners, 3)
  assert calls == ["a", "b"] * 4
  assert [len(runner.seconds) for runner in runners] == [3, 3]


def test_time_bounds_the_turns_but_for_the_first():
  calls = []
  runner = Runner("case", "a", "forward", lambda: calls.append(1))
  timing.time_in_turns([runner], 5, seconds=-1.0)
  assert len(calls) == 2  # one to warm up, and one that is timed
  assert len(runner.seconds) == 1
  timing.time_in_turns([runner], 5, seconds=60.0)
  assert len(runner.seconds) == 1 + 5


def test_a_row_has_the_median_and_the_fastest_of_one_piece_of_work():
  row = timed("a", "token", 4.0, 1.0, 2.0, times=2, counts={"n": 3}).row()
  assert row["run"] == "a token"
  assert row["median_ms"] == pytest.approx(1000)
  assert row["fastest_ms"] == pytest.approx(500)
  assert row["n"] == 3


def test_each_row_is_compared_with_the_same_kind_of_work():
  lines = timing.table(
    [
      timed("blocked", "forward", 1.0),
      timed("blocked", "both", 1.0),
      timed("reference", "forward", 2.0),
      timed("reference", "both", 4.0),
      timed("blocked", "on 2 devices both", 1.0),
    ]
  )
  found = [line.partition(" ms")[2] for line in lines]
  assert (
    found == ["   0.50 x of reference", "   0.25 x of reference"] + [""] * 3
  )


def test_a_memory_is_beside_what_heads_reach():
  counts = {"memory_bytes": 3 << 10, "reach_bytes": 2 << 10}
  (line,) = timing.table([timed("span", "step", 1.0, counts=counts)])
  assert "memory 3 KiB, 1.50 x of what heads reach" in line
