"""Shows what each head of a run learned, beside those of other runs."""

import pathlib
import re
import shlex
import sys
import time
from typing import NamedTuple

import numpy as np

from adaptive_attention import accounting
from adaptive_attention.errors import SettingsError
from adaptive_attention.model import Transformer
from adaptive_attention.report import (
  ablation,
  attention_mass,
  cost,
  head_figures,
  page,
  run_figures,
  runs,
  style,
  tables,
)
from adaptive_attention.report import heads as of_heads
from adaptive_attention.training import (
  checkpoint,
  console,
  evaluator,
  logbook,
  parallel,
  settings,
)


def run(
  config,
  workdir,
  *,
  corpus=None,
  step,
  compare=None,
  heads=None,
  split="valid",
  inspect_bytes=0,
):
  """Prints a line for each head; writes tables, figures and report.html.

  Nothing is written unless all runs can be read. Without matplotlib there are
  no figures and no page, and a line says how to get them.

  Args:
    config: the checkpoint's settings.
    workdir, step: the run's folder and the checkpoint.
    compare: folders of other runs, separated by commas, each with its newest
      checkpoint.
    heads: LAYER.HEAD of the heads in the tables, separated by commas; None for
      all.
    corpus, split: the data, and "valid" or "test": which of its splits the
      losses are of.
    inspect_bytes: how many tokens of it are predicted without a part of each
      head of the first run; 0 for none.

  Raises:
    SettingsError: a head that does not exist, or a run is named twice.
    CheckpointError: a folder has no checkpoint, or it is damaged.
  """
  folder = pathlib.Path(workdir)
  all_runs = _read(folder, step, settings.model_config(config.model), compare)
  shown = [_chosen(one, heads) for one in all_runs]
  rows = [row for of_run in shown for row in of_run]
  try:  # the files are written even if nothing can be printed
    for one, of_run in zip(all_runs, shown, strict=True):
      _say(one, of_run)
  finally:
    if parallel.is_primary():
      logbook.write_text(folder / "heads.csv", tables.as_csv(rows))
      logbook.write_text(folder / "heads.tex", tables.as_tex(rows))
  console.say(f"written to {folder / 'heads.csv'} and heads.tex")
  measured = None
  if inspect_bytes:
    data = getattr(corpus, split)[:inspect_bytes]
    measured = _measured(config, all_runs[0], data, folder)
  _report(all_runs, folder, split, measured)


def _read(folder, step, model_config, compare) -> list[runs.Run]:
  """Reads the run, and those to compare with, which must be other folders."""
  names = [str(folder), *(compare.split(",") if compare else ())]
  _check_names(names)
  return [
    runs.read(names[0], step, model_config),
    *(runs.read(name) for name in names[1:]),
  ]


class _Measured(NamedTuple):
  """What was measured of a run on some tokens of a split."""

  changes: list[ablation.Change]
  mass: attention_mass.Mass
  nats: np.ndarray


def _measured(config, one, data, folder) -> _Measured:
  """Measures what heads are for and where they look; writes ablation.csv."""
  with checkpoint.Checkpoints(one.name) as saved:
    params, _ = saved.restore_params(one.step)
  began, last = time.perf_counter(), 0

  def progress(done, count):
    nonlocal last
    if done * 10 // count > last:
      last = done * 10 // count
      left = (time.perf_counter() - began) * (count - done) / done
      console.say(
        f"ablation   {done} of {count}, eta {console.duration_text(left)}"
      )

  changes = ablation.measure(
    params, one.config, data, config.eval_batch_size, progress
  )
  for sentence in ablation.sentences(one, changes):
    console.say(f"ablation   {sentence}")
  if parallel.is_primary():
    logbook.write_text(folder / "ablation.csv", tables.as_csv(changes))
  mass = attention_mass.measure(params, one.config, data)
  predict = evaluator.Evaluator(Transformer(one.config), config.eval_batch_size)
  nats, _ = predict.losses(parallel.replicate(params), data, "window")
  return _Measured(changes, mass, nats)


def _report(all_runs, folder, split, measured):
  """Draws the figures and writes them and the page, if they can be drawn."""
  try:
    style.check()
  except style.MissingError as error:
    console.say(f"no figures: {error}")
    return
  with style.sheet():
    figures, missing = _figures(all_runs, split)
    if measured is None:
      missing.append(
        "What each head is for and where it looks was not measured; "
        "--inspect_bytes=N does."
      )
    else:
      first, (changes, mass, nats) = all_runs[0], measured
      figures.append(run_figures.by_position(first, nats, split))
      figures.append(ablation.figure(first, changes, len(nats) + 1, split))
      figures += attention_mass.figures(first, mass, split)
    files = {figure.name: style.files(figure) for figure in figures}
  content = page.page(
    all_runs,
    figures,
    {name: found[f"{name}.svg"] for name, found in files.items()},
    split=split,
    missing=missing,
    command=shlex.join(sys.argv),
    environment=logbook.environment(),
  )
  if not parallel.is_primary():
    return
  into = folder / "figures"
  with logbook.writing(into):
    into.mkdir(exist_ok=True)
  for found in files.values():
    for name, data in found.items():
      logbook.write_bytes(into / name, data)
  logbook.write_text(folder / "report.html", content)
  for sentence in missing:
    console.say(f"missing    {sentence}")
  console.say(
    f"written to {folder / 'report.html'} and {into}, {len(figures)} figures"
  )


def _figures(all_runs, split):
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
  return drawn, missing


def _check_names(names):
  """Checks that the runs are several folders."""
  for name in names[1:]:
    if not name:
      raise SettingsError("--compare names an empty folder; give DIR,DIR")
  known = [pathlib.Path(name).resolve() for name in names]
  for i, path in enumerate(known):
    if path in known[:i]:
      raise SettingsError(
        f"--compare={names[i]} is shown already; name each run once"
      )


def _chosen(one: runs.Run, heads: str | None) -> list[of_heads.Head]:
  """Returns the rows of the chosen heads of a run."""
  rows = of_heads.of_run(one.name, one.layers, one.config)
  if heads is None:
    return rows
  known = {f"{row.layer}.{row.head}": row for row in rows}
  for head in heads.split(","):
    if not re.fullmatch(r"\d+\.\d+", head) or head not in known:
      raise SettingsError(
        f"--heads={heads}: {head!r} is not a head of {one.name}; expected "
        f"LAYER.HEAD from 0.0 to {[*known][-1]}"
      )
  return [row for head, row in known.items() if head in heads.split(",")]


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
  console.say(f"attention: {console.macs_text(macs, found)}")
  console.say(f"cache: {console.cache_text(one.layers, config)}")
