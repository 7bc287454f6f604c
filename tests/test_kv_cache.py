"""Logits from a KV cache are those of full forward passes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_attention import (
  accounting,
  generation,
  kv_cache,
  masks,
)
from adaptive_attention.attention import head_groups
from adaptive_attention.mask_parameters import mask_params
from adaptive_attention.masks import Mask, Wave
from adaptive_attention.model import Transformer
from adaptive_attention.state import init_cache
from tests.pairs import in_turn
from tests.written_models import (
  CONFIG,
  LENGTH,
  MODELS,
  SPANS,
  TEXT,
  all_logits,
  changed,
  model_of,
  parameters,
)

step = jax.jit(generation.step, static_argnames="config")


READS = ("spans", 1), ("spans", 70), ("spans", 5), ("dense", 5)
# What is special about these is so of others too; they are asked by hand.
COMBINED = (
  *("dense, relative", "span, relative", "grouped spans", "long, dense"),
  "closed waves",
)


@pytest.mark.parametrize(
  ("model", "read"),
  [
    *in_turn([name for name in MODELS if name not in COMBINED], READS),
    *(
      pytest.param(name, read, marks=pytest.mark.every_case)
      for name in COMBINED
      for read in READS
    ),
  ],
)
def test_every_token_is_told_as_by_a_full_pass(model, read):
  """Texts outgrow the rings; prompts are shorter or longer than rings."""
  cache, prompt = read
  config, params, expected = model_of(model)
  assert np.isfinite(expected).all()
  logits, kept = generation.prefill(params, config, TEXT[:, :prompt], cache)
  for t in range(prompt, LENGTH):
    np.testing.assert_allclose(logits, expected[:, t - 1], atol=1e-4)
    logits, kept = step(params, config, TEXT[:, t], kept)
  np.testing.assert_allclose(logits, expected[:, -1], atol=1e-4)
  assert kept.tokens_read == LENGTH


@pytest.mark.parametrize(
  ("model", "cache", "traced_alone"),
  [
    pytest.param("span, learned", "spans", False, marks=pytest.mark.every_case),
    pytest.param(
      *("integer waves, relative", "spans", True), marks=pytest.mark.every_case
    ),
    ("real waves", "dense", False),
    pytest.param("long, dense", "spans", False, marks=pytest.mark.every_case),
  ],
)
def test_a_text_is_read_in_parts_of_any_length(model, cache, traced_alone):
  """The same call reads all parts, traced or not, from an empty cache on."""
  config, params, expected = model_of(model)
  apply = Transformer(config).apply
  traced = jax.jit(apply)
  apply = traced if traced_alone else apply
  state = init_cache(params, config, batch=len(TEXT), cache=cache)
  start = 0
  for length, call in ((3, traced), (1, apply), (41, traced)):
    tokens = TEXT[:, start : start + length]
    logits, state = call({"params": params}, tokens, state=state)
    np.testing.assert_allclose(
      logits, expected[:, start : start + length], atol=1e-4
    )
    start += length
    assert state.tokens_read == start


def test_parts_are_read_under_strict_types():
  """Integers of 32 bits meet none of 64, which no implicit rule combines."""
  config = changed(**MODELS["integer waves"])
  params = parameters(config)
  state = init_cache(params, config, batch=len(TEXT))
  tokens = TEXT[:, :5].astype(np.int32)
  with (
    jax.enable_x64(True),
    jax.numpy_dtype_promotion("strict"),
    jax.numpy_rank_promotion("raise"),
  ):
    logits, _ = jax.eval_shape(
      lambda params, state: Transformer(config).apply(
        {"params": params}, tokens, state=state
      ),
      *(params, state),
    )
  assert logits.dtype == np.float32


def test_a_loop_on_the_device_starts_with_an_empty_cache():
  config, params, expected = model_of("integer waves")
  state = init_cache(params, config, batch=len(TEXT))

  def one(state, tokens_B):
    logits, state = Transformer(config).apply(
      {"params": params}, tokens_B[:, None], state=state
    )
    return state, logits[:, 0]

  _, logits = jax.lax.scan(one, state, jnp.asarray(TEXT.T))
  np.testing.assert_allclose(logits.swapaxes(0, 1), expected, atol=1e-4)


def test_closed_waves_leave_queries_without_a_key():
  config, params, _ = model_of("closed waves")
  opened = masks.is_open(mask_params(params, config)[0], np.arange(LENGTH))
  assert (~np.asarray(opened)).all(axis=1).any()


def test_dense_layers_have_one_reach_in_any_text():
  config, params, _ = model_of("long, dense")
  config = dataclasses.replace(config, n_layer=1)
  changed = np.array(TEXT)
  changed[:, 40] = (changed[:, 40] + 1) % 256
  differs = (
    all_logits(config, params, changed) != all_logits(config, params)
  ).any((0, 2))
  np.testing.assert_array_equal(np.flatnonzero(differs), np.arange(40, 64))


def test_integer_waves_are_strides_and_what_is_hidden_is_not_read():
  config = changed(**MODELS["integer waves"])
  params = parameters(config)
  layers = mask_params(params, config)
  groups = head_groups.groups_of(layers[0], config.cache_tokens, 4)
  periods = {group.period for group in groups}
  assert len(periods) > 1
  reads = accounting.cache_reads(layers, config)
  assert reads["open"] < reads["cache"] < reads["reach"] < reads["dense"]
  opened = sum(
    masks.is_open(mask, d).sum() for mask in layers for d in range(68)
  )
  assert reads["open"] == opened


@pytest.mark.parametrize("longest", [40, 8192])
def test_groups_hold_the_reach_of_heads_and_hardly_more(longest):
  spans = np.array([0, 0, 10, 20, 60, 150, 400, 1500.0])
  mask = Mask(jnp.asarray(spans))
  reach_H = head_groups.reach(mask, longest)
  np.testing.assert_array_equal(reach_H, np.minimum(spans + 32, longest))
  groups = head_groups.groups_of(mask, longest, 8)
  assert sorted(h for g in groups for h in g.heads) == list(range(8))
  for group in groups:
    assert group.rows == max(reach_H[h] for h in group.heads)
  taken = sum(len(g.heads) * g.rows for g in groups)
  assert taken <= 1.08 * reach_H.sum()
  assert len(groups) == {40: 1, 8192: 4}[longest]


def test_open_residues_of_waves():
  wave = Wave(
    jnp.array([4.0, 4.2, 3.0, 8.0]),
    jnp.array([-0.25, -0.25, 0.0, 0.5]),
    integer=True,
  )
  mask = Mask(jnp.array([100.0, 90.0, 50.0, 10.0]), 4.0, wave)
  groups = head_groups.groups_of(mask, 1000, 4)
  # The third and the fourth head have all residues open.
  assert {(g.heads, g.period, g.residues, g.rows) for g in groups} == {
    ((1, 0), 4, (0,), 26),
    ((2,), 1, (0,), 54),
    ((3,), 1, (0,), 14),
  }


def test_a_head_of_keys_keeps_what_any_of_its_query_heads_reads():
  wave = Wave(
    jnp.array([4.0, 4.2, 3.0, 5.0]),
    jnp.array([-0.25, 0.0, -0.25, -0.25]),
    integer=True,
  )
  mask = Mask(jnp.array([100.0, 30.0, 9.0, 50.0]), 4.0, wave)
  groups = head_groups.groups_of(mask, 1000, 2)
  # Period 4 is open at residues 0, and at 0, 1 and 3. Two periods are none.
  assert {(g.heads, g.period, g.residues, g.rows) for g in groups} == {
    ((0,), 4, (0, 1, 3), 26),
    ((1,), 1, (0,), 54),
  }
  assert {tuple(g.query_heads) for g in groups} == {(0, 1), (2, 3)}


def test_the_cache_takes_the_bytes_that_are_counted():
  config = changed(dtype="bfloat16")
  params = parameters(config)
  layers = mask_params(params, config)
  counted = accounting.cache_bytes(layers, config)
  for kind, name in (("spans", "head"), ("dense", "dense")):
    _, kept = generation.prefill(params, config, TEXT[:, :5], kind)
    assert kept.nbytes == 3 * counted[name]
    held = sum(x.nbytes for layer in kept.layers for x in (*layer.k, *layer.v))
    assert held == kept.nbytes
  rows = sum(math.ceil(z + 4) for z in SPANS) * 2  # of two layers
  assert counted["reach"] == rows * 2 * 8 * 2
  assert counted["reach"] <= counted["head"] <= 1.1 * counted["reach"]
  assert counted["layer"] == 2 * 4 * 35 * 2 * 8 * 2
  assert counted["dense"] == 2 * 4 * 68 * 2 * 8 * 2


def test_what_a_cache_refuses():
  params = parameters(CONFIG)
  with pytest.raises(ValueError, match="prompt is empty"):
    generation.prefill(params, CONFIG, TEXT[:, :0])
  with pytest.raises(ValueError, match="cache='ring' is unknown"):
    generation.prefill(params, CONFIG, TEXT, "ring")
  _, kept = generation.prefill(params, CONFIG, TEXT[:, :3])
  with pytest.raises(ValueError, match=r"of 3 sequence\(s\), not of 1"):
    generation.step(params, CONFIG, TEXT[:1, 3], kept)
  with pytest.raises(ValueError, match=r"\(3, 1\) are not one of each"):
    generation.step(params, CONFIG, TEXT[:, 3:4], kept)
  with pytest.raises(ValueError, match="batch=-1 is not possible"):
    init_cache(params, CONFIG, batch=-1)
  groups = kv_cache.cache_groups(params, CONFIG)
  with pytest.raises(ValueError, match="cache='dense' means nothing where gro"):
    init_cache(params, CONFIG, batch=1, cache="dense", groups=groups)
  dropping = changed(dropout=0.5)
  with pytest.raises(NotImplementedError, match=r"dropout_rate=0\.5"):
    Transformer(dropping).apply(
      {"params": params},
      TEXT[:, :1],
      train=True,
      state=kept,
      rngs={"dropout": jax.random.key(0)},
    )


def test_no_position_is_taken_for_another():
  """Beyond the learned ones a call is refused, or gives nan if it is traced."""
  config = changed(position="learned", context_tokens=8)
  params = parameters(config)
  logits, kept = generation.prefill(params, config, TEXT[:, :7])
  logits, kept = step(params, config, TEXT[:, 7], kept)
  assert np.isfinite(logits).all()
  with pytest.raises(ValueError, match="9 tokens are more than the 8"):
    generation.step(params, config, TEXT[:, 8], kept)
  assert np.isnan(step(params, config, TEXT[:, 8], kept)[0]).all()
  with pytest.raises(ValueError, match="9 tokens are more than the 8"):
    generation.prefill(params, config, TEXT[:, :9])
