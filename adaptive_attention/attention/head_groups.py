"""Groups heads of keys by how many tokens they keep, so that rings are few.

A ring of the KV cache is as long as its head reaches, ceil(z + R) tokens. A
ring of a segment memory is longer by a segment and a margin. Where a head of
keys serves several heads of queries, the longest reach of these counts. Heads
of similar reach share an array, which costs a few rows and saves calls. This
file alone chooses which heads do, for generation and for training.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from adaptive_attention import masks

_WASTE = 1.08  # rings have at most so many times the rows that reaches need


class Group(NamedTuple):
  """Heads whose rings are of one length; static.

  Attributes:
    heads: their indices among the layer's heads of keys.
    queries: Q, the heads of queries that each of them serves.
    period: P, the residue classes of a ring; 1 where all its keys are read.
    rows: Y, the rows of a residue class. P Y is the longest reach that is
      served.
    residues: the open residues of distances mod P, the same for all its heads.
  """

  heads: tuple[int, ...]
  queries: int
  period: int
  rows: int
  residues: tuple[int, ...]

  @property
  def query_heads(self) -> np.ndarray:
    """The indices of the query heads, (G Q,)."""
    first_G1 = self.queries * np.array(self.heads)[:, None]
    return (first_G1 + np.arange(self.queries)).ravel()

  @property
  def ring_rows(self) -> int:
    """Rows of a head's ring."""
    return self.period * self.rows

  @property
  def reads(self) -> int:
    """Rows of a head's ring that a query reads."""
    return len(self.residues) * self.rows

  def distances(self) -> np.ndarray:
    """Returns (r, Y) the distances that are read, ascending along Y."""
    row_Y = np.arange(self.rows, dtype=np.int32)
    return np.add.outer(np.array(self.residues, np.int32), self.period * row_Y)


def reach(mask: masks.Mask, longest: int) -> np.ndarray:
  """Returns (H,) the reach of each head in tokens, the query itself included.

  It is ceil(z + R), as m(d) > 0 where d < z + R, and at most `longest`. A last
  token whose weight is hidden, m(d) <= 1e-6, does not count.
  """
  spans = masks.Mask(mask.span, mask.ramp)
  return np.asarray(masks.is_open(spans, np.arange(longest))).sum(axis=1)


def key_reach(mask: masks.Mask, longest: int, key_heads: int) -> np.ndarray:
  """Returns for each head of keys the longest reach of its query heads."""
  return reach(mask, longest).reshape(key_heads, -1).max(axis=1)


