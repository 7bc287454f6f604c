"""The arrays of a tree by their paths, a table of them, and their digest.

A path names one leaf, as `block_0.attention.qkv.kernel`.
"""

import hashlib
import math

import jax
import numpy as np


class LeafError(ValueError):
  """A leaf does not fit the tree that it is meant for."""


def by_path(tree) -> dict:
  """Returns path -> leaf, in the order in which the tree flattens."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): leaf
    for path, leaf in leaves
  }


def flat(tree) -> dict[str, np.ndarray]:
  """Returns path -> array, in the order in which the tree flattens."""
  return {path: np.asarray(leaf) for path, leaf in by_path(tree).items()}


def table(tree) -> dict[str, list]:
  """Returns path -> [shape, dtype], sorted, of arrays or of their shapes."""
  return {
    path: [list(leaf.shape), np.dtype(leaf.dtype).name]
    for path, leaf in sorted(by_path(tree).items())
  }


def digest(tree) -> str:
  """Returns the sha256 over path, shape, dtype and bytes of all leaves."""
  sha256 = hashlib.sha256()
  for path, leaf in sorted(flat(tree).items()):
    sha256.update(f"{path} {leaf.shape} {leaf.dtype.name} ".encode())
    sha256.update(np.ascontiguousarray(leaf).tobytes())
  return sha256.hexdigest()


def filled(template, leaves: dict):
  """Returns a tree of the template's structure with the leaves of these paths.

  Args:
    template: a tree of arrays, or of their shapes.
    leaves: path -> array.

  Raises:
    LeafError: naming the first path at which shape or dtype differs.
  """
  expected, found = table(template), table(leaves)
  for path in sorted(expected.keys() | found.keys()):
    if expected.get(path) != found.get(path):
      raise LeafError(
        f"{_entry_text(found.get(path))} at {path} where the settings ask for "
        f"{_entry_text(expected.get(path))}"
      )
  return jax.tree.unflatten(
    jax.tree.structure(template), [leaves[path] for path in by_path(template)]
  )


def _entry_text(entry):
  """Returns an entry of the table for people to read."""
  if entry is None:
    return "nothing"
  shape, dtype = entry
  return f"{dtype}{shape} ({math.prod(shape):,} numbers)"
