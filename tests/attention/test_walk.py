"""The walk finds the blocks that brute force finds to hold an open pair."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_attention import masks
from adaptive_attention.attention import (
  pallas_tpu_item,
  pallas_tpu_layout,
  walk,
  walk_items,
)
from adaptive_attention.attention.pallas_attend import Static
from adaptive_attention.attention.walk import Sizes
from adaptive_attention.masks import Mask, Wave
from tests.pairs import in_turn


def made(heads, integer=True):
  """Returns a mask of heads, each (span,) or (span, period, ratio)."""
  span, *wave = (jnp.array(x, jnp.float32) for x in zip(*heads, strict=True))
  return Mask(span, 8.0, Wave(*wave, integer=integer) if wave else None)


# Spans of 365, and of 495 under a stride of 2, are a little too short for a
# last block of 64 or 128 to be full. Spans of 128, and of 256 under that
# stride, are long enough but for the token that is left out, as m is rounded.
# With 92 and a stride of 3 the last open distance of residues 1 and 2 is 32
# rows: one row more would be one block more.
MASKS = {
  "spans": made(
    [(z,) for z in (0.0, 0.4, 5.5, 40.5, 63.0, 128.0, 130.5, 365.0, 1e4)]
  ),
  "real waves": made(
    [(3.5, 2.3, 0.1), (90.5, 5.7, -0.2), (1e4, 7.9, 0.2), (9.5, 4.0, -0.5)],
    integer=False,
  ),
  "integer waves": made(
    [(1e4, P, -0.2) for P in range(1, walk.MAX_STRIDE + 1)]
    + [(20.0 * P, P, P / 40 - 0.25) for P in range(1, walk.MAX_STRIDE + 1)]
    + [(365.0, 2.0, -0.2), (495.0, 2.0, -0.2), (256.0, 2.0, -0.2)]
    + [(92.0, 3.0, 0.2)]
    + [(50.0, 17.0, -0.25), (1e4, 4.0, -0.5), (1e4, 4.0, 0.5), (0.0, 2.0, 0.2)]
  ),
}
# T, S, first key, rows of query blocks and of key blocks.
SIZES = [
  (1, 1, 0, 16, 16),
  (1, 300, 0, 64, 32),
  (33, 40, 0, 1, 3),
  (50, 57, 3, 5, 7),
  (7, 10, 3, 16, 32),
  (129, 129, 0, 64, 64),
  (129, 129, 128, 32, 64),
  (130, 200, 70, 64, 16),
  (300, 427, 17, 128, 64),
  (300, 427, 400, 32, 128),
  (333, 333, 333, 64, 64),
  (400, 430, 5, 32, 64),
  (500, 500, 0, 48, 80),
  (700, 900, 50, 128, 128),
]
case = pytest.mark.parametrize(
  ("size", "name"), in_turn(SIZES, MASKS), ids=lambda x: f"{x}"
)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _found(mask, first_key, sizes, cost):
  # The cost is read when this is traced.
  assert walk._STRIDE_COST == cost
  table_HS = masks.log_weight(mask, jnp.arange(sizes.S, dtype=jnp.int32))
  heads = walk.heads_of(mask, table_HS, first_key, sizes)
  ends = {rows: walk.ends_of(heads, sizes, rows) for rows in "qk"}
  return heads, table_HS, ends, walk.block_count(heads, sizes)


def found(mask, size):
  """Returns (heads, sizes, table_HS, ends, counts) as NumPy's arrays."""
  T, S, first_key, block_q, block_k = size
  strided = mask.wave is not None and mask.wave.integer
  sizes = Sizes(T, S, block_q, block_k, strided)
  heads, *rest = jax.tree.map(
    np.asarray, _found(mask, first_key, sizes, walk._STRIDE_COST)
  )
  return heads, sizes, *rest


