"""The layer by itself: its fields, its initial values, and what it refuses."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
  return jax.jit(module.init)(jax.random.key(1), x_BTD)["params"]


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


def test_a_head_of_keys_serves_several_heads():
  """It gives what a layer gives that has the same keys once for each head."""
  fields = {"num_heads": 6, "max_span": 8, "ramp": 2.0, "position": "rotary"}
  module = layer(**fields, num_kv_heads=2)
  params = init(module)
  assert params["qkv"]["kernel"].shape == (12, 12 + 2 * 4)
  assert params["span_logit"].shape == (6,)

  def for_each_head(x):
    q, *of_keys = jnp.split(x, [12, 16], axis=-1)
    split = (x.reshape(*x.shape[:-1], 2, 2) for x in of_keys)
    whole = (jnp.repeat(x, 3, axis=-2) for x in split)
    return jnp.concatenate(
      [q, *(x.reshape(*x.shape[:-2], 12) for x in whole)], axis=-1
    )

  whole = params | {"qkv": jax.tree.map(for_each_head, params["qkv"])}
  np.testing.assert_allclose(
    module.apply({"params": params}, X),
    layer(**fields).apply({"params": whole}, X),
    atol=1e-6,
  )


@pytest.mark.parametrize("position", ["rotary", "relative"])
def test_packed_sequences_give_what_they_give_alone(position):
  module = layer(max_span=8, position=position)
  params = init(module)
  apply = jax.jit(module.apply)
  ids = jnp.array([[0] * 4 + [1] * 5, [3] * 9])
  y_BTD = apply({"params": params}, X, segment_ids=ids)
  for row, part in ((0, slice(0, 4)), (0, slice(4, 9)), (1, slice(0, 9))):
    alone = apply({"params": params}, X[row : row + 1, part])[0]
    np.testing.assert_allclose(y_BTD[row, part], alone, atol=1e-6)
  # Padding before a sequence changes nothing, either.
  key_mask = jnp.arange(9) >= jnp.array([[3], [0]])
  y_BTD = apply({"params": params}, X, key_mask=key_mask)
  alone = apply({"params": params}, X[:1, 3:])[0]
  np.testing.assert_allclose(y_BTD[0, 3:], alone, atol=1e-6)


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
    ({"num_kv_heads": 0}, "num_kv_heads=0"),
    ({"num_kv_heads": 4}, "num_kv_heads=4"),
    ({"qkv_features": 7}, "qkv_features=7"),
    ({"qkv_features": 6, "position": "rotary"}, "position='rotary'"),
    ({"position": "absolute"}, "position='absolute'"),
    ({"position": "relative"}, "position='relative' needs max_span"),
    ({"max_span": 0}, "max_span=0"),
    ({"max_span": 8, "ramp": 0.0}, "ramp=0.0"),
    ({"max_span": 8, "ramp": 1e-320}, "ramp=1e-320"),
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


# Everything a layer can learn; a dimension of heads that two devices share.
WHOLE = {
  "num_heads": 4,
  "num_kv_heads": 2,
  "qkv_features": 16,
  "max_span": 8,
  "ramp": 2.0,
  "wave": WaveBounds(integer=True),
  "position": "rotary",
}


def value_and_gradient(apply, params, x_BTD=X):
  return jax.value_and_grad(lambda p: jnp.sum(jnp.sin(apply(p, x_BTD))))(params)


def assert_alike(found, expected):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
    *(found, expected),
  )


@pytest.fixture(scope="module")
def whole():
  """Returns (the layer, its parameters, value and gradient of these)."""
  module = layer(**WHOLE)
  params = init(module)
  plain = jax.jit(lambda p, x: module.apply({"params": p}, x))
  return module, params, value_and_gradient(plain, params)


two_devices = pytest.mark.skipif(
  len(jax.devices()) < 2, reason="it needs two devices"
)


@pytest.mark.parametrize(
  "transform",
  [
    jax.checkpoint,
    "nn.remat",
    jax.vmap,
    pytest.param(jax.pmap, marks=two_devices),
  ],
)
def test_a_layer_under_transformations(whole, transform):
  module, params, expected = whole

  def plain(p, x):
    return module.apply({"params": p}, x)

  match transform:
    case "nn.remat":
      again = nn.remat(AdaptiveSelfAttention)(**REFERENCE | WHOLE)

      def apply(p, x):
        return again.apply({"params": p}, x)
    case jax.vmap | jax.pmap:  # over the sequences

      def apply(p, x):
        return transform(plain, in_axes=(None, 0))(p, x[:, None])
    case _:
      apply = transform(plain)
  if transform is not jax.pmap:
    apply = jax.jit(apply)
  assert_alike(value_and_gradient(apply, params), expected)


def test_layers_stacked_by_scan(whole):
  """The masks are those of layers one after the other."""
  module, params, _ = whole

  class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x_BTD):
      def one(layer, x_BTD, _):
        return x_BTD + layer(x_BTD), None

      scanned = nn.scan(
        one,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=2,
      )
      return scanned(layer(**WHOLE, name="layers"), x_BTD, None)[0]

  params = init(Stacked())
  layers = [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in (0, 1)]

  def one_by_one(params, x_BTD):
    for i in range(2):
      of_layer = jax.tree.map(lambda x, i=i: x[i], params["layers"])
      x_BTD += module.apply({"params": of_layer}, x_BTD)
    return x_BTD

  def stacked(params, x_BTD):
    return Stacked().apply({"params": params}, x_BTD)

  assert_alike(
    value_and_gradient(jax.jit(stacked), params),
    value_and_gradient(jax.jit(one_by_one), params),
  )
  for mask, of_layer in zip(mask_params(params, module), layers, strict=True):
    assert_alike(mask, mask_params({"layer": of_layer}, module)[0])


@two_devices
@pytest.mark.parametrize("axis", ["streams", "heads"])
def test_a_layer_dealt_to_two_devices(whole, axis):
  module, params, expected = whole
  mesh = Mesh(np.array(jax.devices()[:2]), ("devices",))

  def dealt(x, *spec):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

  x_BTD = dealt(X, "devices") if axis == "streams" else dealt(X)
  if axis == "heads":
    params = jax.tree.map(dealt, params)
    params["out"]["kernel"] = dealt(params["out"]["kernel"], "devices")
    params["span_logit"] = dealt(params["span_logit"], "devices")
  apply = jax.jit(lambda p, x: module.apply({"params": p}, x))
  assert_alike(value_and_gradient(apply, params, x_BTD), expected)


def test_a_layer_in_a_model_of_nnx(whole):
  """Through the bridge of flax; its masks are read from the same state."""
  module, params, (value, gradient) = whole

  class Model(nnx.Module):
    def __init__(self, rngs):
      self.attention = nnx.bridge.ToNNX(module, rngs=rngs).lazy_init(X)

    def __call__(self, x_BTD):
      return self.attention(x_BTD)

  model = Model(nnx.Rngs(0))
  state = nnx.state(model, nnx.Param)
  tree = nnx.to_pure_dict(state)
  assert jax.tree.map(jnp.shape, tree["attention"]) == jax.tree.map(
    jnp.shape, params
  )
  nnx.replace_by_pure_dict(state, {"attention": params})
  nnx.update(model, state)

  @nnx.jit
  def found(model):
    return nnx.value_and_grad(lambda m: jnp.sum(jnp.sin(m(X))))(model)

  found_value, found_gradient = found(model)
  np.testing.assert_allclose(found_value, value, rtol=1e-5)
  found_gradient = nnx.to_pure_dict(nnx.state(found_gradient, nnx.Param))
  assert_alike(found_gradient["attention"], gradient)
  (mask,) = mask_params(nnx.to_pure_dict(state), module)
  assert_alike(mask, mask_params({"attention": params}, module)[0])
