"""Shows what each head of a run learned, beside those of other runs."""

import pathlib
import re
from typing import NamedTuple

from adaptive_attention import accounting
from adaptive_attention.config import ModelConfig
from adaptive_attention.errors import SettingsError
from adaptive_attention.mask_parameters import mask_params
from adaptive_attention.masks import Mask
from adaptive_attention.report import heads as of_heads
from adaptive_attention.report import tables
from adaptive_attention.training import (
  checkpoint,
  console,
  logbook,
  parallel,
  settings,
)


class _Run(NamedTuple):
  """A run at a step.

  Attributes:
    name: its folder, as it was given.
    layers: the masks of its layers.
  """

  name: str
  step: int
  config: ModelConfig
  layers: list[Mask]


def run(config, workdir, *, step, compare=None, heads=None):
  """Prints a line for each head; writes heads.csv and heads.tex.

  Nothing is written unless all runs can be read.

  Args:
    config: the checkpoint's settings.
    workdir, step: the run's folder and the checkpoint.
    compare: folders of other runs, separated by commas, each with its newest
      checkpoint.
    heads: LAYER.HEAD of the heads to show, separated by commas; None for all.

  Raises:
    SettingsError: a head that does not exist, or a run is named twice.
    CheckpointError: a folder has no checkpoint, or it is damaged.
  """
  names = [str(workdir), *(compare.split(",") if compare else ())]
  _check_names(names)
  model_config = settings.model_config(config.model)
  runs = [_read(names[0], step, model_config)]
  runs += [_read(name) for name in names[1:]]
  shown = [_chosen(one, heads) for one in runs]
  rows = [row for of_run in shown for row in of_run]
  try:  # the files are written even if nothing can be printed
    for one, of_run in zip(runs, shown, strict=True):
      _say(one, of_run)
  finally:
    if parallel.is_primary():
      folder = pathlib.Path(workdir)
      logbook.write_text(folder / "heads.csv", tables.as_csv(rows))
      logbook.write_text(folder / "heads.tex", tables.as_tex(rows))
  console.say(f"written to {folder / 'heads.csv'} and heads.tex")


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


def _read(name, step=None, config=None) -> _Run:
  """Reads a run's masks, of its newest checkpoint if no step is given."""
  with checkpoint.Checkpoints(name) as saved:
    if step is None:
      step = saved.resolve("latest")
    params, meta = saved.restore_params(step)
  config = config or settings.model_config(meta["config"]["model"])
  return _Run(name, step, config, mask_params(params, config))


def _chosen(one: _Run, heads: str | None) -> list[of_heads.Head]:
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


def _say(one: _Run, rows):
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
