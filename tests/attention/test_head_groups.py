"""Heads that share rings: who keeps how much."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_attention.attention import head_groups
from adaptive_attention.attention.head_groups import Memory
from adaptive_attention.masks import Mask


@settings(max_examples=60, deadline=None)
@given(
  st.lists(st.integers(1, 3000), min_size=1, max_size=9),
  st.integers(1, 600),
  st.sampled_from([0.0, 0.2, 1.5]),
)
def test_heads_keep_what_they_reach_and_little_more(reach_G, T, margin):
  memory = Memory(T, longest=2500, margin=margin)
  groups = memory.groups(reach_G, queries=2)
  heads = [h for group in groups for h in group.heads]
  assert sorted(heads) == list(range(len(reach_G)))
  for group in groups:
    assert list(group.heads) == sorted(group.heads)
    assert group.rows == max(memory.served(reach_G[h]) for h in group.heads)
    assert group.rows <= 2500
    for h in group.heads:
      assert group.rows >= min(reach_G[h], 2500)
  needed = sum(min(r, 2500) + T - 1 for r in reach_G)
  most = head_groups._WASTE * ((1 + margin) * needed + len(reach_G))
  assert memory.all_rows(groups) <= most
  assert memory.holds(groups, reach_G, share=1.0)


def test_what_is_left_of_a_margin():
  memory = Memory(T=101, longest=5000, margin=0.2)
  groups = memory.groups([100], queries=1)
  assert groups[0].rows == 140  # 1.2 (100 + 100) - 100
  # 1.05 (reach + 100) <= 240
  assert memory.holds(groups, [128], share=1 / 4)
  assert not memory.holds(groups, [129], share=1 / 4)
  assert memory.holds(groups, [140], share=0.0)
  assert not memory.holds(groups, [141], share=0.0)


def test_a_ring_that_holds_all_serves_whatever_a_head_reaches():
  memory = Memory(T=100, longest=300, margin=0.2)
  groups = memory.groups([290, 10_000], queries=1)
  assert [group.rows for group in groups] == [300]
  assert memory.holds(groups, [10_000, 10_000], share=1.0)


def test_heads_of_a_group_hold_equally_many_tokens():
  memory = Memory(T=10, longest=1000, margin=0.0)
  groups = memory.groups([500, 500, 490, 500, 7], 1, [509, 300, 300, 700, 12])
  # Those who hold all that is asked for go together, however much more it is.
  assert [(group.heads, group.rows) for group in groups] == [
    ((4,), 7),
    ((1, 2), 500),
    ((0, 3), 500),
  ]


def test_few_groups():
  memory = Memory(T=512, longest=8193, margin=0.2)
  reach_G = [32, 32, 42, 52, 92, 182, 432, 1532]
  groups = memory.groups(reach_G, 1)
  assert len(groups) <= 4
  ideal = sum(r + 511 for r in reach_G)
  assert memory.all_rows(groups) <= 1.3 * ideal


@pytest.mark.parametrize("ramp", [0.5, 3.0, 32.0])
def test_reach_on_the_host_is_that_of_the_masks_or_one_more(ramp):
  random = np.random.default_rng(0)
  for scale, queries in itertools.product((1, 100, 3000), (1, 2)):
    spans = random.uniform(0, scale, 8).astype(np.float32)
    spans[:2] = 0, np.float32(scale)
    mask = Mask(spans, ramp)
    exact = head_groups.key_reach(mask, 2000, 8 // queries)
    found = head_groups.upper_reach(mask, 2000, 8 // queries)
    assert ((found == exact) | (found == exact + 1)).all()
    assert found.max() <= 2000
