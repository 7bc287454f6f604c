"""Stacked layers are treated like layers apart."""

import dataclasses

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_attention import parameters
from adaptive_attention.config import ModelConfig, OptimizerConfig
from adaptive_attention.layer import AdaptiveSelfAttention
from adaptive_attention.mask_bounds import WaveBounds
from adaptive_attention.mask_parameters import mask_params, regularizer
from adaptive_attention.model import Block, attention_layer
from adaptive_attention.training import optimizer
from tests import drawn
from tests.pairs import in_turn

CONFIG = ModelConfig(
  n_head=2,
  width=16,
  max_span=40,
  ramp=4.0,
  span_coef=1e-3,
  bias=True,
  implementation="reference",
)
X = jnp.ones((1, 5, 16))


class Pair(nn.Module):
  """The body of a scan: a block of ours and a layer of ours."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD, _):
    x_BTD = Block(self.config, name="block")(x_BTD)
    attention = attention_layer(self.config, name="cross_10")
    return attention(x_BTD), None


class Stacked(nn.Module):
  """Blocks in a scan, or in a scan of scans, after a layer by itself."""

  config: ModelConfig
  lengths: tuple[int, ...] = (3,)

  @nn.compact
  def __call__(self, x_BTD):
    x_BTD = attention_layer(self.config, name="attention_0")(x_BTD)
    body = Pair
    for length in reversed(self.lengths):
      body = nn.scan(
        body,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=length,
      )
    x_BTD, _ = body(self.config, name="layers_1")(x_BTD, None)
    return nn.Dense(4, name="head_2")(x_BTD)


def stacked_and_apart(config=CONFIG, lengths=(3,)):
  """Returns (parameters in a scan, the same with a tree for each layer)."""
  params = drawn.normal(drawn.shapes(Stacked(config, lengths), X), 0.5)
  return params, apart(params, lengths)


def apart(params, lengths=(3,)):
  tree = {name: params[name] for name in ("attention_0", "head_2")}
  for i, at in enumerate(np.ndindex(*lengths)):
    tree[f"layers_1_{i}"] = jax.tree.map(
      lambda x, at=at: x[at], params["layers_1"]
    )
  return tree


@pytest.mark.parametrize(
  ("attention", "lengths"),
  in_turn(["span", "span_wave", "dense"], [(3,), (2, 12)]),
)
def test_masks_of_stacked_layers_are_those_of_layers_apart(attention, lengths):
  config = dataclasses.replace(CONFIG, attention=attention)
  stacked, apart = stacked_and_apart(config, lengths)
  found, expected = mask_params(stacked, config), mask_params(apart, config)
  assert len(found) == 1 + 2 * np.prod(lengths)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  np.testing.assert_allclose(
    regularizer(stacked, config), regularizer(apart, config)
  )


def test_the_gradient_of_the_penalty_is_that_of_layers_apart():
  stacked, tree = stacked_and_apart()
  gradient = jax.jit(jax.grad(lambda p: regularizer(p, CONFIG)))
  found, expected = apart(gradient(stacked)), gradient(tree)
  assert np.abs(found["layers_1_2"]["cross_10"]["span_logit"]).min() > 0
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected
  )


def test_layers_that_are_mapped_are_layers():
  """The members of an ensemble are mapped so."""
  members = nn.vmap(
    AdaptiveSelfAttention,
    variable_axes={"params": 0},
    split_rngs={"params": True},
  )(
    num_heads=2,
    max_span=40,
    wave=WaveBounds(),
    use_bias=False,
    implementation="reference",
  )
  params = members.init(jax.random.key(0), jnp.stack([X] * 4))["params"]
  assert params["span_logit"].shape == (4, 2)
  assert len(mask_params(params, CONFIG)) == 4


@pytest.mark.parametrize(
  ("name", "clip"), in_turn(["adamw", "adagrad"], ["global", "tensor"])
)
def test_stacked_layers_are_updated_as_layers_apart(name, clip):
  config = OptimizerConfig(
    name=name,
    clip=clip,
    clip_norm=0.3,
    mask_lr_multiplier=5.0,
    weight_decay=0.5,
  )
  chain = optimizer.transformation(config, 0.1)
  stacked, tree = stacked_and_apart()

  @jax.jit
  def update(params):
    gradients = jax.tree.map(jnp.sin, params)
    _, state = chain.update(gradients, chain.init(params), params)
    return chain.update(gradients, state, params)[0]

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
    apart(update(stacked)),
    update(tree),
  )


def test_what_decays_is_told_by_its_name():
  stacked, _ = stacked_and_apart()
  decays = parameters.is_matrix(stacked)
  block = decays["layers_1"]["block"]
  assert block["mlp"]["up"] == {"kernel": True, "bias": False}
  assert block["norm_1"] == {"scale": False, "bias": False}
  attention = block["attention"]
  assert attention["qkv"] == {"kernel": True, "bias": False}
  assert not any(attention[name] for name in parameters.MASK_PARAMETERS)
  axes = parameters.stacked_axes(stacked)
  assert {*jax.tree.leaves(axes["layers_1"])} == {1}
  assert not any(jax.tree.leaves([axes["attention_0"], axes["head_2"]]))


def _in_boxes(params):
  return jax.tree.map(lambda x: nn.Partitioned(x, (None,) * x.ndim), params)


@pytest.mark.parametrize(
  "wrapped",
  [flax.core.freeze, lambda p: [p], lambda p: {"params": p}, _in_boxes],
)
def test_trees_of_any_kind_are_read(wrapped):
  stacked, _ = stacked_and_apart()
  tree = wrapped(stacked)
  jax.tree.map(
    np.testing.assert_array_equal,
    mask_params(tree, CONFIG),
    mask_params(stacked, CONFIG),
  )
  chain = optimizer.transformation(OptimizerConfig(), 0.1)
  update = jax.jit(lambda tree: chain.update(tree, chain.init(tree), tree)[0])
  for found, of_stacked in zip(
    *(jax.tree.leaves(update(x)) for x in (tree, stacked)), strict=True
  ):
    np.testing.assert_array_equal(found, of_stacked)


KERNEL = {"kernel": jnp.ones((16, 16))}


@pytest.mark.parametrize("attention", ["span", "span_wave", "dense"])
@pytest.mark.parametrize(
  "tree", [{}, {"head": KERNEL}, {"foreign": {"qkv": KERNEL, "out": KERNEL}}]
)
def test_a_tree_without_layers_is_refused(tree, attention):
  config = dataclasses.replace(CONFIG, attention=attention)
  for function in (mask_params, regularizer):
    with pytest.raises(ValueError, match="hold no attention layer"):
      function(tree, config)


@pytest.mark.parametrize("attention", ["span", "span_wave", "dense"])
def test_what_others_call_qkv_and_out_is_no_layer(attention):
  config = dataclasses.replace(CONFIG, attention=attention)
  _, tree = stacked_and_apart(config)
  foreign = {"qkv": KERNEL, "out": KERNEL, "nothing": {}}
  with_foreign = tree | {"a": foreign, "b": {"qkv": {}, "out": jnp.ones(3)}}
  assert len(mask_params(with_foreign, config)) == len(
    mask_params(tree, config)
  )


def test_layers_of_another_config_are_named():
  span = dataclasses.replace(CONFIG, attention="span")
  _, tree = stacked_and_apart(span)
  with pytest.raises(
    ValueError, match=r"'attention_0' has period_logit .* None"
  ):
    mask_params(tree, CONFIG)
  with pytest.raises(ValueError, match=r"span_logit of the shape \(2,\)"):
    mask_params(tree, dataclasses.replace(span, n_head=4))
