"""Bits per character: every byte once, the same however it is computed."""

import dataclasses
import functools
import json
import math

import jax
import numpy as np
import pytest

from adaptive_attention.config import ModelConfig
from adaptive_attention.errors import SettingsError
from adaptive_attention.model import Transformer
from adaptive_attention.state import init_memory
from adaptive_attention.training import (
  evaluator,
  parallel,
  protocols,
  room,
)
from adaptive_attention.training.steps import cross_entropy
from tests import drawn

CONFIG = ModelConfig(
  n_layer=2,
  n_head=2,
  width=16,
  context_tokens=12,
  max_span=12,
  ramp=4.0,
  implementation="reference",  # soon compiled
)
DATA = np.random.default_rng(0).integers(97, 123, 401, np.uint8)


@functools.cache
def evaluator_of(config, batch_size):
  return evaluator.Evaluator(Transformer(config), batch_size)


@pytest.fixture(scope="module")
def params():
  return drawn.parameters(CONFIG, scale=0.25)


def nats_byte_by_byte(params, stride):
  """Computes each byte's loss, one prediction at a time, in float64."""
  T = CONFIG.context_tokens
  forward = jax.jit(lambda x: Transformer(CONFIG).apply({"params": params}, x))
  nats = []
  for i in range(1, len(DATA)):
    # The byte's window begins at a multiple of the stride, the last one that
    # shows at least T - stride bytes before it, unless it is the first.
    start = 0 if i <= T else -(-(i - T) // stride) * stride
    row = np.zeros((1, T), int)
    row[0, : i - start] = DATA[start:i]
    logits = np.asarray(forward(row), np.float64)[0, i - start - 1]
    logits -= logits.max()
    nats.append(np.log(np.exp(logits).sum()) - logits[DATA[i]])
  return np.array(nats)


@pytest.mark.parametrize(
  ("protocol", "stride"),
  [("window", 12), ("stride:12", 12), ("stride:5", 5), ("stride:1", 1)],
)
def test_it_is_the_sum_over_bytes(params, protocol, stride):
  expected = nats_byte_by_byte(params, stride)
  result = evaluator_of(CONFIG, 8)(parallel.replicate(params), DATA, protocol)
  assert result.tokens == len(DATA) - 1
  np.testing.assert_allclose(
    result.bits, expected.mean() / math.log(2), rtol=1e-6
  )
  np.testing.assert_allclose(result.loss, expected.mean(), rtol=1e-6)
  np.testing.assert_allclose(
    result.stderr, standard_error(expected) / math.log(2), rtol=1e-5
  )


@pytest.mark.parametrize("length", [2, 12, 13, 14, 401])
def test_no_batch_size_changes_it(params, length):
  placed = parallel.replicate(params)
  results = [
    evaluator_of(CONFIG, batch_size)(placed, DATA[:length], "window")
    for batch_size in (1, 7, 64)
  ]
  for result in results[1:]:
    assert result.tokens == length - 1
    np.testing.assert_allclose(result.bits, results[0].bits, rtol=1e-6)
    # A spread of the same nats: it is off by as much as these are.
    np.testing.assert_allclose(
      result.stderr, results[0].stderr, atol=1e-6 * result.bits
    )


def standard_error(nats):
  return evaluator.standard_error(evaluator.chunk_sums(nats), len(nats))


def test_there_are_no_more_rows_than_windows(params):
  """A short text does not cost a whole batch."""
  predict = evaluator_of(CONFIG, 64)
  for length, rows in ((2, 2), (13, 2), (14, 2), (37, 4), (401, 34)):
    reading = predict._reading(params, length, "window")
    assert reading.starts.shape == (1, rows)
  assert predict._reading(params, 401, "stride:1").starts.shape[1] == 64


def test_the_standard_error_is_that_of_articles_which_chunks_share():
  articles = np.random.default_rng(0).normal(2.0, 0.5, 250)
  stderr = standard_error(np.repeat(articles, 4 * 1_024))
  np.testing.assert_allclose(stderr, 0.5 / math.sqrt(250), rtol=0.2)
  # 28 chunks, the last of which is a short one.
  nats = np.sin(np.arange(28_000) / 3_000.0)
  counts = np.append(np.full(27, 1_024), 28_000 - 27 * 1_024)
  more = evaluator.chunk_sums(nats) - nats.mean() * counts
  apart = np.abs(np.subtract.outer(np.arange(28), np.arange(28)))
  variance = 28 / 25 * more @ np.clip(1 - apart / 3, 0, 1) @ more
  np.testing.assert_allclose(
    standard_error(nats), math.sqrt(variance) / 28_000, rtol=1e-9
  )


def test_the_standard_error_is_that_of_independent_bytes_when_they_are():
  nats = np.random.default_rng(0).normal(2.0, 0.5, 200_000)
  stderr = standard_error(nats)
  np.testing.assert_allclose(stderr, 0.5 / math.sqrt(200_000), rtol=0.25)
  # Bytes that come in equal pairs hold half as much.
  pairs = np.repeat(nats[:100_000], 2)
  np.testing.assert_allclose(
    standard_error(pairs), 0.5 / math.sqrt(100_000), rtol=0.25
  )
  # Their level does not matter, also where the last chunk is a short one.
  np.testing.assert_allclose(
    standard_error(nats[:5_000] + 7), standard_error(nats[:5_000]), rtol=1e-9
  )


@pytest.mark.parametrize(
  "protocol",
  ["windows", "stride", "stride:0", "stride:13", "stride:-1", "", "memory"],
)
def test_protocols_that_are_none(protocol):
  with pytest.raises(SettingsError, match="--protocol=") as error:
    protocols.check(protocol, CONFIG)
  assert "\n" not in str(error.value)


def test_a_model_that_is_not_finite_has_no_figure(params):
  spoiled = {**params, "position_0": params["position_0"] * np.nan}
  with pytest.raises(evaluator.EvaluationError, match="400 of 400 tokens"):
    evaluator_of(CONFIG, 8)(parallel.replicate(spoiled), DATA, "window")


@pytest.mark.parametrize("length", [0, 1])
def test_a_split_of_which_nothing_is_predicted(params, length):
  predict = evaluator_of(CONFIG, 8)
  with pytest.raises(
    evaluator.EvaluationError, match=f"split of {length} token"
  ):
    predict(parallel.replicate(params), DATA[:length], "window")


REMEMBERING = dataclasses.replace(CONFIG, position="rotary", memory_tokens=40)


@pytest.fixture(scope="module")
def remembering():
  return drawn.parameters(REMEMBERING, scale=0.25)


@pytest.mark.parametrize(
  "batch_size",
  [2, *(pytest.param(n, marks=pytest.mark.every_case) for n in (4, 16)), 80],
)
def test_by_memory_each_byte_attends_to_all_before_it(remembering, batch_size):
  """The memory holds all that is in reach: the split is as one sequence."""
  logits = jax.jit(Transformer(REMEMBERING).apply)(
    {"params": remembering}, DATA[None, :-1]
  )
  logits = np.asarray(logits, np.float64)[0]
  nats = np.log(np.exp(logits).sum(-1)) - logits[np.arange(400), DATA[1:]]
  result = evaluator_of(REMEMBERING, batch_size)(
    parallel.replicate(remembering), DATA, "memory"
  )
  assert result.tokens == 400
  np.testing.assert_allclose(result.bits, nats.mean() / math.log(2), rtol=1e-5)
  windows = evaluator_of(REMEMBERING, batch_size)(
    parallel.replicate(remembering), DATA, "window"
  )
  assert abs(windows.bits - result.bits) > 1e-3


DEEP = {
  "n_layer": 2,
  "position": "rotary",
  "memory_tokens": 30,
  "max_span": 60,
  "implementation": "reference",
}


@pytest.mark.parametrize(
  "changes",
  [
    pytest.param({"attention": "dense"}, marks=pytest.mark.every_case),
    {"attention": "span", "position": "relative"},
    pytest.param(
      {"attention": "span", "dtype": "bfloat16"}, marks=pytest.mark.every_case
    ),
    {"attention": "span_wave", "memory_tokens": 7},
    pytest.param(
      {"attention": "span", "memory_tokens": 1000, "max_span": 1000},
      marks=pytest.mark.every_case,
    ),
  ],
  ids=str,
)
def test_by_memory_it_is_what_one_stream_says(changes):
  """The number of streams changes nothing, though layers add their reaches."""
  config = dataclasses.replace(CONFIG, **(DEEP | changes))
  params = drawn.parameters(config, scale=0.25)
  apply = jax.jit(Transformer(config).apply)
  memory, nats = init_memory(config, 1, 12), []
  for start in range(0, 396, 12):
    tokens = DATA[None, start : start + 13].astype(int)
    logits, memory = apply({"params": params}, tokens[:, :-1], state=memory)
    nats.append(cross_entropy(logits, tokens[:, 1:]))
  placed = parallel.replicate(params)
  for batch_size in (4, 32):
    result = evaluator_of(config, batch_size)(placed, DATA[:397], "memory")
    assert result.tokens == 396
    np.testing.assert_allclose(result.loss, np.mean(nats), rtol=1e-6)


def test_a_model_without_a_memory_is_read_with_one(remembering):
  """Parameters know nothing of a memory: it is that of a model with one."""
  plain = dataclasses.replace(REMEMBERING, memory_tokens=0, remat="block")
  read = protocols.model_for("memory:40", plain)
  assert read == REMEMBERING
  assert protocols.model_for("memory:7", REMEMBERING).memory_tokens == 7
  placed = parallel.replicate(remembering)
  found, expected = (
    evaluator_of(config, 4)(placed, DATA, protocol)
    for config, protocol in ((read, "memory:40"), (REMEMBERING, "memory"))
  )
  assert found.bits == expected.bits
  assert protocols.memory_of("memory:40", read) == 40
  assert protocols.memory_of("window", REMEMBERING) == 0
  learned = dataclasses.replace(plain, position="learned")
  relative = dataclasses.replace(plain, position="relative", attention="dense")
  for config, protocol, message in (
    (plain, "memory:0", "a memory of 1 token or more"),
    (plain, "memory:", "is unknown"),
    (plain, "memory", "choose window, stride:N or memory:N"),
    (learned, "memory:40", "--protocol=memory:40: model.position='learned'"),
    (relative, "memory:40", "of the 0 that vectors were learned for"),
  ):
    with pytest.raises(SettingsError, match=message):
      protocols.model_for(protocol, config)


@pytest.mark.parametrize("protocol", ["window", "memory"])
def test_a_batch_that_does_not_fit_is_refused(
  remembering, protocol, monkeypatch
):
  monkeypatch.setattr(room, "bytes_per_device", lambda count: 10_000)
  predict = evaluator.Evaluator(Transformer(REMEMBERING), 4)
  with pytest.raises(
    room.RoomError,
    match=r"evaluation takes .* has 9.766 KiB; read fewer",
  ):
    predict(parallel.replicate(remembering), DATA, protocol)


def test_warming_costs_no_more_than_what_counts():
  predict = evaluator_of(REMEMBERING, 64)
  params = drawn.parameters(REMEMBERING, scale=0.25)
  for length in (2, 13, 100, 401, 3000):
    rows_read = predict._streams(params, length).starts
    fewest = 2 * len(rows_read)  # the streams of two devices
    assert rows_read.size <= max(2 * length / 12, fewest)
  # Where spans are short there is hardly anything to warm.
  short = jax.tree_util.tree_map_with_path(
    lambda path, x: x - 9 if path[-1].key == "span_logit" else x, params
  )
  assert len(predict._streams(short, 20_000)) < len(
    predict._streams(params, 20_000)
  )


def test_entropy_and_lzma():
  assert evaluator.order0_entropy(np.array([1, 2, 3, 4] * 9, np.uint8)) == 2.0
  assert evaluator.order0_entropy(np.zeros(9, np.uint8)) == 0.0
  assert evaluator.lzma_bits_per_char(np.zeros(100_000, np.uint8)) < 0.1


def test_the_mode(main, tiny_flags, text, tmp_path):
  """One run is evaluated in many ways by the command line."""
  code, _, err = main(*tiny_flags, f"--workdir={tmp_path}")
  assert code == 0, err

  def figure(*flags, split="valid"):
    code, out, err = main("--mode=eval", f"--workdir={tmp_path}", *flags)
    assert code == 0, err
    record = json.loads((tmp_path / f"eval_{split}.json").read_text())
    assert f"{record['bits_per_char']:.4f}" in out
    assert ("other data: " in out) == (record["data"]["name"] != "text.txt")
    records.append(record)
    return record

  records = []

  first = figure()
  assert first["step"] == 12
  assert first["split"] == "valid"
  assert first["protocol"] == "window"
  assert first["bytes"] == 999
  macs = first["attention_macs_per_token"]
  assert 0 < macs["open"] < macs["dense"] <= macs["computed"]
  # The record of training and the plan count the same.
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  trained = [json.loads(line) for line in lines if '"train"' in line][-1]
  assert trained["step"] == 12
  assert trained["attention_macs_per_token"] == macs
  code, out, err = main("--mode=plan", f"--workdir={tmp_path}")
  assert code == 0, err
  assert f"open {macs['open']:,.0f}, computed {macs['computed']:,.0f}" in out
  assert "of step 12" in out
  assert first["stderr"] > 0
  assert first["tokens_per_second"] > 0
  for flags in (
    ["--config.cpu_devices=1"],
    ["--config.cpu_devices=2", "--config.eval_batch_size=3"],
  ):
    other = figure(*flags)
    np.testing.assert_allclose(
      other["bits_per_char"], first["bits_per_char"], rtol=1e-6
    )
  assert figure("--protocol=stride:6")["protocol"] == "stride:6"
  beside = figure(
    *("--protocol=stride:6", f"--against={tmp_path}"),
    "--against_protocol=window",
  )["against"]
  assert (beside["step"], beside["protocol"]) == (12, "window")
  np.testing.assert_allclose(
    beside["bits"],
    records[-1]["bits_per_char"] - first["bits_per_char"],
    atol=2e-6,
  )
  assert figure("--step=best", "--split=test", split="test")["split"] == "test"
  # A config names the folder; the model is still the checkpoint's.
  assert figure("--config=configs/enwik8.py")["bytes"] == 999
  other = tmp_path / "other.txt"
  other.write_bytes(text.read_bytes()[::-1])
  other = figure(f"--config.data.path={other}")
  assert other["data"]["sha256"] != first["data"]["sha256"]
  lines = (tmp_path / "evals.jsonl").read_text().splitlines()
  found = [json.loads(line) for line in lines]
  assert all(len(record.pop("chunk_bits")) == 2 for record in found)
  assert found == records
  for flags, said in (
    (["--step=5"], "one of"),
    (["--config.model.n_layer=3"], "takes the model from the checkpoint"),
    (["--protocol=stride:99"], "to the context of 24"),
    (["--against_protocol=window"], "means nothing without --against"),
    (
      [f"--against={tmp_path}", "--config.eval_tokens=500"],
      "has no evaluation of the same 499 tokens of valid",
    ),
    (
      [f"--against={tmp_path}", "--protocol=stride:5"],
      "by the protocol stride:5, but by window",
    ),
  ):
    code, _, err = main("--mode=eval", f"--workdir={tmp_path}", *flags)
    assert code in (1, 2)
    assert said in err
    assert err.count("\n") == 1
