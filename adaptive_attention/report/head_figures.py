"""Figures of what heads learned: pairs, spans, waves and masks."""

from collections.abc import Sequence

import numpy as np

from adaptive_attention import accounting, masks
from adaptive_attention.report import runs, style
from adaptive_attention.report.style import Figure

_DRAWN_TOKENS = 512  # of a picture of T x T pairs


def _hidden_by_wave(mask, T, memory) -> np.ndarray:
  """Returns (H,) the share of the hidden pairs that the wave alone hides."""
  distance = np.arange(memory + T)
  times = np.minimum(T, memory + T - distance)
  by_span = np.asarray(
    masks.is_open(masks.Mask(mask.span, mask.ramp), distance)
  )
  opened = np.asarray(masks.is_open(mask, distance))
  hidden = (~opened * times).sum(1)
  return (by_span & ~opened) @ times / np.maximum(hidden, 1)


_PANELS = {
  "open pairs of a segment": "log",
  "span z, tokens (under 1 as 1)": "log",
  "hidden by the wave alone, %": "linear",
}


def _of_layers(run):
  """Yields (open pairs, spans, share hidden by waves) of each layer."""
  T, memory = run.config.context_tokens, run.config.memory_tokens
  for mask in run.layers:
    yield (
      accounting.open_pairs(mask, T, memory),
      np.maximum(np.asarray(mask.span), 1),
      100 * _hidden_by_wave(mask, T, memory),
    )


def sorted_heads(all_runs: Sequence[runs.Run]) -> Figure:
  """Draws open pairs, spans and the waves' part of each head, sorted."""
  waves = any(run.config.wave is not None for run in all_runs)
  panels = list(_PANELS)[: 3 if waves else 2]
  drawn, (row,) = style.axes(1, len(panels), width=3 * len(panels), height=2.8)
  told = []
  names = runs.labels(all_runs)
  for i, (run, name) in enumerate(zip(all_runs, names, strict=True)):
    total, H = 0, run.config.n_head
    look = {"marker": style.marker(i), "markersize": 3} | style.of_run(i)
    for layer, of_layer in enumerate(_of_layers(run)):
      total += int(of_layer[0].sum())
      x = layer + (np.arange(H) + 0.5) / H
      for ax, values in zip(row, of_layer):
        label = None if layer or ax is not row[0] else name
        ax.plot(x, np.sort(values), label=label, **look)
    told.append(f"{name}: {total:,} open pairs in a segment")
  for ax, title in zip(row, panels, strict=True):
    ax.set(title=title, xlabel="layer; heads sorted", yscale=_PANELS[title])
    ax.set_xticks(range(max(len(run.layers) for run in all_runs) + 1))
    if _PANELS[title] == "log":
      style.plain_log(ax.yaxis)
  drawn.legend(loc="outside lower center", ncols=min(4, len(names)))
  third = (
    " Right: of the pairs that a head hides, the share that its span leaves "
    "open and its wave hides."
  )
  return Figure(
    "heads",
    "Every head, sorted within its layer",
    "Left: open pairs (t, s), those with min(m, w) > 1e-6, of a segment and "
    "the memory before it. Then the span z, up to which m(d) = 1."
    + (third if waves else "")
    + f" {'; '.join(told)}.",
    f"{len(panels)} panels, heads sorted within layers. {'; '.join(told)}.",
    drawn,
  )


def span_map(all_runs: Sequence[runs.Run]) -> Figure:
  """Draws the spans of all layers and heads as a map."""
  from matplotlib.colors import LogNorm

  columns = len(all_runs)
  most = max(run.config.max_span for run in all_runs)
  least = min(float(np.min(m.span)) for run in all_runs for m in run.layers)
  scale = LogNorm(max(1.0, least), most)
  layers = max(len(run.layers) for run in all_runs)
  height = 1.6 + 0.28 * layers
  drawn, (row,) = style.axes(1, columns, width=2 + 2.6 * columns, height=height)
  told = []
  names = runs.labels(all_runs)
  for ax, run, name in zip(row, all_runs, names, strict=True):
    spans_LH = np.stack([np.asarray(mask.span) for mask in run.layers])
    image = ax.imshow(
      np.maximum(spans_LH, 1), norm=scale, cmap=style.SEQUENTIAL
    )
    ax.grid(False)
    ax.set(title=name, xlabel="head", ylabel="layer", aspect="auto")
    ax.set_xticks(range(run.config.n_head))
    ax.set_yticks(range(len(run.layers)))
    told.append(
      f"{name}: from {spans_LH.min():.1f} to {spans_LH.max():.1f}, mean "
      f"{spans_LH.mean():.1f} tokens"
    )
  bar = drawn.colorbar(image, ax=row.tolist(), label="span z, tokens")
  style.plain_log(bar.ax.yaxis)
  first = all_runs[0].config
  bar.ax.axhline(first.max_span, color="#D55E00", linewidth=3)
  bar.ax.axhline(first.max_span * first.span_init, color="white", linewidth=2)
  return Figure(
    "spans",
    "Spans by layer and head",
    "The span z = max_span sigmoid(span_logit) of each head, in tokens, on a "
    "logarithmic scale; what is under one token is drawn as one. In the scale, "
    f"red is the bound of {first.max_span} tokens, white the "
    f"{first.max_span * first.span_init:g} that a drawn model begins with. "
    f"{'; '.join(told)}.",
    f"A map of spans, layers by heads. {'; '.join(told)}.",
    drawn,
  )


