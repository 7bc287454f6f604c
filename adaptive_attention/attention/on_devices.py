"""Arrays on several devices: who computes which part of a Pallas call."""

import functools
import math

import jax
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def on_devices(function, args, axes, results, group=1, opaque=False):
  """Returns function(*args), computed by each device for its own part.

  A Pallas call is opaque to XLA, which would bring all arrays to each device.
  Where arrays are dealt to devices by streams ("b") or heads ("h"), nothing is
  moved. Heads of keys that serve a group of heads each ("j") are dealt as these
  are, if all devices get as many; or else each device computes all heads. One
  head of keys for all heads ("o") stands on each device. Arrays that are dealt
  by tokens or by width are put together first.

  How arrays are dealt is known in three ways. Explicit axes of a mesh stand in
  the arrays' types; each device then has all of what is dealt along the mesh's
  other axes. What XLA deals it tells when it compiles, but not for a TPU, where
  Pallas refuses to compile for several devices. Inside `jax.shard_map` each
  device has its part already; along axes that are left to XLA it computes all.

  Args:
    function: returns a tuple of arrays.
    args: trees of arrays.
    axes: the same trees, of letters: one for each axis of an array, "bthk"
      being the first that decides how all are dealt.
    results: the letters of each array that is returned.
    group: how many heads there are for each head of keys.
    opaque: whether XLA does not tell how it deals arrays.
  """
  arrays, tree = jax.tree.flatten(args)
  letters = jax.tree.leaves(axes)

  def whole(*arrays):
    return tuple(function(*tree.unflatten(arrays)))

  of_queries = jax.typeof(arrays[letters.index("bthk")]).sharding
  if of_queries.mesh.explicit_axes:
    return _on_explicit_axes(whole, arrays, letters, results, of_queries)
  if opaque or of_queries.mesh.manual_axes:
    return whole(*arrays)
  return _where_xla_deals(whole, arrays, letters, results, group)


def _on_explicit_axes(whole, arrays, letters, results, of_queries):
  """Deals all arrays as the type of the queries says."""
  mesh = of_queries.mesh
  if mesh.manual_axes:
    raise NotImplementedError(
      f"the mesh axes {', '.join(mesh.explicit_axes)} are explicit inside "
      f"jax.shard_map over {', '.join(mesh.manual_axes)}; map over all axes"
    )
  given, found = _specs(letters, results, mesh, of_queries.spec, arrays)
  return _in_parts(whole, mesh, given, found)(
    *(dealt(x, mesh, spec) for x, spec in zip(arrays, given, strict=True))
  )


def _in_parts(function, mesh, given, found):
  """Returns a function that each device computes for its part of the arrays.

  Under `vmap` the mapped axis may be dealt too: each device then maps over its
  own part of that.

  Args:
    given, found: the specs of its arguments and of its results.
  """

  @custom_vmap
  def run(*arrays):
    return jax.shard_map(
      function,
      mesh=mesh,
      in_specs=given,
      out_specs=found,
      check_vma=False,  # nothing is differentiated here
    )(*arrays)

  @run.def_vmap
  def _batched(size, is_batched, *arrays):
    del size
    where = [0 if batched else None for batched in is_batched]
    # All arrays that are mapped over are dealt alike there, or `vmap` refuses.
    mapped = jax.typeof(arrays[where.index(0)]).sharding.spec[0]
    specs = tuple(
      PartitionSpec(mapped, *spec) if batched else spec
      for spec, batched in zip(given, is_batched, strict=True)
    )
    results = tuple(PartitionSpec(mapped, *spec) for spec in found)
    wider = _in_parts(jax.vmap(function, where), mesh, specs, results)
    return wider(*arrays), tuple(True for _ in found)

  return run


def dealt(x, mesh, spec):
  """Returns an array dealt along explicit axes of a mesh."""
  return jax.sharding.reshard(x, NamedSharding(mesh, spec))


def dealt_like(x, other):
  """Returns an array dealt as another one, where that has explicit axes."""
  sharding = jax.typeof(other).sharding
  if not sharding.mesh.explicit_axes:
    return x
  return dealt(x, sharding.mesh, sharding.spec)


def explicit_axes(arrays) -> tuple[str, ...]:
  """Returns the names of the explicit axes along which any array is dealt."""
  names = set()
  for x in jax.tree.leaves(arrays):
    sharding = jax.typeof(x).sharding
    for part in sharding.spec if sharding.mesh.explicit_axes else ():
      names.update((part,) if isinstance(part, str) else part or ())
  return tuple(sorted(names))


def _where_xla_deals(whole, arrays, letters, results, group):
  """Lets XLA ask how to deal arrays, once it knows how they come.

  Under `vmap` Pallas has its own rule, by one more axis of the grid or in turn,
  on one device.
  """
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
  of_queries = args[letters.index("bthk")].sharding.spec
  specs = _specs(letters, results, mesh, of_queries, args)
  given, found = (
    tuple(NamedSharding(mesh, spec) for spec in some) for some in specs
  )
  return mesh, whole, found, given


def _specs(letters, results, mesh, of_queries, arrays):
  """Returns the specs of what is given and found where queries have theirs.

  Args:
    arrays: what is given, or its shapes.
  """
  of_streams, _, of_heads, _ = (*of_queries, *(None,) * (4 - len(of_queries)))
  if "bsjk" in letters:
    keys = arrays[letters.index("bsjk")].shape[2]
    if keys % _devices(mesh, of_heads):
      of_heads = None
  axes = {"b": of_streams, "h": of_heads, "j": of_heads}
  return tuple(
    tuple(PartitionSpec(*(axes.get(x) for x in word)) for word in words)
    for words in (letters, results)
  )


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
