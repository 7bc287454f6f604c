"""What figures of heads and of costs count, against plain counts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_attention import accounting
from adaptive_attention.masks import Mask, Wave, is_open
from adaptive_attention.report import cost, head_figures, style
from adaptive_attention.report.runs import Run
from tests.report.test_heads import BASE

MASK = Mask(
  jnp.array([0.0, 7.3, 12.0, 60.0]),
  4.0,
  Wave(jnp.array([2.0, 3.3, 4.0, 8.0]), jnp.array([0.2, 0.0, 0.1, -0.25])),
)
CONFIG = dataclasses.replace(BASE, n_layer=2, max_span=64, memory_tokens=5)
OTHER = dataclasses.replace(MASK, span=MASK.span / 2)


@pytest.fixture
def run():
  layers = [MASK, OTHER]
  return Run("runs/x", 3, CONFIG, {}, {}, layers, [], [], [])


def test_the_part_of_the_wave_is_counted_pair_by_pair():
  T, memory = 20, 5
  found = head_figures._hidden_by_wave(MASK, T, memory)
  spans = Mask(MASK.span, MASK.ramp)
  for h in range(4):
    hidden = by_wave = 0
    for t in range(T):
      for s in range(-memory, t + 1):
        if not is_open(MASK, t - s)[h]:
          hidden += 1
          by_wave += bool(is_open(spans, t - s)[h])
    np.testing.assert_allclose(found[h], by_wave / hidden)


def test_the_pairs_of_the_median_head_are_those_of_accounting(run):
  figure = head_figures.pairs(run)
  T = CONFIG.context_tokens
  counts = np.concatenate([accounting.open_pairs(m, T) for m in run.layers])
  median = int(np.sort(counts)[4])
  place = figure.title.split()[3].rstrip(",")
  layer, head = map(int, place.split("."))
  assert counts[4 * layer + head] == median
  assert f": {median:,} open pairs, 1,600 in blocks of 64 x 64" in figure.alt
  assert f"{T * (T + 1) // 2:,} causal pairs" in figure.alt
  (image,) = figure.drawn.axes[0].images
  assert (image.get_array() == 2).sum() == median


def test_layers_cost_what_accounting_says_of_all_together(run):
  layers, dense_ms = cost.measure(run)
  assert dense_ms > 0 and all(layer.milliseconds > 0 for layer in layers)
  for name, whole in (
    (
      "macs",
      accounting.attention_macs_per_token(
        *(run.layers, CONFIG, CONFIG.context_tokens, CONFIG.memory_tokens)
      ),
    ),
    ("cache_bytes", accounting.cache_bytes(run.layers, CONFIG)),
    ("cache_reads", accounting.cache_reads(run.layers, CONFIG)),
  ):
    for part, value in whole.items():
      assert sum(getattr(x, name)[part] for x in layers) == pytest.approx(value)
  assert layers[0].macs["open"] > layers[1].macs["open"]
  bars = cost.figure(run, layers, dense_ms).drawn.axes[1].patches
  heights = [bar.get_height() for bar in bars]
  assert heights == [dense_ms] * 2 + [layer.milliseconds for layer in layers]


def test_the_same_figure_is_the_same_file(run):
  with style.sheet():
    one, other = (style.files(head_figures.weights(run)) for _ in range(2))
  assert one == other
  assert one.keys() == {"weights.png", "weights.pdf", "weights.svg"}


def test_no_two_of_many_runs_look_alike():
  looks = [(style.of_run(i)["color"], style.marker(i)) for i in range(28)]
  lines = [(*style.of_run(i).values(), style.marker(i)) for i in range(28)]
  assert len({*looks}) == len({*lines}) == 28
