"""Parameters of models that are drawn without compiling their `init`."""

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_attention.model import Transformer


def shapes(module, *inputs):
  """Returns the shapes of a module's parameters."""
  return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def normal(tree, scale=1.0):
  """Returns a tree of the same shapes with normal leaves, none of them zero."""
  leaves, treedef = jax.tree.flatten(tree)
  random = np.random.default_rng(1)
  return treedef.unflatten(
    jnp.asarray(scale * random.standard_normal(leaf.shape), jnp.float32)
    for leaf in leaves
  )


def parameters(config, scale=1.0):
  """Returns such parameters of a Transformer."""
  return normal(shapes(Transformer(config), jnp.zeros((1, 1), int)), scale)