def positions(stride, sizes, rows):
  """Returns {(class, block): x of its rows that exist} of one head."""
  block = sizes.block_q if rows == "q" else sizes.block_k
  found = {}
  for x in range(0 if rows == "q" else -sizes.older, sizes.T):
    y, group = divmod(x, stride)
    found.setdefault((group, y // block), []).append(x)
  return {key: np.array(x) for key, x in found.items()}


def brute_force(mask, size, heads, sizes, table_HS):
  """Returns, for each head, {(a, i, c, j): log weights of the block's pairs}.

  Only blocks with an open pair are there, and only queries and keys that exist.
  A pair whose key is later than the query, or missing, has -inf. Where a head
  walks a wave with stride 1, all distances up to its last open one count as
  open.
  """
  first = min(max(size[2], 0), sizes.S) - sizes.older
  of_heads = []
  for h, stride in enumerate(heads.stride.tolist()):
    counts = np.isfinite(table_HS[h])
    if stride == 1 and mask.wave is not None and counts.any():
      counts[: np.flatnonzero(counts)[-1] + 1] = True
    blocks = {}
    for ((a, i), x_q), ((c, j), x_k) in itertools.product(
      positions(stride, sizes, "q").items(),
      positions(stride, sizes, "k").items(),
    ):
      d = x_q[:, None] - x_k[None]
      there = (d >= 0) & (x_k >= first)[None]
      d = np.clip(d, 0, None)
      if (counts[d] & there).any():
        weights = np.where(there, table_HS[h][d], -np.inf)
        whole = len(x_k) == sizes.block_k
        blocks[a, i, c, j] = weights if whole else np.append(weights, -np.inf)
    of_heads.append(blocks)
  return of_heads


def walked(heads, sizes, ends_of_rows, rows):
  """Returns, for each head, the list of ((a, i, c, j), is full) as walked."""
  ends, blocks = ends_of_rows
  block = sizes.block_q if rows == "q" else sizes.block_k
  of_heads = []
  for h, P in enumerate(heads.stride.tolist()):
    of_heads.append([])
    for n, r in np.ndindex(ends[0].shape[1:]):
      start, full_start, full_stop, stop = (int(end[h, n, r]) for end in ends)
      assert start <= full_start <= full_stop <= stop
      group, here = int(blocks.group[h, n]), int(blocks.y[h, n]) // block
      rho = int(heads.residues[h, r])
      for there in range(start, stop):
        if rows == "q":
          key = group, here, (group - rho) % P, there
        else:
          key = (group + rho) % P, there, group, here
        of_heads[-1].append((key, full_start <= there < full_stop))
  return of_heads


@case
def test_blocks_with_an_open_pair_are_walked_once_and_no_others(
  name, size, monkeypatch
):
  """It is so in both directions, and under strides that do not pay too."""
  monkeypatch.setattr(walk, "_STRIDE_COST", 0.0)
  heads, sizes, table_HS, ends, counts = found(MASKS[name], size)
  expected = brute_force(MASKS[name], size, heads, sizes, table_HS)
  directions = [walked(heads, sizes, ends[rows], rows) for rows in "qk"]
  for h, blocks in enumerate(expected):
    for direction in directions:
      keys = [key for key, _ in direction[h]]
      assert len(keys) == len(set(keys))
      assert set(keys) == blocks.keys()
      for key, full in direction[h]:
        if full:  # one log weight for all pairs of the residue
          assert np.ptp(blocks[key]) == 0, (h, key)
    assert sorted(directions[0][h]) == sorted(directions[1][h])
  np.testing.assert_array_equal(counts, [len(blocks) for blocks in expected])


def test_all_strides_are_among_the_cases(monkeypatch):
  monkeypatch.setattr(walk, "_STRIDE_COST", 0.0)
  heads, *_ = found(MASKS["integer waves"], SIZES[-1])
  assert set(heads.stride.tolist()) == set(range(1, walk.MAX_STRIDE + 1))


@pytest.mark.parametrize("rows", ["q", "k"])
@case
def test_items_are_the_walk(name, size, rows):
  heads, sizes, _, ends, _ = found(MASKS[name], size)
  listed = jax.jit(walk_items.items, static_argnums=(1, 2))(heads, sizes, rows)
  count, H = int(listed.count), len(heads.stride)
  assert count <= len(listed.item.i) == walk_items.most_items(H, sizes, rows)
  item = [np.asarray(x_N)[:count] for x_N in listed.item]
  of_heads, groups = [[] for _ in range(H)], []
  for head, a, i, rho, j, flags in zip(*item, strict=True):
    P = heads.stride[head]
    c = (a - rho) % P
    key = tuple(map(int, (a, i, c, j)))
    groups.append((int(head), *(key[:2] if rows == "q" else key[2:]), flags))
    if not flags & walk_items.EMPTY:
      of_heads[head].append((key, bool(flags & walk_items.FULL)))
  assert of_heads == walked(heads, sizes, ends[rows], rows)
  # Each block of rows stands once, from a first item to a last one.
  runs = [
    (key, [flags for *_, flags in run])
    for key, run in itertools.groupby(groups, lambda group: group[:3])
  ]
  assert [key for key, _ in runs] == sorted({key for key, _ in runs})
  wanted = set()
  for h, P in enumerate(heads.stride.tolist()):
    here = positions(P, sizes, rows)
    wanted |= {(h, *key) for key in here}
  assert wanted <= {key for key, _ in runs}
  for _, flags in runs:
    ends = walk_items.FIRST, walk_items.LAST
    for end, at in zip(ends, (0, len(flags) - 1), strict=True):
      marked = [n for n, flag in enumerate(flags) if flag & end]
      assert marked == [at]
    assert len(flags) == 1 or not any(x & walk_items.EMPTY for x in flags)


@pytest.mark.parametrize("rows", ["q", "k"])
@case
def test_words_say_where_the_block_of_an_item_is(name, size, rows):
  """For as many heads as they can number."""
  heads, sizes, *_ = found(MASKS[name], size)
  copies = 256 // len(heads.stride)
  heads = jax.tree.map(lambda x: np.concatenate([x] * copies), heads)
  H = len(heads.stride)
  static = Static(
    *(sizes.T, sizes.S, 0, 1, True, sizes.strided, False, 0.0, (), True)
  )
  geometry = pallas_tpu_layout.Geometry(static, sizes.block_q, sizes.block_k)
  inputs = types.SimpleNamespace(
    head_H=jnp.arange(H), stream_B=jnp.zeros(1, jnp.uint32)
  )

  @jax.jit
  def places(heads):
    listed = walk_items.items(heads, sizes, rows)
    scalars = pallas_tpu_item.scalars_of(listed, heads, inputs, geometry)
    place = jax.vmap(lambda g: pallas_tpu_item.place_of(geometry, scalars, g))(
      jnp.arange(len(listed.item.i))
    )
    row_q, row_k = (
      jax.vmap(lambda P, side=side: walk.rows_of(P, sizes, side))(heads.stride)
      for side in "qk"
    )
    distance = pallas_tpu_layout.distances(heads.stride, geometry)
    return listed, place, row_q, row_k, distance

  listed, place, row_q, row_k, distance = jax.device_get(places(heads))
  count = int(listed.count)
  item, place = jax.tree.map(lambda x: x[:count], (listed.item, place))
  h, P = item.head, heads.stride[item.head]
  np.testing.assert_array_equal(place.head, h)
  np.testing.assert_array_equal(place.flags, item.flags)
  c, a = (item.a - item.rho) % P, item.a
  y_q, y_k = item.i * sizes.block_q, item.j * sizes.block_k
  for row, at, group, y in (row_q, place.q, a, y_q), (row_k, place.k, c, y_k):
    np.testing.assert_array_equal(row.group[h, at], group)
    np.testing.assert_array_equal(row.y[h, at], y)
  np.testing.assert_array_equal(place.x_q, a + P * y_q)
  np.testing.assert_array_equal(place.x_k, c + P * y_k)
  x_k = place.x_k[:, None] + P[:, None] * np.arange(sizes.block_k)
  cut = np.sum(x_k < heads.first[h][:, None], axis=1)
  np.testing.assert_array_equal(place.cut, cut)
  assert place.start.min() >= 0
  assert place.start.max() <= geometry.length - sizes.block_q - sizes.block_k
  # The entry of the first query and the last key, which may be later.
  entry = distance[h, place.line, place.start + 1]
  x_last = place.x_k + P * (sizes.block_k - 1)
  d = np.maximum(place.x_q - x_last, -1)
  there = (item.flags & walk_items.EMPTY) == 0
  np.testing.assert_array_equal(np.maximum(entry, -1)[there], d[there])


def test_a_band_has_as_many_full_blocks_as_it_can():
  """Closed forms find all the blocks that are full."""
  mask = MASKS["spans"]
  heads, sizes, _, ends, _ = found(mask, (500, 500, 0, 64, 64))
  full = [
    sum(full for _, full in blocks)
    for blocks in walked(heads, sizes, ends["q"], "q")
  ]
  d = 64 * np.subtract.outer(np.arange(8), np.arange(8))
  # In the last block only 500 - 7 * 64 = 52 queries exist. The weight of a key
  # as far away as the span may be off by a rounding.
  last = np.where(np.arange(8) == 7, 51, 63)[:, None]
  spans = np.ceil(np.asarray(mask.span)) - 2
  assert full == [((d >= 64) & (d + last <= z)).sum() for z in spans]
  assert full[-1] == 28 and full[-2] > 0


def test_the_stride_is_the_one_with_less_work():
  heads = [
    (1e4, 4.0, -0.2),
    (1e4, 4.0, 0.5),
    (1e4, 17.0, -0.2),
    (9.0, 4.0, 0.0),
  ]
  heads, *_ = found(made(heads), (2000, 2000, 0, 64, 64))
  np.testing.assert_array_equal(heads.stride, [4, 1, 1, 1])
  np.testing.assert_array_equal(heads.residue_count, [1, 1, 1, 1])


@pytest.mark.parametrize("rows", ["q", "k"])
def test_a_list_takes_memory_that_is_linear_beside_itself(rows):
  def temporary(T):
    sizes = Sizes(T, T, 64, 64, True)
    H = jax.ShapeDtypeStruct((16,), jnp.int32)
    residues = jax.ShapeDtypeStruct((16, walk.MAX_STRIDE), jnp.int32)
    heads = walk.Heads(H, H, H, H, residues, H)
    run = jax.jit(walk_items.items, static_argnums=(1, 2))
    memory = run.lower(heads, sizes, rows).compile().memory_analysis()
    counted = 16 * walk.row_count(sizes, rows) * walk.MAX_STRIDE
    listed = walk_items.most_items(16, sizes, rows)
    return memory.temp_size_in_bytes / (listed + counted)

  # It is at most sixteen integers for each entry of the list and of the counts.
  assert temporary(4096) < 64
  assert temporary(32768) < 64


@pytest.mark.parametrize("x", range(-9, 10))
@pytest.mark.parametrize("y", [1, 2, 3, 8])
def test_divisions_round_to_either_side(x, y):
  for one, other in ((x, y), (jnp.int32(x), y), (x, jnp.int32(y))):
    assert walk.floor_div(one, other) == x // y
    assert walk.ceil_div(one, other) == -(-x // y)
  assert isinstance(walk.floor_div(x, y), int)
