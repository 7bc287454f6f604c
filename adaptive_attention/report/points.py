"""What each setting of some runs loses and costs, its seeds taken together."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from adaptive_attention.report import runs
from adaptive_attention.training import paired
from adaptive_attention.training.settings import MACHINE, flatten

# Settings by which runs of one kind may differ: what is drawn, where a run is
# made, and what is written of it.
_IDLE = ("seed", "report", "tensorboard", "wandb", "keep_checkpoints", *MACHINE)
_IDLE_SECTIONS = ("bench.", "data.cache_dir")


class Point(NamedTuple):
  """A setting with its seeds: loss and cost.

  Attributes:
    names: its runs, as they are labelled.
    bits: the mean loss of the runs, in the units of their data.
    stderr: the standard error of the evaluation or, where there are several
      seeds, of their mean.
    low, high: the least and the largest loss among the seeds.
    macs: multiply-adds per token of attention, dense, open and computed; the
      mean of the seeds.
    protocol: what the runs were evaluated by.
    apart: the standard error of the difference from the first of all runs,
      token by token, which is 0 for that run itself; None where it is not
      known: of several seeds, or where a run read other tokens than the first.
  """

  names: tuple[str, ...]
  bits: float
  stderr: float
  low: float
  high: float
  macs: dict[str, float]
  protocol: str
  apart: float | None

  @property
  def name(self) -> str:
    return ", ".join(self.names)


def of_runs(all_runs: Sequence[runs.Run], split: str) -> list[Point]:
  """Returns a point for each setting; runs that differ by seed share one.

  Runs share a point if they are at the same step and were evaluated on the same
  tokens by one protocol. Runs that were not evaluated on the split at their
  step are left out.
  """
  groups, first = {}, all_runs[0].evaluation(split)
  for run, name in zip(all_runs, runs.labels(all_runs), strict=True):
    found = run.evaluation(split)
    if found is not None:
      one = name, run.bits(found), found, _apart(found, first)
      groups.setdefault(_kind(run, found), []).append(one)
  return [_point(*zip(*group, strict=True)) for group in groups.values()]


def _kind(run, found) -> str:
  """Returns what runs that differ by their seed share."""
  settings = {
    name: value
    for name, value in sorted(flatten(run.settings).items())
    if name not in _IDLE and not name.startswith(_IDLE_SECTIONS)
  }
  tokens = found[f"{run.units.unit}s"]
  data = run.data.get("sha256")
  return repr((settings, run.step, data, found["protocol"], tokens))


def _apart(found, first) -> float | None:
  """Returns the standard error of what a run has more than the first."""
  if found is first:
    return 0.0
  more = None if first is None else paired.of_records(found, first)
  return None if more is None else more.stderr


def _point(names, bits, found, apart) -> Point:
  stderr, of_one = found[0]["stderr"], apart[0]
  if len(bits) > 1:
    stderr, of_one = float(np.std(bits, ddof=1) / len(bits) ** 0.5), None
  macs = {
    name: float(
      np.mean([line["attention_macs_per_token"][name] for line in found])
    )
    for name in ("dense", "open", "computed")
  }
  return Point(
    *(names, float(np.mean(bits)), stderr, min(bits), max(bits), macs),
    *(found[0]["protocol"], of_one),
  )
