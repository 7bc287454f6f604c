"""What a head is for: how the loss changes without a part of it.

Each part is taken away alone, from a trained model that stays as it is
otherwise: the wave of a head is opened (w = 1), its span is opened over the
whole context (m = 1), its span is cut to half, or the head is left out (its
output is zero). The loss is of the same tokens each time, so that the change
has a standard error of its own; see `training.paired`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from adaptive_attention.config import ModelConfig
from adaptive_attention.mask_parameters import mask_params, with_lengths
from adaptive_attention.masks import Mask
from adaptive_attention.model import Transformer
from adaptive_attention.report import runs, style
from adaptive_attention.report.style import Figure
from adaptive_attention.segment_memory import full_groups
from adaptive_attention.training import evaluator, paired, parallel

KINDS = {
  "wave opened": "its wave is opened",
  "span opened": "its span is opened",
  "span halved": "its span is cut to half",
  "left out": "it is left out",
}


class Change(NamedTuple):
  """How the loss changes without a part of a head.

  Attributes:
    layer, head: which one.
    kind: one of KINDS.
    bits, stderr: the change in bits per token and its standard error; above 0
      where the loss grows.
  """

  layer: int
  head: int
  kind: str
  bits: float
  stderr: float


def bounds_that_open(config: ModelConfig) -> ModelConfig:
  """Returns settings whose bounds let each wave and span open fully.

  A model with vectors of distances has none beyond its longest span, so that
  its spans cannot be opened further than that.
  """
  if config.wave is not None:
    config = dataclasses.replace(config, ratio_max=0.5)
  longest = max(config.max_span, config.max_context_tokens)
  if config.position != "relative" and config.attention != "dense":
    config = dataclasses.replace(config, max_span=longest)
  return config


def _under(attention, mask: Mask, config: ModelConfig) -> dict:
  """Returns a layer's parameters that give a mask under a config's bounds."""
  found = {"span_logit": np.asarray(mask.span)}
  if mask.wave is not None:
    found["ratio_logit"] = np.asarray(mask.wave.ratio)
  return with_lengths(
    attention, config, lambda name, length: found.get(name, length)
  )


def _without(attention, kind, h, config) -> dict | None:
  """Returns a layer's parameters without a part of a head, if it has it."""
  if kind == "left out":
    kernel = np.array(attention["out"]["kernel"])
    K = config.width // config.n_head
    kernel[h * K : (h + 1) * K] = 0
    return {**attention, "out": {**attention["out"], "kernel": kernel}}
  changed = "ratio_logit" if kind == "wave opened" else "span_logit"
  if changed not in attention:
    return None

  def change(name, length):
    if name != changed:
      return length
    length = length.copy()
    match kind:
      case "wave opened":
        length[h] = config.ratio_max
      case "span opened":
        length[h] = config.max_span
      case "span halved":
        length[h] /= 2
    return length

  return with_lengths(attention, config, change)


def variants(
  params: Mapping[str, Any], config: ModelConfig
) -> tuple[dict, ModelConfig, Iterator[tuple[int, int, str, dict]]]:
  """Returns (parameters and settings to compare with, changed parameters).

  The first compute what the given ones compute, under `bounds_that_open`. The
  changed parameters come with their layer, head and kind.
  """
  layers = mask_params(params, config)
  wide = bounds_that_open(config)
  base = dict(params)
  if wide != config:
    for i, mask in enumerate(layers):
      block = base[f"block_{i}"]
      attention = _under(block["attention"], mask, wide)
      base[f"block_{i}"] = {**block, "attention": attention}

  def changed():
    for i in range(config.n_layer):
      block = base[f"block_{i}"]
      for h in range(config.n_head):
        for kind in KINDS:
          less = _without(block["attention"], kind, h, wide)
          if less is not None:
            tree = {**base, f"block_{i}": {**block, "attention": less}}
            yield i, h, kind, tree

  return base, wide, changed()


def measure(
  params: Mapping[str, Any],
  config: ModelConfig,
  data,
  batch_size: int,
  progress: Callable[[int, int], None] = lambda done, count: None,
) -> list[Change]:
  """Returns the change of the loss without each part of each head.

  Args:
    params, config: the model.
    data: the tokens to predict, by the model's own protocol.
    batch_size: as of `evaluator.Evaluator`.
    progress: called with how many are done, and how many there are.
  """
  base, wide, changed = variants(params, config)
  predict = evaluator.Evaluator(Transformer(wide), batch_size)
  # They hold what any of these models reaches, so that it compiles once.
  groups = full_groups(wide, wide.context_tokens)
  predict = functools.partial(predict, data=data, groups=groups)
  whole = predict(parallel.replicate(base))
  found, cases = [], list(changed)
  for layer, head, kind, tree in cases:
    result = predict(parallel.replicate(tree))
    chunks = result.chunk_bits, whole.chunk_bits
    more = paired.difference(*chunks, result.tokens)
    found.append(Change(layer, head, kind, *more))
    progress(len(found), len(cases))
  return found


def sentences(run: runs.Run, changes: Sequence[Change]) -> list[str]:
  """Returns what was found of each kind: the mean, and the worst head."""
  told = []
  for kind in KINDS:
    of_kind = [change for change in changes if change.kind == kind]
    if of_kind:
      worst = max(of_kind, key=lambda change: change.bits)
      mean = np.mean([change.bits for change in of_kind])
      told.append(
        f"{kind}: mean {mean:+.4f} {run.units.name}, at most {worst.bits:+.4f} "
        f"+- {worst.stderr:.4f} (head {worst.layer}.{worst.head})"
      )
  return told


def figure(
  run: runs.Run, changes: Sequence[Change], tokens: int, split: str
) -> Figure:
  """Draws the changes of the loss as maps, layers by heads."""
  kinds = [kind for kind in KINDS if any(c.kind == kind for c in changes)]
  L, H = len(run.layers), run.config.n_head
  drawn, (row,) = style.axes(
    *(1, len(kinds)), width=1 + 2.9 * len(kinds), height=1.6 + 0.28 * L
  )
  told, unit = sentences(run, changes), run.units.name
  for ax, kind in zip(row, kinds, strict=True):
    of_kind = [change for change in changes if change.kind == kind]
    bits_LH = np.array([c.bits for c in of_kind]).reshape(L, H)
    most = np.abs(bits_LH).max() or 1.0
    image = ax.imshow(bits_LH, cmap="RdBu_r", vmin=-most, vmax=most)
    drawn.colorbar(image, ax=ax)
    ax.grid(False)
    ax.set(title=f"{kind}, bits", xlabel="head", ylabel="layer", aspect="auto")
    ax.set_xticks(range(H))
    ax.set_yticks(range(L))
  return Figure(
    "ablation",
    "The loss without a part of a head",
    f"By how many {unit} the loss of the first {tokens:,} tokens of the "
    f"{split} split grows if one head is changed and all others stay: "
    f"{'; '.join(KINDS[kind] for kind in kinds)}. Red: the loss grows; each "
    "map has a scale of its own. "
    f"{'; '.join(told)}; +- is the standard error of the difference.",
    f"Maps of layers by heads. {'; '.join(told)}.",
    drawn,
  )
