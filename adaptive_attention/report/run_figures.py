"""Figures of runs: their curves, and loss against what it costs."""

from collections.abc import Sequence

import numpy as np

from adaptive_attention.report import points, runs, style
from adaptive_attention.report.style import Figure


def mask_curves(run: runs.Run) -> Figure | None:
  """Draws each head's span, period, ratio and open share over steps.

  Returns None where the run recorded no masks, as those before 0.4.
  """
  if len(run.curves) < 2:
    return None
  titles = {
    "span": "span z, tokens",
    "period": "period P, tokens",
    "ratio": "ratio r",
    "open_share": "open share of distances",
  }
  names = [name for name in titles if name in run.curves[0]]
  steps = [row["step"] for row in run.curves]
  drawn, (row,) = style.axes(1, len(names), width=2.6 * len(names), height=2.8)
  from matplotlib import colormaps

  L = len(run.curves[0]["span"])
  colours = colormaps[style.SEQUENTIAL](np.linspace(0, 0.9, L))
  for ax, name in zip(row, names, strict=True):
    values_NLH = np.array([line[name] for line in run.curves])
    for layer in range(L):
      lines = ax.plot(steps, values_NLH[:, layer], color=colours[layer], lw=0.8)
      if ax is row[0]:
        lines[0].set_label(f"layer {layer}")
    ax.set(title=titles[name], xlabel="step")
  drawn.legend(loc="outside lower center", ncols=min(6, L))
  first, last = (np.mean(run.curves[i]["span"]) for i in (0, -1))
  return Figure(
    "curves",
    f"The masks of {run.label} over its training",
    "A line for each head, by its layer: the span, the period and ratio of its "
    "wave, and the share of the distances in a context that it leaves open, at "
    f"each recorded step. The mean span went from {first:.1f} to {last:.1f} "
    "tokens.",
    f"Lines over {steps[-1]} steps; the mean span went from {first:.1f} to "
    f"{last:.1f} tokens.",
    drawn,
  )


def losses(all_runs: Sequence[runs.Run]) -> Figure | None:
  """Draws loss against steps, tokens and time; None without any record."""
  shown = [run for run in all_runs if run.metrics]
  if not shown:
    return None
  drawn, (row,) = style.axes(1, 3, width=9, height=2.8, sharey=True)
  names = runs.labels(shown)
  told = []
  for i, (run, name) in enumerate(zip(shown, names, strict=True)):
    tokens = run.settings["batch_size"] * run.config.context_tokens
    train = [line for line in run.metrics if line["split"] == "train"]
    valid = [line for line in run.metrics if line["split"] == "valid"]
    hours = {line["step"]: line["seconds"] / 3600 for line in train}
    for lines, look in (
      (train, {"alpha": 0.45, "lw": 0.8}),
      (valid, {"marker": style.marker(i), "markersize": 4, "lw": 1.2}),
    ):
      steps = np.array([line["step"] for line in lines])
      bits = [run.bits(line) for line in lines]
      times = [hours.get(step, np.nan) for step in steps]
      for ax, x in zip(row, (steps, steps * tokens / 1e6, times), strict=True):
        label = name if lines is valid and ax is row[0] else None
        ax.plot(x, bits, label=label, **style.of_run(i), **look)
    if valid:
      told.append(f"{name}: {run.bits(valid[-1]):.4f} at the end")
  unit = shown[0].units.name
  for ax, title in zip(
    row, ("step", "million tokens read", "hours, all resumes"), strict=True
  ):
    ax.set_xlabel(title)
    ax.locator_params(axis="x", nbins=5)
  row[0].set_ylabel(unit)
  drawn.legend(loc="outside lower center", ncols=min(4, len(names)))
  return Figure(
    "losses",
    "Loss over training",
    f"In {unit}: thin, of the batches of training (with dropout, if any); with "
    "markers, of the validation split, against steps, tokens, and wall time. "
    f"{'; '.join(told)}.",
    f"Curves of the loss. {'; '.join(told)}.",
    drawn,
  )


