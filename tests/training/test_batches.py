"""Batches and streams read the bytes that they should, in their order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_attention.training import batches

DATA = np.arange(1000, dtype=np.int64)  # each "byte" is its own index


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


def test_rows_are_parts_that_reach_both_ends():
  rows = np.concatenate([draw(step=i) for i in range(300)])
  np.testing.assert_array_equal(
    rows - rows[:, :1], np.tile(np.arange(11), (len(rows), 1))
  )
  assert rows.min() == 0
  assert rows.max() == 999


def test_the_shortest_data_give_their_one_part():
  rows = batches.train_batch(
    DATA[:11], seed=0, step=0, shard_index=0, batch_size=2, context_tokens=10
  )
  np.testing.assert_array_equal(rows, [np.arange(11)] * 2)


def test_shards_are_contiguous_equal_and_apart():
  shards = [batches.shard(DATA, i, 3) for i in range(3)]
  assert [len(s) for s in shards] == [333] * 3
  np.testing.assert_array_equal(np.concatenate(shards), DATA[:999])


def segment(step, data=DATA, batch_size=3, shard_index=1, seed=0):
  return batches.stream_batch(
    data,
    seed=seed,
    step=step,
    shard_index=shard_index,
    batch_size=batch_size,
    context_tokens=10,
  )


def test_streams_go_on_where_they_ended_and_then_start_again():
  count = batches.segments(len(DATA), 3, 10)
  assert count == 33
  first = np.stack([segment(i) for i in range(count)])
  # Inputs in a row, each but the last followed by what the next begins with.
  inputs = first[:, :, :-1].swapaxes(0, 1).reshape(3, -1)
  np.testing.assert_array_equal(np.diff(inputs), 1)
  np.testing.assert_array_equal(first[1:, :, 0], first[:-1, :, -1])
  # Streams lie end to end: each byte is read once in a pass.
  assert len(np.unique(inputs)) == inputs.size
  assert inputs.min() == inputs[0, 0]
  assert inputs.max() < 999
  again = np.stack([segment(i) for i in range(count, 2 * count)])
  np.testing.assert_array_equal(np.diff(again[:, 0, 0]), 10)
  # Passes, shards and seeds begin elsewhere, if there is room for it.
  starts = {
    int(segment(count * epoch, shard_index=shard, seed=seed)[0, 0])
    for epoch in range(5)
    for shard in range(3)
    for seed in range(3)
  }
  assert starts == set(range(1000 - 3 * 330))
  np.testing.assert_array_equal(segment(40), segment(40))


def test_the_shortest_streams_have_one_segment():
  assert batches.segments(31, 3, 10) == 1
  np.testing.assert_array_equal(segment(0, DATA[:31]), segment(1, DATA[:31]))
  assert segment(7, DATA[:31]).max() == 30


def predicted_once(reading, length):
  """Checks that each byte of the split but the first counts once."""
  predicted = np.zeros(length, int)
  nats = np.zeros(length - 1, int)
  for batch in range(len(reading)):
    for row, found, of_all in reading.scored(batch):
      start = reading.starts[batch, row]
      predicted[start + found.start + 1 : start + found.stop + 1] += 1
      nats[of_all] += 1
  assert predicted[0] == 0
  assert (predicted[1:] == 1).all()
  assert (nats == 1).all()


@given(
  length=st.integers(2, 200),
  context=st.integers(1, 50),
  stride=st.integers(1, 50),
  rows=st.integers(1, 9),
)
def test_every_byte_but_the_first_is_predicted_once(
  length, context, stride, rows
):
  stride = min(stride, context)
  windows = batches.windows(length, context, stride, rows)
  predicted_once(windows, length)
  for batch in range(len(windows)):
    counted = list(windows.scored(batch))
    assert counted  # no batch is for nothing
    for row, found, _ in counted:
      # The number of bytes before the first prediction that counts.
      assert windows.starts[batch, row] == 0 or (
        found.start + 1 >= context - stride
      )


@given(
  length=st.integers(2, 300),
  context=st.integers(1, 20),
  warm=st.integers(0, 50),
  rows=st.integers(1, 9),
)
def test_streams_read_on_and_count_what_is_warm(length, context, warm, rows):
  streams = batches.streams(length, context, warm, rows)
  predicted_once(streams, length)
  np.testing.assert_array_equal(np.diff(streams.starts, axis=0), context)
  for batch in range(len(streams)):
    counted = list(streams.scored(batch))
    assert counted  # no batch is for nothing
    for row, found, _ in counted:
      before = streams.starts[batch, row] + found.start - streams.starts[0, row]
      assert before >= warm or streams.starts[0, row] == 0


def test_a_split_shorter_than_the_warming_is_read_once():
  streams = batches.streams(500, 32, 100_000, 64)
  assert len(streams) == -(-499 // 32)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_rows_hold_the_bytes_and_zeros_beyond(rows):
  data = np.arange(1, 24, dtype=np.uint8)
  tokens = (
    batches.windows(len(data), 10, 10, rows)
    .part(slice(-1, None))
    .tokens(data, 0)
  )
  assert tokens.shape == (rows, 11)
  windows = [np.arange(1, 12), np.arange(11, 22), [21, 22, 23] + [0] * 8]
  last = windows[(len(windows) - 1) // rows * rows :]
  np.testing.assert_array_equal(tokens[: len(last)], last)
  assert not tokens[len(last) :].any()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int64])
def test_tokens_arrive_whole_whatever_stores_them(dtype):
  data = np.arange(300).astype(dtype)
  if dtype(0).itemsize > 2:
    data += 70_000
  draw = {"seed": 0, "step": 0, "shard_index": 0}
  sizes = {"batch_size": 2, "context_tokens": 9}
  for read in (batches.train_batch, batches.stream_batch):
    rows = read(data, **draw, **sizes)
    assert rows.dtype == np.int32
    assert set(rows.ravel().tolist()) <= set(data.tolist())
    assert (np.diff(rows) % 256 == 1).all()
  reading = batches.windows(len(data), 9, 9, 4)
  rows = reading.tokens(data, 0)
  assert rows.dtype == np.int32
  np.testing.assert_array_equal(rows[0], data[:10])
