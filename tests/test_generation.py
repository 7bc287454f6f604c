"""What is written out of a cache is what full forward passes say."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_attention import (
  accounting,
  generation,
  masks,
)
from adaptive_attention.attention import decode
from adaptive_attention.config import ModelConfig
from adaptive_attention.masks import Mask, Wave
from adaptive_attention.model import Transformer, mask_params
from adaptive_attention.modes import sample
from adaptive_attention.training import console
from tests.test_model import randomized

LENGTH = 90
CONFIG = ModelConfig(
  n_layer=2,
  n_head=4,
  width=32,
  context_tokens=LENGTH,
  max_span=64,
  ramp=4.0,
  position="rotary",
  attention="span",
  implementation="reference",
)
TEXT = np.random.default_rng(0).integers(0, 256, (3, LENGTH))
SPANS = np.array([0.001, 2.0, 11.5, 30.25])


def changed(**changes):
  return dataclasses.replace(CONFIG, **changes)


def parameters(config):
  """Nothing at zero, spans from short to long, another order in each layer."""
  init = jax.jit(Transformer(config).init)
  tokens = jnp.zeros((1, 8), int)
  params = randomized(init(jax.random.key(0), tokens)["params"], scale=0.3)
  if config.attention == "dense":
    return params
  for i in range(config.n_layer):
    attention = params[f"block_{i}"]["attention"]
    share_H = np.roll(SPANS, i) / config.max_span
    attention["span_logit"] = jnp.asarray(
      np.log(share_H / (1 - share_H)), jnp.float32
    )
    if config.attention == "span_wave":
      # Combs of one, two and all residues, and of three periods.
      attention["period_logit"] = jnp.array([-9.0, 0.7, -0.7, 0.2])
      attention["ratio_logit"] = jnp.array([-2.0, -1.0, -9.0, 9.0])
  return params


def all_logits(config, params, text=TEXT):
  apply = jax.jit(Transformer(config).apply)
  return np.asarray(apply({"params": params}, text))


CLOSED = {
  "attention": "span_wave",
  "harmonics": 5,
  "period_min": 30.0,
  "period_max": 64.0,
}
MODELS = {
  "dense": {"attention": "dense"},
  "dense, relative": {"attention": "dense", "position": "relative"},
  "span": {},
  "span, relative": {"position": "relative"},
  "span, learned": {"position": "learned"},
  "real waves": {"attention": "span_wave"},
  "integer waves": {"attention": "span_wave", "period": "integer"},
  "integer waves, relative": {
    "attention": "span_wave",
    "period": "integer",
    "position": "relative",
    "harmonics": 0,
  },
  # Texts that are longer than the context of layers without spans.
  "long, dense": {"attention": "dense", "context_tokens": 24},
  "long, dense, relative": {
    "attention": "dense",
    "position": "relative",
    "context_tokens": 20,
    "memory_tokens": 7,
  },
  # The series of a long period closes even at the query itself.
  "closed waves": CLOSED,
  "closed integer waves": CLOSED | {"period": "integer", "vocab_size": 300},
}


@functools.cache
def model_of(name):
  """(config, params, logits of TEXT) of one of MODELS."""
  config = changed(**MODELS[name])
  params = parameters(config)
  return config, params, all_logits(config, params)


@jax.jit
def step(params, kept, tokens):
  return kept.step(params, tokens)


@pytest.mark.parametrize(
  ("cache", "prompt"), [("spans", 1), ("spans", 5), ("spans", 70), ("dense", 5)]
)
@pytest.mark.parametrize("model", MODELS)
def test_every_token_is_told_as_by_a_full_pass(model, cache, prompt):
  """Past the ends of the rings; prompts shorter and longer than these."""
  config, params, expected = model_of(model)
  assert np.isfinite(expected).all()
  logits, kept = generation.Cache.prefill(
    params, config, TEXT[:, :prompt], cache
  )
  for t in range(prompt, LENGTH):
    np.testing.assert_allclose(logits, expected[:, t - 1], atol=1e-4)
    logits, kept = step(params, kept, TEXT[:, t])
  np.testing.assert_allclose(logits, expected[:, -1], atol=1e-4)
  assert kept.tokens_read == LENGTH


def test_closed_waves_leave_queries_without_a_key():
  config, params, _ = model_of("closed waves")
  opened = masks.is_open(mask_params(params, config)[0], np.arange(LENGTH))
  assert (~np.asarray(opened)).all(axis=1).any()


def test_dense_layers_look_back_as_far_in_any_text():
  config, params, _ = model_of("long, dense")
  config = dataclasses.replace(config, n_layer=1)
  changed = np.array(TEXT)
  changed[:, 40] = (changed[:, 40] + 1) % 256
  seen = (
    all_logits(config, params, changed) != all_logits(config, params)
  ).any((0, 2))
  np.testing.assert_array_equal(np.flatnonzero(seen), np.arange(40, 64))


def test_combs_are_strides_and_what_is_hidden_is_not_read():
  config = changed(**MODELS["integer waves"])
  params = parameters(config)
  layers = mask_params(params, config)
  groups = decode.groups_of(layers[0], config.cache_tokens)
  periods = {group.period for group in groups}
  assert len(periods) > 1
  reads = accounting.cache_reads(layers, config)
  assert reads["comb"] < reads["rings"] < reads["span"] < reads["dense"]
  opened = sum(
    masks.is_open(mask, d).sum() for mask in layers for d in range(68)
  )
  assert reads["comb"] == opened


@pytest.mark.parametrize("longest", [40, 8192])
def test_groups_hold_all_that_heads_see_and_hardly_more(longest):
  spans = np.array([0, 0, 10, 20, 60, 150, 400, 1500.0])
  mask = Mask(jnp.asarray(spans))
  reach_H = decode.reach(mask, longest)
  np.testing.assert_array_equal(reach_H, np.minimum(spans + 32, longest))
  groups = decode.groups_of(mask, longest)
  assert sorted(h for g in groups for h in g.heads) == list(range(8))
  for group in groups:
    assert group.rows == max(reach_H[h] for h in group.heads)
  taken = sum(len(g.heads) * g.rows for g in groups)
  assert taken <= 1.08 * reach_H.sum()
  assert len(groups) == {40: 1, 8192: 4}[longest]


def test_residues_of_combs():
  wave = Wave(
    jnp.array([4.0, 4.2, 3.0, 8.0]),
    jnp.array([-0.25, -0.25, 0.0, 0.5]),
    integer=True,
  )
  mask = Mask(jnp.array([100.0, 90.0, 50.0, 10.0]), 4.0, wave)
  groups = decode.groups_of(mask, 1000)
  # Of the third all residues are open, of the fourth as well.
  assert {(g.heads, g.period, g.residues, g.rows) for g in groups} == {
    ((1, 0), 4, (0,), 26),
    ((2,), 1, (0,), 54),
    ((3,), 1, (0,), 14),
  }


def test_the_cache_takes_the_bytes_that_are_counted():
  config = changed(dtype="bfloat16")
  params = parameters(config)
  layers = mask_params(params, config)
  counted = accounting.cache_bytes(layers, config)
  for kind, name in (("spans", "head"), ("dense", "dense")):
    _, kept = generation.Cache.prefill(params, config, TEXT[:, :5], kind)
    assert kept.nbytes == 3 * counted[name]
    held = sum(
      x.nbytes for layer in kept.by_layer for x in (*layer.k, *layer.v)
    )
    assert held == kept.nbytes
  seen = sum(math.ceil(z + 4) for z in SPANS) * 2  # of two layers
  assert counted["seen"] == seen * 2 * 8 * 2
  assert counted["seen"] <= counted["head"] <= 1.1 * counted["seen"]
  assert counted["layer"] == 2 * 4 * 35 * 2 * 8 * 2
  assert counted["dense"] == 2 * 4 * 68 * 2 * 8 * 2


def write(config, params, prompt, steps, seed=0, **options):
  return generation.generate(
    params, config, prompt, steps, jax.random.key(seed), **options
  )


def test_the_likeliest_text_is_that_of_full_passes():
  config, params = CONFIG, parameters(CONFIG)
  made = write(config, params, TEXT[:, :7], 80, temperature=0)
  assert made.shape == (3, 80)
  whole = np.concatenate([TEXT[:, :7], made], axis=1)
  likeliest = all_logits(config, params, whole).argmax(-1)
  np.testing.assert_array_equal(made, likeliest[:, 6:-1])


def test_a_text_is_the_same_in_any_batch_and_at_any_length():
  config, params = CONFIG, parameters(CONFIG)
  many = write(config, params, np.tile(TEXT[:1, :7], (4, 1)), 100)
  assert len({tuple(row) for row in many}) == 4
  one = write(config, params, TEXT[:1, :7], 100)
  np.testing.assert_array_equal(many[:1], one)
  np.testing.assert_array_equal(
    write(config, params, TEXT[:1, :7], 9), one[:, :9]
  )
  other = write(config, params, TEXT[:1, :7], 100, seed=1)
  assert not np.array_equal(other, one)


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_a_text_that_is_cut_goes_on_as_it_would_have(position):
  config = changed(position=position, context_tokens=20)
  params = parameters(config)
  whole = np.concatenate([TEXT, write(config, params, TEXT, 70)], axis=1)
  for cut in (LENGTH + 1, LENGTH + 37):
    rest = write(config, params, whole[:, :cut], whole.shape[1] - cut)
    np.testing.assert_array_equal(rest, whole[:, cut:])


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_only_bytes_are_drawn_where_only_these_are_asked_for(temperature):
  config = changed(vocab_size=600)
  params = parameters(config)
  options = {"temperature": temperature, "top_p": 0.99}
  free = write(config, params, TEXT[:, :7], 60, **options)
  assert (free >= 256).any()
  made = write(
    config, params, TEXT[:, :7], 60, **options, draw_below=generation.BYTES
  )
  assert made.max() < 256
  assert len(console.text_of(made[0])) >= 10


def test_tokens_are_shown_as_they_come():
  config, params = CONFIG, parameters(CONFIG)
  shown = []
  made = write(config, params, TEXT[:, :7], 150, on_tokens=shown.append)
  assert len(shown) == 3
  np.testing.assert_array_equal(np.concatenate(shown, axis=1), made)
  # Where all bytes are as likely, no call draws what one before has drawn.
  flat = jax.tree.map(jnp.zeros_like, params)
  made = write(config, flat, TEXT[:, :7], 128)
  assert (made[:, :64] != made[:, 64:]).mean() > 0.9


@pytest.mark.parametrize("prompt", [3, LENGTH, LENGTH + 5])
def test_learned_positions_slide(prompt):
  """Each token is the likeliest one after the window of its place.

  From a full context on its later half is read anew, and again when that has
  grown to a context: what was the prompt makes no difference.
  """
  config = changed(position="learned")
  params = parameters(config)
  text = np.random.default_rng(1).integers(0, 256, (1, prompt))
  made = write(config, params, text, 150, temperature=0)
  whole = np.concatenate([text, made], axis=1)[0]
  apply = jax.jit(Transformer(config).apply)

  def likeliest_after(window):
    padded = np.zeros((1, LENGTH), int)
    padded[0, : len(window)] = window
    return apply({"params": params}, padded)[0, len(window) - 1].argmax()

  start = 0
  for t in range(prompt + 150):
    if t - start > LENGTH:
      start = t - LENGTH // 2
    if t < prompt:
      continue
    assert whole[t] == likeliest_after(whole[start:t]), t


def draws(logits, n=4000, temperature=1.0, top_k=0, top_p=1.0):
  key_N = jax.random.split(jax.random.key(0), n)
  logits_NV = jnp.tile(jnp.asarray(logits, jnp.float32), (n, 1))
  drawn = generation.sample(logits_NV, key_N, temperature, top_k, top_p)
  return np.bincount(drawn, minlength=len(logits))


def test_draws_follow_the_distribution():
  """Chi-square of 7 degrees of freedom: beyond 24.3 is one in a thousand."""
  logits = np.array([0.0, 1.0, -1.0, 2.0, 0.5, -0.5, 1.5, 0.3])
  for temperature in (0.5, 1.0, 2.0):
    share = np.exp(logits / temperature)
    expected = 4000 * share / share.sum()
    counts = draws(logits, temperature=temperature)
    assert ((counts - expected) ** 2 / expected).sum() < 24.3


def test_draws_at_the_edges():
  logits = [1.0, 3.0, 2.0, 3.0]  # 0.06, 0.40, 0.15, 0.40
  np.testing.assert_array_equal(draws(logits, temperature=0), [0, 4000, 0, 0])
  np.testing.assert_array_equal(draws(logits, top_k=1), [0, 4000, 0, 0])
  assert (draws(logits, top_k=2) > 0).tolist() == [False, True, False, True]
  assert (draws(logits, top_k=9) > 0).all()
  assert (draws(logits, top_p=1e-6) > 0).sum() == 1
  assert (draws(logits, top_p=0.39) > 0).sum() == 1
  assert (draws(logits, top_p=0.41) > 0).sum() == 2
  assert (draws(logits, top_p=0.81) > 0).sum() == 3
  assert (draws(logits, top_p=1.0) > 0).all()


@pytest.mark.parametrize(
  "bad", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_sampling_that_cannot_be_is_named(bad):
  (name,) = bad
  with pytest.raises(ValueError, match=f"{name}=.* expected"):
    write(CONFIG, {}, TEXT[:, :3], 1, **bad)


def test_what_a_cache_refuses():
  params = parameters(CONFIG)
  with pytest.raises(ValueError, match="prompt is empty"):
    generation.Cache.prefill(params, CONFIG, TEXT[:, :0])
  with pytest.raises(ValueError, match="cache='ring' is unknown"):
    generation.Cache.prefill(params, CONFIG, TEXT, "ring")
  _, kept = generation.Cache.prefill(params, CONFIG, TEXT[:, :3])
  with pytest.raises(ValueError, match="one token a call, not 2"):
    Transformer(CONFIG).apply({"params": params}, TEXT[:, :2], memory=kept)
  with pytest.raises(
    ValueError, match="of each of its 3 sequences, not 1 of 1"
  ):
    kept.step(params, TEXT[:1, 3])
  with pytest.raises(ValueError, match=r"\(3, 1\) are not one of each"):
    kept.step(params, TEXT[:, 3:4])
  with pytest.raises(ValueError, match="batch=1 names no part"):
    Transformer(CONFIG).apply(
      {"params": params}, TEXT[:, :1], memory=kept, batch=1
    )
  dropping = changed(dropout=0.5)
  with pytest.raises(NotImplementedError, match=r"dropout_rate=0\.5"):
    Transformer(dropping).apply(
      {"params": params},
      TEXT[:, :1],
      train=True,
      memory=kept,
      rngs={"dropout": jax.random.key(0)},
    )


@pytest.mark.parametrize(
  ("prompt", "told"),
  [
    ([[1, 256]], "token 256 is none of model.vocab_size=256"),
    ([[-1, 3]], "token -1 is none"),
    ([[1.0, 2.0]], "float32 are no integers"),
    ([1, 2], r"\(2,\) are no batch"),
    ([[]], "prompt is empty"),
  ],
)
def test_prompts_that_are_none_are_named(prompt, told):
  for read in (
    lambda: generation.Cache.prefill({}, CONFIG, prompt),
    lambda: write(CONFIG, {}, prompt, 1),
  ):
    with pytest.raises(ValueError, match=told) as error:
      read()
    assert "\n" not in str(error.value)


def test_tokens_that_are_none_are_named():
  params = parameters(CONFIG)
  _, kept = generation.Cache.prefill(params, CONFIG, TEXT[:, :3])
  with pytest.raises(ValueError, match="token 256 is none"):
    kept.step(params, np.array([1, 256, 2]))
  for tokens in ([97, 256 + 98], [97, -1]):
    with pytest.raises(ValueError, match="is not a byte; expected 0 to 255"):
      console.text_of(tokens)
  for option in ({"steps": -1}, {"steps": 1, "draw_below": 0}):
    with pytest.raises(ValueError, match="is not possible; expected"):
      write(CONFIG, params, TEXT[:, :3], **option)


def test_no_position_is_taken_for_another():
  """Beyond those that were learned: refused, or nan where it is traced."""
  config = changed(position="learned", context_tokens=8)
  params = parameters(config)
  logits, kept = generation.Cache.prefill(params, config, TEXT[:, :7])
  logits, kept = step(params, kept, TEXT[:, 7])
  assert np.isfinite(logits).all()
  with pytest.raises(ValueError, match="9 tokens are more than the 8"):
    kept.step(params, TEXT[:, 8])
  assert np.isnan(step(params, kept, TEXT[:, 8])[0]).all()
  with pytest.raises(ValueError, match="9 tokens are more than the 8"):
    generation.Cache.prefill(params, config, TEXT[:, :9])


@pytest.mark.parametrize("model", ["integer waves, relative", "span, learned"])
@pytest.mark.parametrize(
  "switch",
  [
    {"jax_enable_x64": True},
    {"jax_debug_nans": True},
    {"jax_numpy_dtype_promotion": "strict"},
    {"jax_numpy_rank_promotion": "raise"},
  ],
  ids=str,
)
def test_no_switch_of_jax_changes_a_text(switch, model):
  config = changed(**MODELS[model], context_tokens=20)
  params = parameters(config)
  options = {"top_k": 50, "top_p": 0.9}
  expected = write(config, params, TEXT[:, :7], 30, **options)
  ((name, value),) = switch.items()
  before = getattr(jax.config, name)
  jax.config.update(name, value)
  try:
    init = Transformer(config).init
    shapes = jax.eval_shape(init, jax.random.key(0), TEXT[:, :7])
    found = write(config, params, TEXT[:, :7], 30, **options)
  finally:
    jax.config.update(name, before)
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(shapes)}
  assert dtypes == {np.dtype("float32")}
  np.testing.assert_array_equal(found, expected)


def test_no_texts_go_on_as_none():
  params = parameters(CONFIG)
  assert write(CONFIG, params, TEXT[:0, :7], 5).shape == (0, 5)


def test_text_is_safe_to_show():
  data = "né\ttab\nline".encode() + b"\x1b[2J\xff\x00\x7f" + "\x85".encode()
  expected = "né\ttab\nline\\x1b[2J\\xff\\x00\\x7f\\x85"
  assert console.text_of(np.frombuffer(data, np.uint8)) == expected
  # A character may come in parts.
  part = console.Text()
  bytes_ = np.frombuffer(data, np.uint8)
  shown = "".join(part(bytes_[i : i + 1]) for i in range(len(bytes_)))
  assert shown + part(bytes_[:0], last=True) == expected


def test_a_prompt_of_bytes_that_are_no_text():
  typed = b"caf\xe9 \xff".decode("utf-8", "surrogateescape")
  assert bytes(sample.read_prompt(typed, None)) == b"caf\xe9 \xff"


def test_the_verb(main, tiny_flags, tmp_path):
  code, _, err = main(
    *tiny_flags,
    "--config.model.position=rotary",
    "--config.model.vocab_size=300",  # of which only bytes are written
    f"--workdir={tmp_path}",
  )
  assert code == 0, err

  def sample(*flags):
    return main("--mode=sample", f"--workdir={tmp_path}", *flags)

  code, out, err = sample("--prompt=query key ", "--tokens=40", "--seed=3")
  assert code == 0, err
  written = (tmp_path / "sample.txt").read_text()
  text = written.split("\n", 1)[1].rstrip("\n")
  assert text.startswith("query key ")
  assert out.startswith(text)
  assert "keys read per token" in out
  (tmp_path / "prompt").write_bytes(b"query key ")
  code, out, err = sample(
    f"--prompt_file={tmp_path / 'prompt'}", "--tokens=40", "--seed=3", "--num=3"
  )
  assert code == 0, err
  assert out.startswith(text)
  assert out.count("--- ") == 2
  assert (tmp_path / "sample.txt").read_text().count("--- ") == 3
  for flags, told in (
    ([], "needs one of --prompt"),
    (["--prompt=a", "--prompt_file=b"], "needs one of --prompt"),
    (["--prompt="], "--prompt is empty"),
    ([f"--prompt_file={tmp_path / 'none'}"], "cannot be read (No such file"),
    ([f"--prompt_file={tmp_path}"], "cannot be read (Is a directory)"),
    (["--prompt=a", "--top_p=0"], "top_p=0.0 is not possible"),
    (["--prompt=a", "--split=test"], "means nothing to --mode=sample"),
  ):
    code, _, err = sample(*flags)
    assert code in (1, 2)
    assert told in err
    assert err.count("\n") == 1