def by_position(run: runs.Run, nats: np.ndarray, split: str) -> Figure:
  """Draws the loss against the place of a token in its window.

  Args:
    nats: the losses of a split's tokens, but for the first, window by window.
  """
  T = run.config.context_tokens
  bits = nats / np.log(2)
  place = np.arange(len(bits)) % T
  edges = np.unique(np.linspace(0, T, min(17, T + 1)).astype(int))
  drawn, ((ax,),) = style.axes(width=5, height=2.8)
  of_bin = np.searchsorted(edges, place, side="right") - 1
  counts = np.bincount(of_bin, minlength=len(edges) - 1)
  found = counts > 0
  sums = np.bincount(of_bin, bits, len(edges) - 1)
  squares = np.bincount(of_bin, bits**2, len(edges) - 1)
  mean = sums[found] / counts[found]
  spread = np.sqrt(np.maximum(squares[found] / counts[found] - mean**2, 0))
  middle = ((edges[:-1] + edges[1:]) / 2)[found]
  error = spread / np.sqrt(counts[found])
  ax.errorbar(middle, mean, yerr=error, marker="o", ms=3, **style.of_run(0))
  ax.set(xlabel="tokens before it in its window", ylabel=run.units.name)
  return Figure(
    "position",
    "Loss by the place in the window",
    f"{run.units.name.capitalize()} of {len(bits):,} tokens of the {split} "
    f"split, in disjoint windows of {T} tokens, against how many tokens of its "
    "window come before a token; bars are one standard error, as if tokens "
    f"were independent. First {mean[0]:.3f}, last {mean[-1]:.3f}.",
    f"A curve from {mean[0]:.3f} to {mean[-1]:.3f} {run.units.name}.",
    drawn,
  )


def fronts(all_runs: Sequence[runs.Run], split: str) -> Figure | None:
  """Draws loss against multiply-adds; None where no run was evaluated."""
  found = points.of_runs(all_runs, split)
  if not found:
    return None
  from matplotlib.ticker import EngFormatter

  drawn, (row,) = style.axes(1, 2, width=8, height=3.0, sharey=True)
  alike = len({point.protocol for point in found}) == 1
  bars, told = _bars(found, runs.labels(all_runs)[0])
  for ax, kind in zip(row, ("open", "computed"), strict=True):
    for i, point in enumerate(found):
      label = point.name if alike else f"{point.name} ({point.protocol})"
      ax.errorbar(
        *(point.macs[kind], point.bits),
        yerr=[[bar] for bar in bars[i]],
        fmt=style.marker(i),
        color=style.of_run(i)["color"],
        capsize=3,
        label=label if ax is row[0] else None,
      )
    x, y = _front([(point.macs[kind], point.bits) for point in found])
    ax.step(x, y, where="post", color="grey", lw=0.8, zorder=0)
    ax.set(xlabel=f"{kind} multiply-adds per token of attention")
    ax.xaxis.set_major_formatter(EngFormatter())
    ax.locator_params(axis="x", nbins=6)
  row[0].set_ylabel(all_runs[0].units.name)
  drawn.legend(loc="outside lower center", ncols=min(4, len(found)))
  best = min(found, key=lambda point: point.bits)
  return Figure(
    "front",
    f"Loss against what attention costs, {split} split",
    f"{all_runs[0].units.name.capitalize()} of the {split} split against the "
    "multiply-adds of attention per token, over all layers and heads: those of "
    f"the open pairs, and those of the pairs that are computed. {told} The "
    f"grey line is the Pareto front. The least loss is that of {best.name}, "
    f"{best.bits:.4f}.",
    f"{len(found)} points; the least loss is that of {best.name}.",
    drawn,
  )


def _bars(found: Sequence[points.Point], first: str):
  """Returns ((below, above) of each point, a sentence on what bars are).

  What the text does to all runs alike is left out of the bars, if that is known
  of each run.

  Args:
    first: the name of the run that others are compared with.
  """
  alone = [point for point in found if len(point.names) == 1]
  apart = [point.apart for point in alone]
  # The first run has a point to itself, and is compared with all others.
  compared = len(apart) > 1 and apart[0] == 0 and None not in apart
  told = "Bars are one standard error"
  if compared:
    most = max(point.stderr for point in alone)
    told += (
      f" of the difference from {first}, token by token, as most of the error "
      f"of a loss, {most:.3f}, is one of the text, which all runs share; what "
      "another seed would change is in neither"
    )
  if len(alone) < len(found):
    told += " or, of several seeds, their least and largest"
  bars = []
  for point in found:
    error = point.apart if compared else point.stderr
    bar = error, error
    if len(point.names) > 1:
      bar = point.bits - point.low, point.high - point.bits
    bars.append(bar)
  return bars, f"{told}."


def _front(points_XY):
  """Returns the xs and the ys of the points which no other beats in both."""
  front, least = [], np.inf
  for x, y in sorted(points_XY):
    if y < least:
      front.append((x, y))
      least = y
  return zip(*front, strict=True)
