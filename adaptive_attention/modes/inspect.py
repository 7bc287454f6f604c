"""Shows what each head of a run learned, beside those of other runs."""

import pathlib
import re

from adaptive_attention.errors import SettingsError
from adaptive_attention.report import heads as of_heads
from adaptive_attention.report import runs, whole
from adaptive_attention.training import settings


def run(
  config: settings.Checked,
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

  Nothing is written unless all runs can be read.

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
    WriteError: a file cannot be written.
  """
  all_runs = _read(workdir, step, config.model, compare)
  rows = [_chosen(one, heads) for one in all_runs]
  sample = None
  if inspect_bytes:
    data = getattr(corpus, split)[:inspect_bytes]
    sample = whole.Sample(data, config.given.eval_batch_size)
  whole.write(workdir, all_runs, rows, split=split, sample=sample)


def _read(workdir, step, model_config, compare) -> list[runs.Run]:
  """Reads the run, and those to compare with, which must be other folders."""
  names = [str(workdir), *(compare.split(",") if compare else ())]
  _check_names(names)
  return [
    runs.read(names[0], step, model_config),
    *(runs.read(name) for name in names[1:]),
  ]


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
