"""Agreement with the published program, number by number."""

import json
import pathlib

import jax
import numpy as np
import optax
import pytest

from adaptive_attention import (
  masks,
  weights,
)
from adaptive_attention.config import OptimizerConfig
from adaptive_attention.mask_parameters import mask_params, regularizer
from adaptive_attention.model import Transformer, attention_layer
from adaptive_attention.training import optimizer
from adaptive_attention.training.steps import cross_entropy

GOLDEN = pathlib.Path(__file__).parent / "golden"
# Their numbers are float32, so both sides carry rounding.
VALUE = {"atol": 1e-5, "rtol": 1e-5}


class Golden:
  """One of the two models: its figures, and our model with its parameters."""

  def __init__(self, name):
    with np.load(GOLDEN / f"{name}.npz") as file:
      self.figures = dict(file)
    self.config = weights.config_from_nanogpt(
      json.loads(str(self.figures["config"]))
    )
    self.params = self.tree("param/")
    self.wave = self.config.attention == "span_wave"

  def __getitem__(self, name):
    return self.figures[name]

  def tree(self, prefix):
    return weights.from_nanogpt(self.named(prefix), self.config)

  def named(self, prefix):
    return {
      name.removeprefix(prefix): value
      for name, value in self.figures.items()
      if name.startswith(prefix)
    }


@pytest.fixture(scope="module", params=["span", "periodic"])
def golden(request):
  return Golden(request.param)


def check_gradients(actual, expected):
  """Compares gradients to 1e-4 of the largest entry of each array."""
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(
      a, e, rtol=1e-4, atol=1e-4 * np.abs(e).max()
    ),
    actual,
    expected,
  )


def test_masks_and_penalty(golden):
  mask = mask_params(golden.params, golden.config)[0]
  distance = np.arange(golden["x"].shape[1])
  np.testing.assert_allclose(
    masks.span_weight(distance, mask.span, mask.ramp),
    golden["mask/span"],
    **VALUE,
  )
  if golden.wave:
    np.testing.assert_allclose(
      masks.wave_weight(distance, mask.wave), golden["mask/wave"], **VALUE
    )
    np.testing.assert_allclose(mask.wave.period, golden["mask/period"], **VALUE)
    np.testing.assert_allclose(mask.wave.ratio, golden["mask/ratio"], **VALUE)
    np.testing.assert_allclose(
      masks.open_fraction(mask.wave), golden["mask/density_loss"], **VALUE
    )
  penalty = golden.config.span_coef * masks.penalty(mask)
  np.testing.assert_allclose(penalty, golden["attn/penalty"], rtol=1e-6)


def test_attention_alone_with_its_gradients(golden):
  module = attention_layer(golden.config)
  params = golden.params["block_0"]["attention"]

  def objective(params, x_BTD):
    y_BTD = module.apply({"params": params}, x_BTD)
    penalty = regularizer(params, golden.config)
    return (y_BTD * golden["attn/dy"]).sum() + 10_000 * penalty, y_BTD

  (_, y_BTD), (grads, dx_BTD) = jax.jit(
    jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
  )(params, golden["attn/x"])
  np.testing.assert_allclose(y_BTD, golden["attn/y"], **VALUE)
  expected = golden.named("attn/grad/")
  named = {
    "span_params": grads["span_logit"],
    "c_attn.weight": grads["qkv"]["kernel"].T,
    "c_proj.weight": grads["out"]["kernel"].T,
  }
  if golden.wave:
    named["triangle_wave.period_weight"] = grads["period_logit"]
    named["triangle_wave.ratio_weight"] = grads["ratio_logit"]
  check_gradients(named | {"x": dx_BTD}, expected | {"x": golden["attn/dx"]})


def loss(params, golden):
  logits_BTV = Transformer(golden.config).apply(
    {"params": params}, golden["x"].astype(int)
  )
  nats_BT = cross_entropy(logits_BTV, golden["y"].astype(int))
  penalty = regularizer(params, golden.config)
  return nats_BT.mean() + penalty, (logits_BTV, nats_BT.mean())


def test_model_with_all_gradients(golden):
  gradient = jax.value_and_grad(loss, has_aux=True)
  (total, (logits_BTV, cross_entropy)), grads = jax.jit(
    lambda params: gradient(params, golden)
  )(golden.params)
  np.testing.assert_allclose(logits_BTV, golden["model/logits"], **VALUE)
  np.testing.assert_allclose(
    cross_entropy, golden["model/cross_entropy"], **VALUE
  )
  np.testing.assert_allclose(total, golden["model/loss"], **VALUE)
  check_gradients(grads, golden.tree("model/grad/"))


def test_five_optimizer_steps(golden):
  adamw = optimizer.transformation(OptimizerConfig(), 1e-3)
  params, state = golden.params, adamw.init(golden.params)
  totals = []

  @jax.jit
  def step(params, state):
    (total, _), grads = jax.value_and_grad(loss, has_aux=True)(params, golden)
    updates, state = adamw.update(grads, state, params)
    return optax.apply_updates(params, updates), state, total

  for _ in range(5):
    params, state, total = step(params, state)
    totals.append(float(total))
  np.testing.assert_allclose(totals, golden["train/losses"], **VALUE)
  ours = {
    "span_params": "span_logit",
    "triangle_wave.period_weight": "period_logit",
    "triangle_wave.ratio_weight": "ratio_logit",
  }
  for name, expected in golden.named("train/final/").items():
    layer, parameter = name.removeprefix("transformer.h.").split(".attn.")
    actual = params[f"block_{layer}"]["attention"][ours[parameter]]
    np.testing.assert_allclose(actual, expected, **VALUE, err_msg=name)
