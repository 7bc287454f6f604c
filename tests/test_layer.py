"""The layer by itself: its fields, its initial values, and what it refuses."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_attention import (
  AdaptiveSelfAttention,
  WaveBounds,
  mask_params,
  regularizer,
)

X = jax.random.normal(jax.random.key(0), (2, 9, 12))
REFERENCE = {"implementation": "reference"}


def layer(**fields):
  return AdaptiveSelfAttention(**{"num_heads": 2} | REFERENCE | fields)


def init(module, x_BTD=X):
  return module.init(jax.random.key(1), x_BTD)["params"]


def test_fields_of_flax_have_its_defaults():
  theirs = inspect.signature(nn.MultiHeadDotProductAttention).parameters
  ours = inspect.signature(AdaptiveSelfAttention).parameters
  shared = ours.keys() & theirs.keys()
  assert shared >= {
    *("num_heads", "qkv_features", "out_features", "dropout_rate"),
    *("deterministic", "dtype", "param_dtype", "precision", "kernel_init"),
    *("out_kernel_init", "bias_init", "use_bias"),
  }
  x = jax.random.key(0), (3, 5), jnp.float32
  for name in shared - {"parent", "name"}:
    ours_default, theirs_default = ours[name].default, theirs[name].default
    if name.endswith("_init") and callable(theirs_default):
      ours_default = np.asarray(ours_default(*x))
      theirs_default = np.asarray(theirs_default(*x))
    np.testing.assert_equal(ours_default, theirs_default, err_msg=name)


def test_without_masks_it_is_the_attention_of_flax():
  module = layer(qkv_features=8, out_features=5)
  params = init(module)
  qkv, out = params["qkv"], params["out"]
  query, key, value = (
    {
      "kernel": kernel.reshape(12, 2, 4),
      "bias": bias.reshape(2, 4),
    }
    for kernel, bias in zip(
      jnp.split(qkv["kernel"], 3, axis=1), jnp.split(qkv["bias"], 3)
    )
  )
  theirs = {
    "query": query,
    "key": key,
    "value": value,
    "out": {"kernel": out["kernel"].reshape(2, 4, 5), "bias": out["bias"]},
  }
  expected = nn.MultiHeadDotProductAttention(
    num_heads=2, qkv_features=8, out_features=5
  ).apply({"params": theirs}, X, mask=nn.make_causal_mask(X[..., 0]))
  y_BTD = module.apply({"params": params}, X)
  np.testing.assert_allclose(y_BTD, expected, atol=1e-5)


def test_initial_values_depend_on_no_depth():
  wide = jnp.ones((1, 2, 400))
  std = 400**-0.5  # that of nn.Dense
  kernels = init(layer(max_span=8), wide)
  for name in ("qkv", "out"):
    np.testing.assert_allclose(kernels[name]["kernel"].std(), std, rtol=0.02)
  given = layer(
    kernel_init=nn.initializers.normal(0.03),
    out_kernel_init=nn.initializers.normal(0.07),
  )
  kernels = init(given, wide)
  np.testing.assert_allclose(kernels["qkv"]["kernel"].std(), 0.03, rtol=0.02)
  np.testing.assert_allclose(kernels["out"]["kernel"].std(), 0.07, rtol=0.02)


def test_spans_and_waves_start_where_they_are_told_to():
  module = layer(
    max_span=80,
    span_init=0.25,
    wave=WaveBounds(period_max=4.0, ratio_max=0.5, integer=True),
  )
  (mask,) = mask_params(init(module), module)
  np.testing.assert_allclose(mask.span, 20.0, rtol=1e-6)
  np.testing.assert_allclose(mask.wave.ratio, 0.0, atol=1e-7)
  assert mask.wave.integer
  assert mask.wave.harmonics is None
  assert ((mask.wave.period > 2) & (mask.wave.period < 4)).all()


def test_without_spans_masks_are_open_and_cost_nothing():
  module = layer()
  params = init(module)
  (mask,) = mask_params(params, module)
  assert np.isinf(mask.span).all()
  assert regularizer(params, module) == 0


def test_a_layer_without_spans_can_have_a_reach():
  module = layer(window_tokens=3)
  params = init(module)

  def last(x_BTD):
    return module.apply({"params": params}, x_BTD)[0, -1].sum()

  reached = np.abs(jax.grad(last)(X))[0].max(-1) > 0
  np.testing.assert_array_equal(np.flatnonzero(reached), [6, 7, 8])


def test_dropout_is_of_attention_and_of_the_output():
  plain = layer(max_span=8)
  params = init(plain)
  expected = plain.apply({"params": params}, X)
  for field in ("dropout_rate", "out_dropout_rate"):
    module = layer(max_span=8, **{field: 0.5})
    with pytest.raises(ValueError, match="deterministic"):
      module.apply({"params": params}, X)
    y_BTD = module.apply({"params": params}, X, deterministic=True)
    np.testing.assert_array_equal(y_BTD, expected)
    drawn = [
      module.apply(
        {"params": params},
        X,
        deterministic=False,
        rngs={"dropout": jax.random.key(i)},
      )
      for i in (0, 0, 1)
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    zeros = (np.asarray(drawn[0]) == 0).mean()
    assert (zeros > 0.3) == (field == "out_dropout_rate")


def test_positions():
  plain = layer(max_span=8)
  for position in ("rotary", "relative"):
    module = layer(max_span=8, position=position)
    params = init(module)
    assert ("relative" in params) == (position == "relative")
    y_BTD = module.apply({"params": params}, X)
    without = {k: v for k, v in params.items() if k != "relative"}
    other = plain.apply({"params": without}, X)
    np.testing.assert_allclose(y_BTD[:, 0], other[:, 0], atol=1e-1)
    assert np.abs(y_BTD - other).max() > 1e-3


@pytest.mark.parametrize(
  ("fields", "told"),
  [
    ({"num_heads": 0}, "num_heads=0"),
    ({"qkv_features": 7}, "qkv_features=7"),
    ({"qkv_features": 6, "position": "rotary"}, "position='rotary'"),
    ({"position": "absolute"}, "position='absolute'"),
    ({"position": "relative"}, "position='relative' needs max_span"),
    ({"max_span": 0}, "max_span=0"),
    ({"max_span": 8, "ramp": 0.0}, "ramp=0.0"),
    ({"max_span": 8, "span_init": 1.0}, "span_init=1.0"),
    ({"dropout_rate": 1.0}, "dropout_rate=1.0"),
    ({"out_dropout_rate": -0.1}, "out_dropout_rate=-0.1"),
    ({"wave": WaveBounds()}, "wave="),
  ],
)
def test_fields_that_are_not_possible_are_named(fields, told):
  with pytest.raises(ValueError, match=told) as error:
    init(layer(**fields))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("period_min", 0.5),
    ("period_max", 2.0),
    ("ratio_min", -0.3),
    ("ratio_max", 0.6),
    ("harmonics", 0),
  ],
)
def test_bounds_that_are_not_possible_are_named(name, value):
  with pytest.raises(ValueError, match=rf"^{name}={value} is not possible"):
    WaveBounds(**{name: value})
