"""One row for each head of a run: what it learned, and what that leaves open.

Rows are of query heads. Where several share a head of keys, they share its
cache too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from adaptive_attention import accounting, masks
from adaptive_attention.attention import head_groups
from adaptive_attention.config import ModelConfig


class Head(NamedTuple):
  """What a head learned. Lengths are in tokens; None where there is no wave.

  Attributes:
    run: the folder of the run.
    layer, head: its place, both from 0 on.
    span, ramp: z and R; without spans z is the longest context.
    period, ratio: P and r of its wave.
    harmonics: the highest harmonic of the wave's series; 0 for the exact wave.
    open_share: the share of the distances in a context that are not hidden.
    cache_tokens: its reach, whose keys the KV cache must hold: ceil(z + R), at
      most `config.cache_tokens`.
    cache_rows: rows of the ring that the KV cache gives to its head of keys.
    keys_read: how many of these are read for a token.
    open_pairs: how many pairs of a query and a key are open in a segment.
    computed_pairs: how many are computed, as blocks are computed whole.
  """

  run: str
  layer: int
  head: int
  span: float
  ramp: float
  period: float | None
  ratio: float | None
  harmonics: int | None
  open_share: float
  cache_tokens: int
  cache_rows: int
  keys_read: int
  open_pairs: int
  computed_pairs: int


def of_run(
  run: str, layers: Sequence[masks.Mask], config: ModelConfig
) -> list[Head]:
  """Returns a row for each head, layer by layer.

  Args:
    run: the folder of the run, as the rows name it.
    layers: the masks of all layers, concrete.
    config: the settings of the model.
  """
  return [
    head
    for layer, mask in enumerate(layers)
    for head in _of_layer(run, layer, mask, config)
  ]


def _of_layer(run, layer, mask, config):
  H, T = config.n_head, config.context_tokens
  wave = mask.wave
  harmonics = None if wave is None else wave.harmonics or 0
  rows, reads = _cache(mask, config)
  opened = accounting.open_pairs(mask, T, config.memory_tokens)
  computed = accounting.computed_pairs(
    *(mask, T, config.implementation, config.memory_tokens),
    *(config.width // H, config.compute_dtype),
  )
  share = masks.open_share(mask, config.max_context_tokens)
  reach = head_groups.reach(mask, config.cache_tokens)
  for h in range(H):
    yield Head(
      *(run, layer, h, float(mask.span[h]), float(mask.ramp)),
      *((None, None) if wave is None else _wave(wave, h)),
      harmonics,
      float(share[h]),
      *(int(x[h]) for x in (reach, rows, reads, opened, computed)),
    )


def _wave(wave, h):
  """Returns P and r of a head; P is the one that acts, if it is rounded."""
  period = np.asarray(wave.period)[h]
  return float(np.round(period) if wave.integer else period), float(
    wave.ratio[h]
  )


def _cache(mask, config):
  """Returns (H,) rows of each head's ring, and how many a token reads."""
  rows = np.zeros(config.n_head, int)
  reads = np.zeros(config.n_head, int)
  for group in head_groups.groups_of(
    mask, config.cache_tokens, config.n_kv_head
  ):
    rows[group.query_heads] = group.ring_rows
    reads[group.query_heads] = group.reads
  return rows, reads
