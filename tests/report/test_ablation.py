"""The loss without a part of a head, against models that are made so."""

import csv
import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_attention.mask_parameters import mask_params, with_lengths
from adaptive_attention.model import Transformer
from adaptive_attention.report import ablation, tables
from adaptive_attention.training.steps import cross_entropy
from tests import drawn
from tests.training import test_evaluator
from tests.training.test_evaluator import DATA

CONFIG = dataclasses.replace(
  test_evaluator.CONFIG, max_span=10, ramp=2.0, position="rotary"
)
SPANS = dataclasses.replace(CONFIG, attention="span")


def bits(params, config):
  """Returns the bits per token of DATA, window by window."""
  T, nats = config.context_tokens, []
  apply = jax.jit(Transformer(config).apply)
  for start in range(0, len(DATA) - 1, T):
    row = jnp.asarray(DATA[None, start : start + T + 1], jnp.int32)
    logits = apply({"params": params}, row[:, :-1])
    nats.append(np.asarray(cross_entropy(logits, row[:, 1:]))[0])
  return np.concatenate(nats).mean() / np.log(2)


def changes(params, config, **options):
  found = ablation.measure(params, config, DATA, 64, **options)
  return {(c.layer, c.head, c.kind): c for c in found}


@pytest.fixture(scope="module")
def waves():
  params = drawn.parameters(CONFIG, scale=0.25)
  return params, changes(params, CONFIG)


def test_what_is_compared_with_is_the_model_itself(waves):
  params, _ = waves
  base, wide, _ = ablation.variants(params, CONFIG)
  assert (wide.ratio_max, wide.max_span) == (0.5, 12)
  np.testing.assert_allclose(bits(base, wide), bits(params, CONFIG), rtol=1e-6)
  for mask, kept in zip(mask_params(params, CONFIG), mask_params(base, wide)):
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), mask, kept
    )


def test_all_parts_of_all_heads_are_taken_once(waves):
  _, found = waves
  assert found.keys() == {
    (i, h, kind) for i in (0, 1) for h in (0, 1) for kind in ablation.KINDS
  }
  assert all(change.bits != 0 for change in found.values())
  assert all(change.stderr > 0 for change in found.values())


def test_a_head_left_out_adds_nothing(waves):
  params, found = waves
  kernel = np.array(params["block_1"]["attention"]["out"]["kernel"])
  kernel[8:] = 0
  less = jax.tree.map(lambda x: x, params)
  less["block_1"]["attention"]["out"]["kernel"] = kernel
  expected = bits(less, CONFIG) - bits(params, CONFIG)
  np.testing.assert_allclose(found[1, 1, "left out"].bits, expected, atol=2e-5)


@pytest.mark.parametrize(
  ("kind", "length"), [("span halved", None), ("span opened", 12.0)]
)
def test_a_span_is_that_of_a_model_with_it(kind, length):
  config = dataclasses.replace(SPANS, max_span=12)
  params = drawn.parameters(config, scale=0.25)
  layer = params["block_0"]["attention"]

  def of_first(name, spans):
    half = spans / 2 if length is None else np.full(2, length)
    return np.array([half[0], spans[1]])

  less = jax.tree.map(lambda x: x, params)
  less["block_0"]["attention"] = with_lengths(layer, config, of_first)
  expected = bits(less, config) - bits(params, config)
  found = changes(params, config)
  np.testing.assert_allclose(found[0, 0, kind].bits, expected, atol=2e-5)
  assert not any(kind == "wave opened" for _, _, kind in found)


def test_what_is_open_already_changes_nothing():
  """Exactly nothing: the computation is the same."""
  wide = dataclasses.replace(CONFIG, ratio_max=0.5, max_span=30)

  def opened(name, length):
    return {"span_logit": np.full(2, 14.0), "ratio_logit": np.full(2, 0.5)}.get(
      name, length
    )

  params = with_lengths(drawn.parameters(wide, scale=0.25), wide, opened)
  for (_, _, kind), change in changes(params, wide).items():
    unchanged = kind in ("wave opened", "span opened")
    assert (change.bits == 0 and change.stderr == 0) == unchanged


def test_dense_heads_are_left_out_alone():
  config = dataclasses.replace(CONFIG, attention="dense")
  done = []
  found = changes(
    drawn.parameters(config, scale=0.25),
    config,
    progress=lambda *x: done.append(x),
  )
  assert {kind for _, _, kind in found} == {"left out"}
  assert done == [(i, 4) for i in (1, 2, 3, 4)]


def test_csv_has_each_change(waves):
  _, found = waves
  text = tables.as_csv(list(found.values()))
  rows = list(csv.DictReader(io.StringIO(text)))
  assert len(rows) == len(found)
  for row in rows:
    change = found[int(row["layer"]), int(row["head"]), row["kind"]]
    np.testing.assert_allclose(float(row["bits"]), change.bits, rtol=1e-8)
