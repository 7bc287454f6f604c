"""Numbers of heads against a count of pairs, one by one."""

import csv
import io
import math

import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_attention.config import ModelConfig
from adaptive_attention.masks import Mask, Wave
from adaptive_attention.report import heads, tables

BASE = ModelConfig(
  n_layer=1,
  n_head=4,
  width=16,
  context_tokens=40,
  max_span=64,
  ramp=4.0,
  position="rotary",
  implementation="reference",
)
SPAN = np.array([0.0, 7.3, 12.0, 60.0], np.float32)
PERIOD = np.array([2.0, 3.3, 4.0, 7.6], np.float32)
RATIO = np.array([-0.25, 0.0, 0.1, 0.25], np.float32)


def wave(**options):
  return Wave(jnp.asarray(PERIOD), jnp.asarray(RATIO), **options)


def weight(mask, h, d):
  """Returns m(d), w(d) in float64, from the formulas of a single head."""
  m = np.clip((mask.ramp + float(mask.span[h]) - d) / mask.ramp, 0, 1)
  if mask.wave is None:
    return m, 1.0
  P, r = float(mask.wave.period[h]), float(mask.wave.ratio[h])
  if mask.wave.integer:
    P = float(np.round(P))
  if mask.wave.harmonics is None:
    tri = P / 4 - abs(d - P * np.round(d / P))
  else:
    odd = range(1, mask.wave.harmonics + 1, 2)
    tri = sum(math.cos(2 * math.pi * k * d / P) / k**2 for k in odd)
    tri *= P / 4 * 8 / math.pi**2
  return m, np.clip(tri + 0.5 + P * r, 0, 1)


CASES = {
  "dense": ({"attention": "dense"}, None),
  "span": ({"attention": "span"}, None),
  "series": ({"harmonics": 5}, {"harmonics": 5}),
  "exact": ({"harmonics": 0}, {}),
  "integer": ({"period": "integer", "harmonics": 0}, {"integer": True}),
  "memory": ({"attention": "span", "memory_tokens": 30}, None),
  "grouped": ({"attention": "span", "n_kv_head": 2}, None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_row_is_what_counting_gives(name):
  changes, options = CASES[name]
  config = ModelConfig(**(vars(BASE) | {"n_kv_head": 0} | changes))
  span = jnp.asarray(SPAN)
  if config.attention == "dense":
    span = jnp.full(4, float(config.max_context_tokens))
  mask = Mask(span, 4.0, None if options is None else wave(**options))
  rows = heads.of_run("runs/x", [mask], config)
  T, M = config.context_tokens, config.memory_tokens
  for h, row in enumerate(rows):
    opened = [min(weight(mask, h, d)) > 1e-6 for d in range(T + M)]
    assert (row.run, row.layer, row.head) == ("runs/x", 0, h)
    assert row.open_share == np.float32(np.mean(opened))
    pairs = [opened[M + t - s] for t in range(T) for s in range(M + t + 1)]
    assert row.open_pairs == sum(pairs)
    assert row.open_pairs <= row.computed_pairs
    kept = range(config.cache_tokens)
    reach = sum(weight(mask, h, d)[0] > 1e-6 for d in kept)
    assert row.cache_tokens == reach <= row.cache_rows
    within = [d for d in kept if min(weight(mask, h, d)) > 1e-6]
    assert len(within) <= row.keys_read <= row.cache_rows
    if options is None:
      assert row[5:8] == (None, None, None)
    else:
      assert row.harmonics == options.get("harmonics", 0)
      assert row.ratio == RATIO[h]
      acting = np.round(PERIOD[h]) if options.get("integer") else PERIOD[h]
      assert row.period == acting
  if name == "grouped":  # two heads of queries share a ring
    assert [r.cache_rows for r in rows[:2]] == [rows[0].cache_rows] * 2


@pytest.fixture
def rows():
  mask = Mask(jnp.asarray(SPAN), 4.0, wave(harmonics=5))
  plain = Mask(jnp.asarray(SPAN), 4.0)
  spans = ModelConfig(**(vars(BASE) | {"attention": "span"}))
  return [
    *heads.of_run('runs/a_1, "b" & {c}', [mask], BASE),
    *heads.of_run("runs/plain", [plain], spans),
  ]


def numbers(row):
  """Returns a row, or one of text, with its numbers as float32."""
  run, *values = row
  return run, *(None if v in ("", None) else np.float32(v) for v in values)


def test_csv_comes_back_as_it_was(rows):
  titles, *found = csv.reader(io.StringIO(tables.as_csv(rows)))
  assert tuple(titles) == heads.Head._fields
  first = ("run", "layer", "head", "span", "ramp", "period", "ratio")
  assert tuple(titles[:10]) == (
    *first,
    *("harmonics", "open_share", "cache_tokens"),
  )
  assert [*map(numbers, found)] == [*map(numbers, rows)]


def test_each_float32_is_told_from_its_neighbours():
  values = np.random.default_rng(0).normal(size=1_000).astype(np.float32)
  told = [np.float32(tables._text(float(value))) for value in values]
  np.testing.assert_array_equal(told, values)


def test_tex_comes_back_as_it_was(rows):
  text = tables.as_tex(rows)
  lines = [x.removesuffix(r" \\") for x in text.splitlines() if " & " in x]
  assert text.count(r"\midrule") == 1 and r"open\_share" in lines[0]
  assert lines[1].startswith(r'runs/a\_1, "b" \& \{c\} & 0 & 0 & ')
  for line in lines:
    assert line.replace(r"\&", "").count("&") == len(heads.Head._fields) - 1
  cells = [line.split(" & ") for line in lines[1:]]
  found = [[row.run, *cell[-13:]] for row, cell in zip(rows, cells)]
  assert [*map(numbers, found)] == [*map(numbers, rows)]


@pytest.mark.parametrize("tokens", [1, 30, 40, 4_096])
def test_lines_fit_and_show_the_mask(rows, tokens):
  mask = Mask(jnp.asarray(SPAN), 4.0, wave(harmonics=5))
  titles, *lines = tables.as_lines(rows[:4], [mask], tokens)
  assert all(len(line) <= 80 for line in (titles, *lines))
  assert [line.split()[0] for line in lines] == ["0.0", "0.1", "0.2", "0.3"]
  assert titles.endswith(" a column") and f" 0 to {tokens - 1}, " in titles
  wide = heads.Head(
    "x", 11, 63, 8192.0, 32.0, 64.25, -0.25, 15, 1.0, 8224, *[0] * 4
  )
  row = tables._line(wide, "█" * 35)
  assert len(row) == 80 and row.endswith(" 8224 " + "█" * 35)


def test_shades_are_mean_weights():
  """A span of 8 and a ramp of 8 over 20 tokens, one a column."""
  mask = Mask(jnp.array([8.0, 0.0]), 8.0)
  first, second = tables._drawn(mask, 20)
  assert first == "█" * 10 + "▓▓▒▒░░" + " " * 4
  assert second == "██▓▓▒▒░░" + " " * 12
