"""A whole report: what is printed of heads, the tables, figures and page."""

import pathlib
import shlex
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from adaptive_attention import accounting
from adaptive_attention.model import Transformer
from adaptive_attention.report import (
  ablation,
  attention_mass,
  cost,
  head_figures,
  heads,
  page,
  run_figures,
  runs,
  style,
  tables,
)
from adaptive_attention.training import (
  console,
  evaluator,
  exported,
  files,
  logbook,
  parallel,
)


class Sample(NamedTuple):
  """Tokens on which the first run of a report is measured.

  Attributes:
    data: the tokens, the first of which is not predicted.
    batch_size: how many windows are predicted at a time.
  """

  data: np.ndarray
  batch_size: int


def write(
  folder,
  all_runs: Sequence[runs.Run],
  rows: Sequence[Sequence[heads.Head]] | None = None,
  *,
  split: str = "valid",
  sample: Sample | None = None,
):
  """Prints a line for each head; writes tables, figures and report.html.

  Without matplotlib there are no figures and no page, and a line says how to
  get them.

  Args:
    folder: where the files are written.
    all_runs: the runs to show, that of the folder first.
    rows: the rows of each run's heads that are shown; None for all heads.
    split: "valid" or "test": which split the losses are of.
    sample: a part of the split, on which it is measured what each head of the
      first run is for and what it attends to; None for not.

  Raises:
    WriteError: a file cannot be written.
  """
  folder = pathlib.Path(folder)
  if rows is None:
    rows = [heads.of_run(one.name, one.layers, one.config) for one in all_runs]
  every_row = [row for of_run in rows for row in of_run]
  try:  # the files are written even if nothing can be printed
    for one, of_run in zip(all_runs, rows, strict=True):
      _say(one, of_run)
  finally:
    files.write_text(folder / "heads.csv", tables.as_csv(every_row))
    files.write_text(folder / "heads.tex", tables.as_tex(every_row))
  console.say(f"written to {folder / 'heads.csv'} and heads.tex")
  measured = None if sample is None else _measured(all_runs[0], sample, folder)
  try:
    style.check()
  except style.MissingError as error:
    console.say(f"no figures: {error}")
    return
  with style.sheet():
    _draw(folder, all_runs, split, measured)


def write_of_ended_run(workdir):
  """Writes the report of a run that has ended; the primary process alone does.

  Raises:
    CheckpointError: the newest checkpoint is damaged.
    WriteError: a file cannot be written.
  """
  if parallel.is_primary():
    write(workdir, [runs.read(workdir)])


def _say(one: runs.Run, rows):
  """Prints the heads of a run, and what they cost together."""
  config = one.config
  console.say(f"step {one.step} of {one.name}, {config.attention}")
  tokens = config.max_context_tokens
  for line in tables.as_lines(rows, one.layers, tokens):
    console.say(line)
  macs = accounting.attention_macs_per_token(
    one.layers, config, config.context_tokens, config.memory_tokens
  )
  found = accounting.attention_choice(config)
  _say_in_columns(f"attention: {console.macs_text(macs, found)}")
  _say_in_columns(f"cache: {console.cache_text(one.layers, config)}")


def _say_in_columns(text):
  """Prints lines of at most 80 columns."""
  console.say("\n".join(textwrap.wrap(text, 80, subsequent_indent="  ")))


class _Measured(NamedTuple):
  """What was measured of a run on some tokens of a split."""

  changes: list[ablation.Change]
  mass: attention_mass.Mass
  nats: np.ndarray


def _measured(one: runs.Run, sample: Sample, folder) -> _Measured:
  """Measures what heads are for and attend to; writes ablation.csv."""
  with exported.opened(one.name) as saved:
    params, _ = saved.restore_params(one.step)
  changes = ablation.measure(params, one.config, *sample, _progress())
  for sentence in ablation.sentences(one, changes):
    _say_in_columns(f"ablation   {sentence}")
  files.write_text(folder / "ablation.csv", tables.as_csv(changes))
  mass = attention_mass.measure(params, one.config, sample.data)
  predict = evaluator.Evaluator(Transformer(one.config), sample.batch_size)
  nats, _ = predict.losses(parallel.replicate(params), sample.data, "window")
  return _Measured(changes, mass, nats)


def _progress():
  """Returns a function of (done, count) that prints each tenth of a work."""
  began, last = time.perf_counter(), 0

  def progress(done, count):
    nonlocal last
    if done * 10 // count > last:
      last = done * 10 // count
      left = (time.perf_counter() - began) * (count - done) / done
      console.say(
        f"ablation   {done} of {count}, eta {console.duration_text(left)}"
      )

  return progress


def _draw(folder, all_runs, split, measured):
  """Draws the figures, and writes them and the page."""
  figures, missing = _figures(all_runs, split, measured)
  drawn = {figure.name: style.files(figure) for figure in figures}
  content = page.page(
    all_runs,
    figures,
    {name: found[f"{name}.svg"] for name, found in drawn.items()},
    split=split,
    missing=missing,
    command=shlex.join(sys.argv),
    environment=logbook.environment(),
  )
  into = folder / "figures"
  with files.writing(into):
    into.mkdir(exist_ok=True)
  for found in drawn.values():
    for name, data in found.items():
      files.write_bytes(into / name, data)
  files.write_text(folder / "report.html", content)
  for sentence in missing:
    _say_in_columns(f"missing    {sentence}")
  console.say(
    f"written to {folder / 'report.html'} and {into}, {len(figures)} figures"
  )


def _figures(all_runs, split, measured):
  """Returns the figures, and a sentence on each that could not be drawn."""
  first, missing = all_runs[0], []
  drawn = [head_figures.sorted_heads(all_runs), head_figures.span_map(all_runs)]
  drawn += [head_figures.weights(first), head_figures.pairs(first)]
  drawn.append(cost.figure(first, *cost.measure(first)))
  for figure, sentence in (
    (
      run_figures.mask_curves(first),
      f"{first.name} has no masks.jsonl of two steps or more, as runs of "
      "earlier versions, so that no curves of its heads are drawn.",
    ),
    (
      run_figures.fronts(all_runs, split),
      f"No run was evaluated on the {split} split at this step, so that no "
      f"loss is drawn against its cost; --mode=eval --split={split} evaluates "
      "one.",
    ),
    (
      run_figures.losses(all_runs),
      "No run has a metrics.jsonl, so that no losses are drawn.",
    ),
  ):
    if figure is None:
      missing.append(sentence)
    else:
      drawn.append(figure)
  if measured is None:
    missing.append(
      "What each head is for and attends to was not measured; "
      "--inspect_bytes=N does."
    )
  else:
    changes, mass, nats = measured
    drawn.append(run_figures.by_position(first, nats, split))
    drawn.append(ablation.figure(first, changes, len(nats) + 1, split))
    drawn += attention_mass.figures(first, mass, split)
  return drawn, missing
