"""Timing of runners, and the table of the results.

Machines are noisy. So runners that are compared run in one process, in turns,
and their medians are reported.
"""

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np

from adaptive_attention.training import console

# The runners of a case are compared with the first of these that ran.
_BASELINES = (
  "cudnn dense",
  "splash dense",
  "xla dense",
  "reference",
  "torch dense causal",
  "dense, memory 8192",
  "dense",
  "context read again",
)


@dataclasses.dataclass
class Runner:
  """A piece of work to time.

  Attributes:
    case: the name of its case.
    name, kind: what runs, and which part of its work is timed, as "forward".
    call: does that work, and returns when it is done.
    compile_seconds: how long compiling took; None if nothing is compiled.
    temporary_bytes: the temporary memory that the compiler reports, or None.
    counts: further entries of its row.
    times: how often a call does the work.
    one_round: does it once, if a call does it more often.
    seconds: how long each call took.
  """

  case: str
  name: str
  kind: str
  call: Callable[[], object]
  compile_seconds: float | None = None
  temporary_bytes: int | None = None
  counts: dict | None = None
  times: int = 1
  one_round: Callable[[], object] | None = None
  seconds: list = dataclasses.field(default_factory=list)

  def row(self) -> dict:
    """Returns its row of bench.json."""
    return {
      "case": self.case,
      "run": f"{self.name} {self.kind}",
      "median_ms": 1e3 * float(np.median(self.seconds)) / self.times,
      "fastest_ms": 1e3 * min(self.seconds) / self.times,
      "compile_seconds": self.compile_seconds,
      "temporary_bytes": self.temporary_bytes,
      **(self.counts or {}),
    }


def compiled(case: str, name: str, kind: str, function, *args, counts=None):
  """Compiles a function for these arguments; returns its runner."""
  start = time.perf_counter()
  run = jax.jit(function).lower(*args).compile()
  return Runner(
    case,
    name,
    kind,
    lambda: jax.block_until_ready(run(*args)),
    time.perf_counter() - start,
    run.memory_analysis().temp_size_in_bytes,
    counts,
  )


def time_in_turns(
  runners: list[Runner], repeats: int, seconds: float | None = None
):
  """Calls each runner once to warm up, then all of them in turns.

  Args:
    repeats: how many turns are timed.
    seconds: after these no other turn begins; the first one is always timed.
  """
  begun = time.perf_counter()
  for turn in range(repeats + 1):
    late = seconds is not None and time.perf_counter() - begun > seconds
    if late and turn > 1:
      break
    for runner in runners:
      start = time.perf_counter()
      runner.call()
      if turn:
        runner.seconds.append(time.perf_counter() - start)


def table(runners: list[Runner]) -> list[str]:
  """Returns a line for each runner of a case, with the ratio to a baseline."""
  return [_line(runner, _baseline(runner, runners)) for runner in runners]


def _line(runner, baseline):
  row = runner.row()
  digits = 3 if row["median_ms"] < 10 else 1
  text = f"{row['case']:<26} {row['run']:<28} {row['median_ms']:9.{digits}f} ms"
  if baseline is not None:
    times = row["median_ms"] / baseline.row()["median_ms"]
    text += f"  {times:5.2f} x of {baseline.name}"
  if runner.compile_seconds is not None:
    text += f"  compiled in {runner.compile_seconds:5.1f} s"
  if runner.temporary_bytes is not None:
    text += f"  temporary {console.bytes_text(runner.temporary_bytes)}"
  if row.get("open_pairs"):
    ratio = row["computed_pairs"] / row["open_pairs"]
    text += f"  computed / open {ratio:.2f}"
  if "memory_bytes" in row:
    share = row["memory_bytes"] / row["reach_bytes"]
    text += (
      f"  memory {console.bytes_text(row['memory_bytes'])}, {share:.2f} x of "
      "what heads reach"
    )
  if "cache_bytes" in row:
    text += (
      f"  cache {console.bytes_text(row['cache_bytes'])} per text, "
      f"{row['keys_read']:,} keys read per token"
    )
  return text


def _baseline(runner, runners):
  """Returns the runner of the same work to compare with, or None."""
  others = {other.name: other for other in runners if other.kind == runner.kind}
  found = next((others[name] for name in _BASELINES if name in others), None)
  return None if found is runner else found