def weights(run: runs.Run) -> Figure:
  """Draws m(d) w(d) of each head as small multiples."""
  config = run.config
  L, H, S = len(run.layers), config.n_head, config.max_context_tokens
  drawn, grid = style.small_multiples(L, H)
  distance = np.arange(S)
  # All panels share their axes, and minor ticks would take long.
  grid[0, 0].set(xscale="log", xlim=(0.5, S + 0.5), ylim=(0, 1.02))
  grid[0, 0].minorticks_off()
  style.plain_log(grid[0, 0].xaxis)
  for layer, mask in enumerate(run.layers):
    weight_HS = np.exp(np.asarray(masks.log_weight(mask, distance)))
    exact_HS = _exact_waves(mask, distance)
    for h, ax in enumerate(grid[layer]):
      _one_weight(ax, weight_HS[h])
      if exact_HS is not None:
        near = distance[: int(4 * float(mask.wave.period[h])) + 1]
        ax.plot(near + 1, exact_HS[h, near], color="black", linewidth=0.5)
  series = config.wave is not None and config.wave.harmonics
  return Figure(
    "weights",
    f"The masks of {run.label}",
    "m(d) w(d) against d + 1, of the distance d = t - s in tokens, on a "
    "logarithmic scale, with m(d) = clip((R + z - d) / R, 0, 1), R = "
    f"{config.ramp:g}, and w(d) = clip(tri(d) + 1/2 + P r, 0, 1). Dark: open "
    "with weight one. Light: open and softened. Grey: hidden."
    + (" The thin line is the exact wave beside its series." if series else ""),
    f"{L} by {H} small panels, one for each head, of its weight over {S} "
    "distances.",
    drawn,
  )


def _one_weight(ax, weight_S):
  from matplotlib.collections import PolyCollection

  edges = np.arange(len(weight_S) + 1) + 0.5
  full_S = np.where(weight_S >= 1, weight_S, 0)
  for shown_S, colour in (
    (weight_S <= 0, style.HIDDEN),
    (weight_S, style.SOFT),
    (full_S, style.OPEN),
  ):
    heights = np.concatenate([[0], np.repeat(shown_S, 2), [0]])
    steps = np.stack([np.repeat(edges, 2), heights], axis=-1)
    # Nothing else is as fast with some hundred panels.
    look = {"facecolor": colour, "linewidth": 0, "rasterized": True}
    ax.add_collection(PolyCollection([steps], **look), autolim=False)


def _exact_waves(mask, distance) -> np.ndarray | None:
  """Returns (H, S) w(d) without a series, beside one; None without a series."""
  if mask.wave is None or mask.wave.harmonics is None:
    return None
  exact = masks.Wave(mask.wave.period, mask.wave.ratio)
  return np.asarray(masks.wave_weight(distance, exact))


def pairs(run: runs.Run) -> Figure:
  """Draws the open pairs of one head over the blocks that are computed."""
  config = run.config
  T = min(config.context_tokens, _DRAWN_TOKENS)
  counts = [
    accounting.open_pairs(mask, config.context_tokens) for mask in run.layers
  ]
  flat = np.concatenate(counts)
  place = int(np.argsort(flat)[len(flat) // 2])  # the median head
  layer, head = divmod(place, config.n_head)
  mask = run.layers[layer]
  distance_TS = np.arange(T)[:, None] - np.arange(T)
  opened = np.asarray(masks.is_open(mask, np.abs(distance_TS)))[head]
  opened = opened & (distance_TS >= 0)
  block = _block(config)
  blocks = np.add.reduceat(
    np.add.reduceat(opened, range(0, T, block), 0), range(0, T, block), 1
  )
  computed = np.kron(blocks > 0, np.ones((block, block), bool))[:T, :T]
  drawn, ((ax,),) = style.axes(width=4.2, height=4.0)
  shown = np.where(opened, 2.0, np.where(computed, 1.0, 0.0))
  from matplotlib.colors import ListedColormap

  ax.imshow(
    shown,
    cmap=ListedColormap(["white", style.SOFT, style.OPEN]),
    interpolation="nearest",
    vmin=0,
    vmax=2,
  )
  ax.grid(False)
  ax.set(xlabel="key s, tokens", ylabel="query t, tokens")
  told = (
    f"{opened.sum():,} open pairs, {computed.sum():,} in blocks of {block} x "
    f"{block} with an open one, {T * (T + 1) // 2:,} causal pairs"
  )
  return Figure(
    "pairs",
    f"Pairs of head {layer}.{head}, the median one",
    f"Dark: open pairs (t, s) of {T} tokens. Light: the other pairs of blocks "
    f"that hold an open one, which are computed too: {told}. A stride, which "
    "an integer wave can have, computes fewer.",
    f"The {T} by {T} pairs of head {layer}.{head}: {told}.",
    drawn,
  )


def _block(config) -> int:
  """Returns how many tokens wide blocks are here."""
  blocks = accounting.attention_choice(config).blocks
  return int(str(blocks).split(" x ")[0]) if blocks else 64
