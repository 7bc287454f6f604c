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
from adaptive_attention.attention import attend
from adaptive_attention.masks import Mask, Wave, penalty

B, T, H, K = 2, 32, 2, 8
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


def loss(params, x_BTD, target_BTD):
  """Squared error of one layer of attention, and what its reach costs."""
  q, k, v = (
    (x_BTD @ params[name]).reshape(B, T, H, K) for name in ("q", "k", "v")
  )
  wave = Wave(period=params["period"], ratio=params["ratio"])
  mask = Mask(span=params["span"], ramp=8.0, wave=wave)
  y_BTD = attend(q, k, v, mask).reshape(B, T, H * K)
  return jnp.mean((y_BTD - target_BTD) ** 2) + 1e-3 * penalty(mask)


def check_that_a_layer_learns():
  """Checks that weights and masks follow their gradients."""
  keys = jax.random.split(jax.random.key(0), 4)
  shape = (H * K, H * K)
  params = {
    name: jax.random.normal(key, shape) / 4
    for name, key in zip(("q", "k", "v"), keys)
  }
  params |= {
    "span": jnp.array([4.0, 12.0]),
    "period": jnp.array([3.0, 5.5]),
    "ratio": jnp.zeros(H),
  }
  x_BTD = jax.random.normal(keys[3], (B, T, H * K))
  step = jax.jit(jax.value_and_grad(loss))
  start, losses = params, []
  for _ in range(STEPS):
    value, gradients = step(params, x_BTD, jnp.roll(x_BTD, 1, axis=1))
    losses.append(float(value))
    params = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradients)
  assert all(b < a for a, b in itertools.pairwise(losses)), losses
  for name in params:
    assert not jnp.array_equal(params[name], start[name]), name
  print(f"a layer of the wheel: loss {losses[0]:.4f} to {losses[-1]:.4f}")


if __name__ == "__main__":
  check_what_is_installed(pathlib.Path(sys.argv[1]).resolve())
  check_that_a_layer_learns()
