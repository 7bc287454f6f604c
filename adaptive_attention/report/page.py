"""report.html: one file with all figures in it, which needs no network."""

import html
from collections.abc import Sequence

from adaptive_attention.report import points, runs, style
from adaptive_attention.report.style import Figure
from adaptive_attention.training import paired
from adaptive_attention.training.settings import flatten

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark;
  --text: #1a1a1a; --page: #fff; --line: #ccc; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: #e6e6e6; --page: #161616; --line: #444; }}
}}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--text);
  background: var(--page); max-width: 60rem; margin: 0 auto; padding: 1rem;
  overflow-wrap: anywhere; }}
figure {{ margin: 2rem 0; }}
figure div {{ overflow-x: auto; }}
/* Captions name colours, so that figures are not inverted in the dark. */
figure img {{ width: 100%; background: #fff; }}
figcaption, footer {{ font-size: 0.9rem; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto;
  overflow-wrap: normal; }}
th, td {{ border-bottom: 1px solid var(--line); padding: 0.3rem 0.7rem;
  text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
pre {{ overflow-x: auto; font-size: 0.85rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
<footer>
{footer}
</footer>
</body>
</html>
"""
_BIBTEX = """@inproceedings{sukhbaatar2019adaptive,
  title = {Adaptive Attention Span in Transformers},
  author = {Sukhbaatar, Sainbayar and Grave, Edouard and Bojanowski, Piotr and
    Joulin, Armand},
  booktitle = {Proceedings of ACL},
  year = {2019}
}"""


def page(
  all_runs: Sequence[runs.Run],
  figures: Sequence[Figure],
  pictures: dict[str, bytes],
  *,
  split: str,
  missing: Sequence[str],
  command: str,
  environment: dict,
) -> str:
  """Returns the page.

  Args:
    all_runs: the runs that it shows.
    figures: in their order.
    pictures: name of a figure -> its SVG.
    split: the split of the table.
    missing: sentences on what could not be shown.
    command: what made the page.
    environment: versions, as `logbook.environment` returns them.
  """
  names = runs.labels(all_runs)
  title = f"What heads learned: {', '.join(names)}"
  parts = [f"<p>{html.escape(sentence)}</p>" for sentence in missing]
  for figure in figures:
    parts.append(_figure(figure, pictures[figure.name]))
    if figure.name == "front":
      parts.append(_table(all_runs, names, split))
  return _PAGE.format(
    title=html.escape(title),
    body="\n".join(parts),
    footer=_footer(all_runs, names, command, environment),
  )


def _figure(figure, svg) -> str:
  inches = figure.drawn.get_figwidth()  # a wide one scrolls on a phone
  look = f"min-width: {56 * inches:.0f}px; max-width: {120 * inches:.0f}px"
  return (
    f'<figure id="{figure.name}">\n<h2>{html.escape(figure.title)}</h2>\n'
    f'<div><img src="{style.as_address(svg)}" style="{look}" '
    f'alt="{html.escape(figure.alt)}"></div>\n'
    f"<figcaption>{html.escape(figure.caption)} Also in figures/{figure.name}"
    ".png, .pdf and .svg.</figcaption>\n</figure>"
  )


def _rows(rows) -> str:
  head, *body = (
    "".join(f"<{cell}>{html.escape(str(x))}</{cell}>" for x in row)
    for cell, row in zip(["th"] + ["td"] * len(rows), rows)
  )
  lines = [f"<tr>{head}</tr>", *(f"<tr>{row}</tr>" for row in body)]
  return "<table>\n" + "\n".join(lines) + "\n</table>"


def _table(all_runs, names, split) -> str:
  """Returns the table beneath the front: a row for each run, and for seeds."""
  unit = all_runs[0].units
  rows = [
    (
      *("run", unit.name, "+-", f"{unit.unit}s", "protocol"),
      *(f"more than {names[0]}", "step", "million tokens read", "hours"),
    )
  ]
  first = all_runs[0].evaluation(split)
  for run, name in zip(all_runs, names, strict=True):
    found = run.evaluation(split)
    if found is not None:
      row = name, *_loss(run, found), _more(found, first), *_effort(run)
      rows.append(row)
  for point in points.of_runs(all_runs, split):
    if len(point.names) > 1:
      name = f"mean of {point.name}"
      row = name, f"{point.bits:.4f}", f"{point.stderr:.4f}"
      rows.append((*row, *[""] * (len(rows[0]) - len(row))))
  return _rows(rows)


def _loss(run, found):
  """Returns the loss of a run, its error, of how many tokens, by which rule."""
  count = found[f"{run.units.unit}s"]
  bits, stderr = run.bits(found), found["stderr"]
  return f"{bits:.4f}", f"{stderr:.4f}", f"{count:,}", found["protocol"]


def _more(found, first) -> str:
  """Returns how much more a run loses than the first, on the same tokens."""
  more = first and found is not first and paired.of_records(found, first)
  return f"{more.bits:+.4f} +- {more.stderr:.4f}" if more else ""


def _effort(run):
  """Returns the step of a run, the millions of tokens until then, its hours."""
  tokens = run.step * run.settings["batch_size"] * run.config.context_tokens
  seconds = [line["seconds"] for line in run.metrics if "seconds" in line]
  hours = f"{max(seconds) / 3600:.2f}" if seconds else ""
  return run.step, f"{tokens / 1e6:.2f}", hours


def _footer(all_runs, names, command, environment) -> str:
  flat = [flatten(run.settings) for run in all_runs]
  differ = sorted(
    name
    for name in set().union(*flat)
    if len({repr(settings.get(name)) for settings in flat}) > 1
  )
  data = {f"{run.data['name']} {run.data['sha256']}" for run in all_runs}
  made = "; ".join(
    f"{name}: step {run.step}, seed {run.settings.get('seed')}"
    for name, run in zip(names, all_runs, strict=True)
  )
  parts = [
    "<h2>Where this comes from</h2>",
    f"<p>adaptive_attention {html.escape(environment['adaptive_attention'])} "
    f"({html.escape(environment['commit'])}). {html.escape(made)}. Data: "
    f"{html.escape(', '.join(sorted(data)))}.</p>",
  ]
  if differ:
    parts.append("<h3>Settings that differ</h3>")
    rows = [("setting", *names)]
    rows += [(name, *(s.get(name, "") for s in flat)) for name in differ]
    parts.append(_rows(rows))
  parts.append(f"<pre>{html.escape(command)}</pre>")
  parts.append(f"<pre>{html.escape(_BIBTEX)}</pre>")
  return "\n".join(parts)
