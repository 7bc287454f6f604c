"""Arrays on several devices: under `jit`, and under `jax.shard_map`."""

import functools
import math

import jax
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def on_devices(function, args, axes, results, group=1):
  """Returns function(*args), computed by each device for its own part.

  A Pallas call is opaque to XLA, which would bring all arrays to each device.
  Where arrays are dealt to devices by streams ("b") or heads ("h"), as by a
  NamedSharding under `jit`, nothing is moved. Heads of keys that serve a group
  of heads each ("j") are dealt as these are, if all devices get as many; or
  else each device computes all heads. One head of keys for all heads ("o")
  stands on each device. Along other axes arrays are put together first. Under
  `vmap` Pallas has its own rule, by one more axis of the grid or in turn, on
  one device.

  Args:
    function: returns a tuple of arrays.
    args: trees of arrays.
    axes: the same trees, of letters: one for each axis of an array, "bthk"
      being the first that decides how all are dealt.
    results: the letters of each array that is returned.
    group: how many heads there are for each head of keys.
  """
  arrays, tree = jax.tree.flatten(args)
  letters = jax.tree.leaves(axes)

  def whole(*arrays):
    return tuple(function(*tree.unflatten(arrays)))

  split = custom_partitioning(whole)
  every = dict.fromkeys("".join((*letters, *results)))  # in order
  grouped = "j" in every
  split.def_partition(
    functools.partial(_partition, whole, letters, results),
    sharding_rule=f"{_rule(letters, grouped)} -> {_rule(results, grouped)}",
    need_replication_factors=tuple(x for x in every if x not in "bhj"),
    **({"r": group} if grouped else {}),
  )
  run = custom_vmap(lambda *arrays: split(*arrays))

  @run.def_vmap
  def _batched(size, is_batched, *arrays):
    del size
    where = [0 if batched else None for batched in is_batched]
    out = jax.vmap(whole, where)(*arrays)
    return out, tuple(True for _ in out)

  return run(*arrays)


def _rule(letters, grouped) -> str:
  """Returns the part of the rule of some arrays."""
  rule = ", ".join(" ".join(axes) for axes in letters)
  return rule.replace("h", "(j r)") if grouped else rule


def _partition(whole, letters, results, mesh, args, _):
  """Tells that a device's part of the results follows from its own parts."""
  q = args[letters.index("bthk")].sharding.spec
  q = (*q, *(None,) * (4 - len(q)))
  of_heads = q[2]
  if "bsjk" in letters:
    keys = args[letters.index("bsjk")].shape[2]
    if keys % _devices(mesh, of_heads):
      of_heads = None
  axes = {"b": q[0], "h": of_heads, "j": of_heads}

  def sharding(letters):
    spec = PartitionSpec(*(axes.get(letter) for letter in letters))
    return NamedSharding(mesh, spec)

  given = tuple(sharding(x) for x in letters)
  return mesh, whole, tuple(sharding(x) for x in results), given


def _devices(mesh, axis) -> int:
  """Returns how many parts an axis of an array is dealt in."""
  names = (axis,) if isinstance(axis, str) else axis or ()
  return math.prod(mesh.shape[name] for name in names)


def varying_alike(*trees):
  """Returns the trees, each array varying over devices as all together do.

  Under `jax.shard_map` an array is marked with the axes over which it differs
  from device to device, and what a loop carries must keep its marks.
  """
  axes = frozenset().union(
    *(jax.typeof(x).mat.varying for x in jax.tree.leaves(trees))
  )
  return jax.tree.map(
    lambda x: lax.pcast(
      x, tuple(axes - jax.typeof(x).mat.varying), to="varying"
    ),
    trees,
  )