def groups_of(
  mask: masks.Mask, longest: int, key_heads: int
) -> tuple[Group, ...]:
  """Returns a layer's heads of keys in as few groups as _WASTE allows.

  Args:
    mask: concrete, of the heads of queries.
    longest: the longest reach that a head gets.
    key_heads: how many heads of keys the layer has.
  """
  queries = len(mask.span) // key_heads
  reach_H = key_reach(mask, longest, key_heads)
  strides = [(1, (0,))] * key_heads
  if mask.wave is not None and mask.wave.integer:
    strides = _strides(mask.wave, key_heads)
  groups = []
  for stride in sorted(set(strides)):
    period, residues = stride
    rows = {
      h: -(-int(reach_H[h]) // period)
      for h, other in enumerate(strides)
      if other == stride
    }
    for part in _parted(rows):
      groups.append(Group(part, queries, period, rows[part[-1]], residues))
  return tuple(groups)


class Memory(NamedTuple):
  """What decides how long the rings of a segment memory are; static.

  A call with T tokens writes them over the oldest of a ring and then attends,
  so that a ring that serves a reach of Y tokens has Y + T - 1 rows.

  Attributes:
    T: tokens of a call.
    longest: the longest reach that is served.
    margin: by which share rings are longer than needed, so that spans can grow.
  """

  T: int
  longest: int
  margin: float

  def served(self, reach: int, share: float = 1.0) -> int:
    """Returns the reach that a ring serves, with this share of the margin."""
    ring = math.ceil((1 + share * self.margin) * (max(reach, 1) + self.T - 1))
    return min(ring - self.T + 1, self.longest)

  def all_rows(self, groups: Sequence[Group]) -> int:
    """Returns the rows of the rings of all heads of keys."""
    return sum(len(group.heads) * (group.rows + self.T - 1) for group in groups)

  def holds(
    self,
    groups: Sequence[Group],
    reach_G: Sequence[int] | np.ndarray,
    share: float,
  ) -> bool:
    """Tells whether rings hold what heads reach, and a share of the margin."""
    return all(
      group.rows >= self.served(int(reach_G[h]), share)
      for group in groups
      for h in group.heads
    )

  def groups(
    self,
    reach_G: Sequence[int] | np.ndarray,
    queries: int,
    held_G: Sequence[int] | None = None,
  ) -> tuple[Group, ...]:
    """Returns a layer's heads of keys in as few groups as _WASTE allows.

    Args:
      reach_G: the reach of each head of keys.
      queries: how many heads of queries each of them serves.
      held_G: how many of the newest tokens each head holds, if rings are made
        out of others. Heads of a group hold equally many of those that it asks
        for, as what one of them lacks is hidden from all.
    """
    if held_G is None:
      held_G = [self.longest] * len(reach_G)
    rings = {h: self.served(int(r)) + self.T - 1 for h, r in enumerate(reach_G)}
    groups = []
    for part in _parted(rings):
      asked = rings[part[-1]] - self.T
      for held in sorted({min(held_G[h], asked) for h in part}):
        heads = tuple(sorted(h for h in part if min(held_G[h], asked) == held))
        rows = max(rings[h] for h in heads) - self.T + 1
        groups.append(Group(heads, queries, 1, rows, (0,)))
    return tuple(groups)


def upper_reach(mask: masks.Mask, longest: int, key_heads: int) -> np.ndarray:
  """Returns (G,) ceil(z + R), at most `longest`, for each head of keys.

  It is `key_reach` or one more, and is computed on the host.
  """
  reach_H = np.ceil(np.asarray(mask.span, np.float32) + np.float32(mask.ramp))
  reach_H = np.clip(reach_H, 1, longest).astype(np.int64)
  return reach_H.reshape(key_heads, -1).max(axis=-1)


def dense_groups(heads: int, longest: int, key_heads: int) -> tuple[Group, ...]:
  """Returns one group of all heads, whose rings are of the `longest` reach."""
  every = tuple(range(key_heads))
  return (Group(every, heads // key_heads, 1, longest, (0,)),)


def _strides(wave, key_heads):
  """Returns (P, open residues) of each head of keys.

  A residue is open if it is open to any query head that reads the keys. It is
  (1, (0,)) where all residues are open, where none is, and where the periods of
  these query heads differ.
  """
  period_H = np.round(np.asarray(wave.period)).astype(int)
  open_HR = np.asarray(
    masks.wave_weight(np.arange(period_H.max()), wave) > masks.HIDDEN
  )
  strides = []
  for period_Q, open_QR in zip(
    np.split(period_H, key_heads), np.split(open_HR, key_heads), strict=True
  ):
    P = int(period_Q[0])
    residues = tuple(np.flatnonzero(open_QR.any(axis=0)[:P]).tolist())
    strided = (period_Q == P).all() and 0 < len(residues) < P
    strides.append((P, residues) if strided else (1, (0,)))
  return strides


def _parted(rows):
  """Returns the heads, ascending by rows, cut into the fewest parts.

  Each head of a part takes as many rows as the part's last one. Altogether they
  take at most _WASTE times the rows that are needed. Of all cuts into as many
  parts the one with the fewest rows is taken.
  """
  heads = sorted(rows, key=rows.get)
  needed = sum(rows.values())

  @functools.cache
  def cheapest(first, parts):
    """Returns (rows, cuts) of the heads from `first` on in so many parts."""
    if parts == 1:
      return (len(heads) - first) * rows[heads[-1]], (len(heads),)
    options = []
    for end in range(first + 1, len(heads) - parts + 2):
      rest, cuts = cheapest(end, parts - 1)
      options.append(
        ((end - first) * rows[heads[end - 1]] + rest, (end, *cuts))
      )
    return min(options)

  for parts in range(1, len(heads) + 1):
    taken, cuts = cheapest(0, parts)
    if taken <= _WASTE * needed or parts == len(heads):
      return [
        tuple(heads[start:end])
        for start, end in zip((0, *cuts), cuts, strict=False)
      ]
