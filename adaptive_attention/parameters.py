"""Tells what the leaves of a tree of parameters are, and which layers it holds.

Leaves are told by their names, whatever the tree is made of. `nn.scan` and
`nn.vmap` stack the parameters of layers along new leading axes; the functions
below treat them like layers apart.
"""

import re
from collections.abc import Mapping

import flax.linen as nn
import jax
import numpy as np

MASK_PARAMETERS = ("span_logit", "period_logit", "ratio_logit")
_SCALE, _BIAS = "scale", "bias"


def _names(path) -> tuple[str, ...]:
  return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _map_leaves(function, params):
  """Returns the tree of function(names, leaf).

  A leaf in a box of flax is one leaf.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: function(_names(path), nn.meta.unbox(leaf)),
    params,
    is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata),
  )


def is_mask_parameter(params):
  """Returns a tree of booleans: True for the parameters of spans and waves."""
  return _map_leaves(lambda names, _: names[-1] in MASK_PARAMETERS, params)


def is_found(pattern: str, params):
  """Returns a tree of booleans: whether an expression finds a leaf's path.

  A path is a leaf's names with slashes, as block_0/attention/span_logit.
  """
  return _map_leaves(
    lambda names, _: bool(re.search(pattern, "/".join(names))), params
  )


def paths(params) -> list[str]:
  """Returns the path of each leaf."""
  return jax.tree.leaves(_map_leaves(lambda names, _: "/".join(names), params))


def is_matrix(params):
  """Returns a tree of booleans: True for kernels and tables of vectors.

  Spans, waves, biases and the scales of norms are False, also where they are
  stacked to more axes.
  """
  vectors = (*MASK_PARAMETERS, _SCALE, _BIAS)
  return jax.tree.map(
    lambda is_vector, rank: not is_vector and rank >= 2,
    _map_leaves(lambda names, _: names[-1] in vectors, params),
    _ranks(params),
  )


def stacked_axes(params):
  """Returns a tree of integers: how many axes of a leaf stack layers."""
  return jax.tree.map(
    lambda of_one, of_all: of_all - of_one,
    _ranks(params),
    _map_leaves(lambda _, leaf: np.ndim(leaf), params),
  )


def _ranks(params):
  """Returns a tree of integers: how many axes each leaf has in one layer."""
  found = {}

  def visit(tree, path, depth):
    if _stack_size(tree, depth):
      visit(tree, path, depth + 1)
      return
    for name, child in tree.items():
      if isinstance(child, Mapping):
        visit(child, (*path, name), depth)
      else:
        found[*path, name] = np.ndim(child) - depth

  visit(_nested(params), (), 0)
  return _map_leaves(lambda names, _: found[names], params)


def attention_layers(params, dense: bool) -> list[tuple[str, dict]]:
  """Returns (path, mask parameters) of each attention layer, first to last.

  Names are taken in their natural order (block_2 before block_10), and stacked
  layers in the order of their axes. A layer is told by its `span_logit`. A
  dense layer is told by kernels `qkv` and `out` of fitting shapes.

  Args:
    dense: whether layers have no mask parameters.
  """
  is_layer = _is_dense_layer if dense else lambda tree: "span_logit" in tree

  def visit(tree, path, index):
    size = _stack_size(tree, len(index))
    if size:
      for i in range(size):
        yield from visit(tree, path, (*index, i))
      return
    if is_layer(tree):
      own = {name: tree[name] for name in MASK_PARAMETERS if name in tree}
      at = "".join(f"[{i}]" for i in index)
      yield (
        "/".join(path) + at,
        {name: x[index] if index else x for name, x in own.items()},
      )
    for name in sorted(tree, key=_natural_order):
      if isinstance(tree[name], Mapping):
        yield from visit(tree[name], (*path, name), index)

  return list(visit(_nested(params), (), ()))


def _nested(params) -> dict:
  """Returns the tree as dictionaries of dictionaries, by names."""
  tree = {}
  paths, _ = jax.tree_util.tree_flatten_with_path(nn.meta.unbox(params))
  for path, leaf in paths:
    *parents, name = _names(path)
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree


def _stack_size(tree, depth) -> int | None:
  """Returns how many layers a node stacks along axis `depth`, or None.

  A node stacks layers if all its leaves have that axis, of one length, and one
  of them has more axes than in one layer.
  """
  leaves, lengths = list(_leaves(tree, ())), set()
  for _, leaf in leaves:
    lengths.add(np.shape(leaf)[depth : depth + 1])
  if len(lengths) != 1 or lengths == {()}:
    return None
  for path, leaf in leaves:
    rank = _rank_apart(path)
    if rank is not None and np.ndim(leaf) - depth > rank:
      return lengths.pop()[0]
  return None


def _leaves(tree, path):
  """Yields (path, leaf) of all leaves of nested dictionaries."""
  for name, child in tree.items():
    if isinstance(child, Mapping):
      yield from _leaves(child, (*path, name))
    else:
      yield (*path, name), child


def _rank_apart(path) -> int | None:
  """Returns how many axes a leaf has in one layer; None if that is unknown."""
  if path[-1] in (*MASK_PARAMETERS, _SCALE):
    return 1
  return 2 if path[-2:] == ("qkv", "kernel") else None


def _is_dense_layer(tree) -> bool:
  """Returns whether a node holds kernels qkv and out of fitting shapes.

  These are (D, H K + 2 G K) and (H K, ...).
  """
  kernels = []
  for name in ("qkv", "out"):
    child = tree.get(name)
    if not isinstance(child, Mapping) or np.ndim(child.get("kernel")) < 2:
      return False
    kernels.append(np.shape(child["kernel"])[-2:])
  (_, of_all), (features, _) = kernels
  of_keys = of_all - features
  return 0 < of_keys <= 2 * features and of_keys % 2 == 0


def _natural_order(name):
  """Returns a key that sorts names with their numbers as numbers."""
  return [
    int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)
  ]
