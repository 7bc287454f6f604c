"""Texts are those of full forward passes, drawn as the options say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adaptive_attention import (
  generation,
)
from adaptive_attention.model import Transformer
from adaptive_attention.training.units import Units
from tests.written_models import (
  CONFIG,
  LENGTH,
  MODELS,
  TEXT,
  all_logits,
  changed,
  parameters,
)


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


@pytest.mark.every_case
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dealt", ["prompts", "parameters"])
def test_a_text_is_the_same_on_several_devices(dealt, name):
  """Dealt by the last axis of each array of parameters, or by prompts."""
  config = changed(**MODELS[name])
  params, prompts = parameters(config), TEXT[:2, :14].reshape(4, 7)
  expected = write(config, params, prompts, 60)
  mesh = Mesh(np.array(jax.devices()[:2]), ("devices",))

  def deal(array, axis):
    names = ("devices" if i == axis else None for i in range(array.ndim))
    sharding = NamedSharding(mesh, PartitionSpec(*names))
    return jax.device_put(array, sharding)

  if dealt == "prompts":
    prompts = deal(prompts, 0)
  else:
    params = jax.tree.map(lambda x: deal(x, x.ndim - 1), params)
  np.testing.assert_array_equal(write(config, params, prompts, 60), expected)


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
  assert len(Units().text_of(made[0])) >= 10


def test_tokens_are_shown_as_they_come():
  config, params = CONFIG, parameters(CONFIG)
  shown = []
  made = write(config, params, TEXT[:, :7], 150, on_tokens=shown.append)
  assert len(shown) == 3
  np.testing.assert_array_equal(np.concatenate(shown, axis=1), made)
  # Where all bytes are equally likely, a call does not repeat the one before.
  flat = jax.tree.map(jnp.zeros_like, params)
  made = write(config, flat, TEXT[:, :7], 128)
  assert (made[:, :64] != made[:, 64:]).mean() > 0.9


@pytest.mark.parametrize("prompt", [3, LENGTH, LENGTH + 5])
def test_learned_positions_slide(prompt):
  """Each token is the likeliest one after the context of its place.

  Where a context is full its later half is read again, and so on. It makes no
  difference how much of the text was the prompt.
  """
  config = changed(position="learned")
  params = parameters(config)
  text = np.random.default_rng(1).integers(0, 256, (1, prompt))
  made = write(config, params, text, 150, temperature=0)
  whole = np.concatenate([text, made], axis=1)[0]
  apply = jax.jit(Transformer(config).apply)

  def likeliest_after(context):
    padded = np.zeros((1, LENGTH), int)
    padded[0, : len(context)] = context
    return apply({"params": params}, padded)[0, len(context) - 1].argmax()

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
  """Chi-square of 7 degrees of freedom passes 24.3 once in a thousand times."""
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
def test_sampling_that_is_not_possible_is_named(bad):
  (name,) = bad
  with pytest.raises(ValueError, match=f"{name}=.* expected"):
    write(CONFIG, {}, TEXT[:, :3], 1, **bad)


@pytest.mark.parametrize(
  ("prompt", "told"),
  [
    ([[1, 256]], "token 256 is not one of model.vocab_size=256"),
    ([[-1, 3]], "token -1 is not one"),
    ([[1.0, 2.0]], "float32 are not integers"),
    ([1, 2], r"\(2,\) are not a batch"),
    ([[]], "prompt is empty"),
  ],
)
def test_arrays_that_are_no_prompts_are_named(prompt, told):
  for read in (
    lambda: generation.prefill({}, CONFIG, prompt),
    lambda: write(CONFIG, {}, prompt, 1),
  ):
    with pytest.raises(ValueError, match=told) as error:
      read()
    assert "\n" not in str(error.value)


def test_numbers_that_are_no_tokens_are_named():
  params = parameters(CONFIG)
  _, state = generation.prefill(params, CONFIG, TEXT[:, :3])
  with pytest.raises(ValueError, match="token 256 is not one"):
    generation.step(params, CONFIG, np.array([1, 256, 2]), state)
  for tokens in ([97, 256 + 98], [97, -1]):
    with pytest.raises(ValueError, match="is not a byte; expected 0 to 255"):
      Units().text_of(tokens)
  for option in ({"steps": -1}, {"steps": 1, "draw_below": 0}):
    with pytest.raises(ValueError, match="is not possible; expected"):
      write(CONFIG, params, TEXT[:, :3], **option)


SWITCHES = {
  "jax_enable_x64": True,
  "jax_debug_nans": True,
  "jax_numpy_dtype_promotion": "strict",
  "jax_numpy_rank_promotion": "raise",
}


@pytest.mark.parametrize(
  "model",
  [
    "integer waves, relative",
    pytest.param("span, learned", marks=pytest.mark.every_case),
  ],
)
@pytest.mark.parametrize(
  "switches",
  [
    SWITCHES,
    *(
      pytest.param({name: SWITCHES[name]}, marks=pytest.mark.every_case)
      for name in SWITCHES
    ),
  ],
  ids=str,
)
def test_no_switch_of_jax_changes_a_text(switches, model):
  config = changed(**MODELS[model], context_tokens=20)
  params = parameters(config)
  options = {"top_k": 50, "top_p": 0.9}
  expected = write(config, params, TEXT[:, :7], 30, **options)
  before = {name: getattr(jax.config, name) for name in switches}
  try:
    for name, value in switches.items():
      jax.config.update(name, value)
    init = Transformer(config).init
    shapes = jax.eval_shape(init, jax.random.key(0), TEXT[:, :7])
    found = write(config, params, TEXT[:, :7], 30, **options)
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(shapes)}
  assert dtypes == {np.dtype("float32")}
  np.testing.assert_array_equal(found, expected)


def test_no_texts_go_on_as_none():
  params = parameters(CONFIG)
  assert write(CONFIG, params, TEXT[:0, :7], 5).shape == (0, 5)
