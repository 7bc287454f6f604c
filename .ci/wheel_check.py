"""Checks that the installed wheel serves by itself, and that a layer learns.

python -P wheel_check.py CHECKOUT, run where only the wheel is installed.
"""

import importlib.metadata
import importlib.util
import itertools
import pathlib
import sys

import jax
import jax.numpy as jnp

import adaptive_attention
from adaptive_attention import (
  AdaptiveSelfAttention,
  WaveBounds,
  mask_params,
  regularizer,
)

SHAPE = B, T, D = 2, 32, 16
STEPS = 10


def check_what_is_installed(checkout: pathlib.Path):
  """Checks that the wheel is whole, and that nothing else is found."""
  package = pathlib.Path(adaptive_attention.__file__).resolve().parent
  assert not package.is_relative_to(checkout), package
  assert (package / "py.typed").is_file()
  for name in ("attention", "training", "modes", "command_line"):
    assert (package / name / "__init__.py").is_file(), name
  wheel = importlib.metadata.metadata("adaptive_attention")
  assert wheel["Version"] == adaptive_attention.__version__
  assert wheel["License-Expression"] == "MIT"
  assert wheel["Author"] == "The adaptive_attention authors"
  # What the checkout has beside the package, and what the extras would bring.
  for name in ("configs", "data", "main", "tests", "ml_collections"):
    assert importlib.util.find_spec(name) is None, name


LAYER = AdaptiveSelfAttention(
  num_heads=2,
  max_span=24,
  ramp=8.0,
  span_coef=1e-3,
  wave=WaveBounds(),
)


def loss(params, x_BTD, target_BTD):
  """Returns the squared error of a layer with what its reach costs."""
  y_BTD = LAYER.apply({"params": params}, x_BTD)
  error = jnp.mean((y_BTD - target_BTD) ** 2)
  return error + regularizer(params, LAYER)


def check_that_a_layer_learns():
  """Checks that weights and masks follow their gradients."""
  keys = jax.random.split(jax.random.key(0), 3)
  x_BTD, target_BTD = (jax.random.normal(key, SHAPE) for key in keys[:2])
  params = LAYER.init(keys[2], x_BTD)["params"]
  gradient = jax.jit(jax.value_and_grad(loss))
  (before,) = mask_params(params, LAYER)
  losses = []
  for _ in range(STEPS):
    value, slope = gradient(params, x_BTD, target_BTD)
    losses.append(float(value))
    params = jax.tree.map(lambda p, g: p - 0.5 * g, params, slope)
  (after,) = mask_params(params, LAYER)
  assert all(new < old for old, new in itertools.pairwise(losses)), losses
  moved = jax.tree.map(lambda x, y: bool((x != y).all()), before, after)
  assert all(jax.tree.leaves(moved)), moved
  print(f"a layer learns: {losses[0]:.4f} to {losses[-1]:.4f}")


if __name__ == "__main__":
  check_what_is_installed(pathlib.Path(sys.argv[1]).resolve())
  check_that_a_layer_learns()
