"""Each change of a tree changes its table or its digest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_attention.training import leaf_table

TREE = {
  "block_0": {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3)},
  "pair": (np.zeros(2, np.int32), jnp.ones(4, jnp.bfloat16)),
}


def test_paths_name_the_leaves_of_dictionaries_and_tuples():
  assert leaf_table.table(TREE) == {
    "block_0.kernel": [[2, 3], "float32"],
    "pair.0": [[2], "int32"],
    "pair.1": [[4], "bfloat16"],
  }


def test_a_flat_tree_has_the_table_and_the_digest_of_the_tree():
  flat = leaf_table.flat(TREE)
  assert leaf_table.table(flat) == leaf_table.table(TREE)
  assert leaf_table.digest(flat) == leaf_table.digest(TREE)


@pytest.mark.parametrize(
  "leaf",
  [
    np.nextafter(TREE["block_0"]["kernel"], np.float32(9)),
    TREE["block_0"]["kernel"].reshape(3, 2),
    TREE["block_0"]["kernel"].view(np.int32),
    TREE["block_0"]["kernel"][::-1],
  ],
)
def test_the_digest_is_of_bytes_shape_and_dtype(leaf):
  other = TREE | {"block_0": {"kernel": leaf}}
  assert leaf_table.digest(other) != leaf_table.digest(TREE)


def test_the_digest_is_of_names_and_not_of_the_layout_in_memory():
  kernel = np.asfortranarray(TREE["block_0"]["kernel"])
  same = TREE | {"block_0": {"kernel": kernel}}
  assert leaf_table.digest(same) == leaf_table.digest(TREE)
  renamed = TREE | {"block_0": {"kernels": kernel}}
  assert leaf_table.digest(renamed) != leaf_table.digest(TREE)


def test_leaves_go_back_into_a_tree_of_shapes():
  shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, TREE))
  back = leaf_table.filled(shapes, leaf_table.flat(TREE))
  assert jax.tree.structure(back) == jax.tree.structure(TREE)
  jax.tree.map(np.testing.assert_array_equal, back, TREE)


@pytest.mark.parametrize(
  ("change", "match"),
  [
    (
      {"pair.0": np.zeros(3, np.int32)},
      r"int32\[3\] .* at pair.0 .*int32\[2\]",
    ),
    ({"pair.0": np.zeros(2, np.int64)}, r"int64\[2\] \(2 numbers\) at pair.0"),
    ({"more": np.zeros(2)}, "at more where the settings ask for nothing"),
  ],
)
def test_the_first_leaf_that_differs_is_named(change, match):
  with pytest.raises(leaf_table.LeafError, match=match):
    leaf_table.filled(TREE, leaf_table.flat(TREE) | change)
