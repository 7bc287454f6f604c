"""Rows of heads as CSV, as a table of LaTeX, and as lines of a console."""

import csv
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from adaptive_attention import masks
from adaptive_attention.report.heads import Head

_SHADES = " ░▒▓█"
_DRAWN_COLUMNS = 35
_TITLES = "head       z   z+R     P     r  K open cache"


def _text(value) -> str:
  """Returns a value so that it is read back as it was; "" for None.

  Nine digits tell each float32 from its neighbours.
  """
  if value is None:
    return ""
  return f"{value:.9g}" if isinstance(value, float) else str(value)


def as_csv(rows: Sequence[NamedTuple]) -> str:
  """Returns rows of one kind as CSV (RFC 4180), under the names of fields."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(rows[0]._fields)
  writer.writerows([_text(value) for value in row] for row in rows)
  return text.getvalue()


_ESCAPED = {
  **{c: f"\\{c}" for c in "&%$#_{}"},
  "\\": r"\textbackslash{}",
  "~": r"\textasciitilde{}",
  "^": r"\textasciicircum{}",
}


def as_tex(rows: Sequence[Head]) -> str:
  """Returns the rows as a tabular of LaTeX, for the package booktabs."""

  def line(values):
    escaped = ("".join(_ESCAPED.get(c, c) for c in value) for value in values)
    return " & ".join(escaped) + r" \\"

  columns = "l" + "r" * (len(Head._fields) - 1)
  return "\n".join(
    [
      r"% \usepackage{booktabs}",
      rf"\begin{{tabular}}{{{columns}}}",
      r"\toprule",
      line(Head._fields),
      r"\midrule",
      *(line(_text(value) for value in row) for row in rows),
      r"\bottomrule",
      r"\end{tabular}",
      "",
    ]
  )


def as_lines(
  rows: Sequence[Head], layers: Sequence[masks.Mask], tokens: int
) -> list[str]:
  """Returns a line of at most 80 columns for each row of one run.

  Args:
    rows: some of the run's heads.
    layers: the masks of its layers.
    tokens: the distances 0 .. tokens - 1 are drawn.
  """
  each = tokens / _DRAWN_COLUMNS
  titles = f"{_TITLES} 0 to {tokens - 1}, {each:.3g} a column"
  drawn = [_drawn(mask, tokens) for mask in layers]
  return [titles] + [_line(row, drawn[row.layer][row.head]) for row in rows]


def _line(row, drawn) -> str:
  place = f"{row.layer}.{row.head}"
  wave = " " * 14
  if row.period is not None:
    harmonics = row.harmonics or "-"
    wave = f"{row.period:5.2f} {row.ratio:+5.2f} {harmonics:>2}"
  return (
    f"{place:<5} {row.span:6.1f} {row.span + row.ramp:5.0f} {wave} "
    f"{row.open_share:4.0%} {row.cache_tokens:>5} {drawn}"
  ).rstrip()


def _drawn(mask, tokens) -> list[str]:
  """Returns the mean weight m w of each head, column by column, in shades."""
  weight_HS = np.exp(np.asarray(masks.log_weight(mask, np.arange(tokens))))
  columns = min(_DRAWN_COLUMNS, tokens)
  edges = np.linspace(0, tokens, columns + 1).astype(int)
  sums_HC = np.add.reduceat(weight_HS, edges[:-1], axis=1)
  shade_HC = np.ceil(
    sums_HC / np.diff(edges) * (len(_SHADES) - 1) - 1e-6
  ).astype(int)
  return ["".join(_SHADES[i] for i in shade_C) for shade_C in shade_HC]
