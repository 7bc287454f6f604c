"""Which bytes are read when."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_attention import batches

DATA = np.arange(1000, dtype=np.int64)  # each "byte" tells its own place


def draw(**changes):
  arguments = {
    "seed": 0,
    "step": 3,
    "shard_index": 1,
    "batch_size": 64,
    "context_tokens": 10,
  }
  return batches.train_batch(DATA, **(arguments | changes))


def test_a_batch_is_a_pure_function_of_seed_step_and_shard():
  np.testing.assert_array_equal(draw(), draw())
  for change in ({"seed": 1}, {"step": 4}, {"shard_index": 0}):
    assert not np.array_equal(draw(), draw(**change)), change


def test_rows_are_windows_that_reach_both_ends():
  rows = np.concatenate([draw(step=i) for i in range(300)])
  np.testing.assert_array_equal(
    rows - rows[:, :1], np.tile(np.arange(11), (len(rows), 1))
  )
  assert rows.min() == 0
  assert rows.max() == 999


def test_the_shortest_data_give_their_one_window():
  rows = batches.train_batch(
    DATA[:11], seed=0, step=0, shard_index=0, batch_size=2, context_tokens=10
  )
  np.testing.assert_array_equal(rows, [np.arange(11)] * 2)


def test_shards_are_contiguous_equal_and_apart():
  shards = [batches.shard(DATA, i, 3) for i in range(3)]
  assert [len(s) for s in shards] == [333] * 3
  np.testing.assert_array_equal(np.concatenate(shards), DATA[:999])


@given(
  length=st.integers(2, 200),
  context=st.integers(1, 50),
  stride=st.integers(1, 50),
)
def test_every_byte_but_the_first_is_predicted_once(length, context, stride):
  stride = min(stride, context)
  windows = batches.windows(length, context, stride)
  predicted = np.zeros(length, int)
  for start, first, last in zip(
    windows.starts, windows.scored_from, windows.scored_to
  ):
    assert last > first  # no window is for nothing
    predicted[start + first + 1 : start + last + 1] += 1
    # What the first of them has seen, the byte itself not counted.
    assert start == 0 or first + 1 >= context - stride
  assert predicted[0] == 0
  assert (predicted[1:] == 1).all()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_rows_hold_the_bytes_and_zeros_beyond(count):
  data = np.arange(1, 24, dtype=np.uint8)
  windows = batches.windows(len(data), 10, 10)
  rows = windows.rows(data, 1, count)
  assert rows.shape == (count, 11)
  np.testing.assert_array_equal(rows[0], np.arange(11, 22))
  if count > 1:
    np.testing.assert_array_equal(rows[1], [21, 22, 23] + [0] * 8)
  assert not rows[2:].any()
