"""Data parallelism over all devices: the only file that calls pmap.

The train state has no device axis. It is placed on every local device once and
passed with `in_axes=None`, `out_axes=None`. Batches and segment memories have a
leading axis N, the devices of this process.
"""

import contextlib
import contextvars
import itertools
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_AXIS = "data"
_target = contextvars.ContextVar("target", default=None)


def start(sequences: int, *, cpu_devices: int = 0):
  """Makes the devices; call it before anything else asks for a device.

  Args:
    sequences: how many sequences are dealt out evenly to the devices of a CPU.
    cpu_devices: how many devices to make of a CPU; 0 for one per core, but only
      as many as the sequences can be dealt to.
  """
  cores = _usable_cores()
  jax.config.update(
    "jax_num_cpu_devices",
    cpu_devices or max(n for n in range(1, cores + 1) if sequences % n == 0),
  )


def _usable_cores() -> int:
  """Counts the cores that this process may use; all if that is unknown."""
  if hasattr(os, "sched_getaffinity"):  # on Linux alone
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


@contextlib.contextmanager
def compiling_for(device) -> Iterator[None]:
  """Makes a device that is not here the only one that there is.

  What this file makes is then compiled for it, and cannot run.
  """
  token = _target.set(device)
  try:
    with jax.default_device(device):
      yield
  finally:
    _target.reset(token)


def local_devices() -> list:
  """Returns the devices of this process."""
  target = _target.get()
  return jax.local_devices() if target is None else [target]


def device_count() -> int:
  """Counts the devices of all processes."""
  return jax.device_count() if _target.get() is None else 1


def local_device_count() -> int:
  """Counts the devices of this process."""
  return len(local_devices())


def process_count() -> int:
  """Counts the processes that work together."""
  return jax.process_count()


def is_primary() -> bool:
  """Tells whether this process is the one that writes."""
  return jax.process_index() == 0


def local_shards() -> list[int]:
  """Returns which of the `device_count()` shards this process' devices have."""
  first = jax.process_index() * jax.local_device_count()
  return list(range(first, first + jax.local_device_count()))


def replicate(tree):
  """Returns the tree, placed completely on every local device."""
  mesh = Mesh(np.array(local_devices()), (_AXIS,))
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def deal(tree_N):
  """Returns the tree, each part of the leading axis on its local device."""
  return jax.device_put(tree_N, _dealt())


def on_each_device(make):
  """Returns the tree that `make` makes, on every local device, with axis N."""
  N = local_device_count()
  return jax.jit(
    lambda: jax.tree.map(lambda x: jnp.broadcast_to(x, (N, *x.shape)), make()),
    out_shardings=_dealt(),
  )()


def each_device(change, tree_N):
  """Returns `change` of the tree of each local device, with axis N."""
  return jax.pmap(change, devices=local_devices())(tree_N)


def _dealt():
  mesh = Mesh(np.array(local_devices()), (_AXIS,))
  return NamedSharding(mesh, PartitionSpec(_AXIS))


def train_step(step):
  """Maps step(state, memory_N, batch_N) -> (state, memory_N, metrics).

  It runs on all devices. The step may use `mean`, `total` and `device_index`.
  The train state and the metrics that it returns must be the same on every
  device. Train state and memory are donated.
  """
  return jax.pmap(
    step,
    axis_name=_AXIS,
    in_axes=(None, 0, 0),
    out_axes=(None, 0, None),
    devices=None if _target.get() is None else local_devices(),
    donate_argnums=(0, 1),
  )


def compile_step(step, *args):
  """Compiles a step ahead; returns (what to call, bytes per device).

  Under several processes pmap turns local arrays into global ones at each call,
  which a compiled function cannot do. There the step is returned as it is: it
  compiles at its first call, and the bytes are None.
  """
  if jax.process_count() > 1:
    return step, None
  options = {}
  if local_devices()[0].platform == "cpu":
    # Without the barriers of rematerialization, which this pass removes, the
    # scheduler computes all layers again at once.
    options = {"xla_disable_hlo_passes": "cse_barrier_expander"}
  compiled = step.lower(*args).compile(compiler_options=options)
  stats = compiled.memory_analysis()
  sizes = {
    "arguments": stats.argument_size_in_bytes,
    "outputs that are not aliased": stats.output_size_in_bytes
    - stats.alias_size_in_bytes,
    "temporary": stats.temp_size_in_bytes,
  }
  return compiled, {"total": sum(sizes.values()), **sizes}


def drop_programs():
  """Lets go of all compiled programs but those that a caller holds.

  JAX keeps what it has traced and compiled for each shape. Where a step is
  compiled again and again, as its memory changes, that would pile up.
  """
  jax.clear_caches()


def eval_step(step):
  """Maps step(params, memory_N, batch_N) -> (memory_N, out_N).

  It runs on the devices of this process alone. The memory is donated.
  """
  return jax.pmap(
    step,
    in_axes=(None, 0, 0),
    devices=local_devices(),
    donate_argnums=1,
  )


def mean(tree):
  """Averages over all devices; inside a step."""
  return jax.lax.pmean(tree, _AXIS)


def total(tree):
  """Sums over all devices; inside a step."""
  return jax.lax.psum(tree, _AXIS)


def device_index():
  """Returns which of all devices this one is; inside a step."""
  return jax.lax.axis_index(_AXIS)


def gather(local):
  """Returns the tree with the arrays of all processes joined, on the host."""
  local = jax.tree.map(np.asarray, local)
  if jax.process_count() == 1:
    return local
  return multihost_utils.process_allgather(local, tiled=True)


def from_primary(tree, like, part=lambda array: array):
  """Returns what the primary process has, an array at a time, on every host.

  Arrays travel as bytes, so that they stay the same to the bit.

  Args:
    tree: arrays on the host of the primary process; elsewhere it is not read.
    like: a tree of the same arrays, or of their shapes, on all processes.
    part: what each process keeps of an array.
  """
  if jax.process_count() == 1:
    return jax.tree.map(part, tree)
  arrays = jax.tree.leaves(tree) if is_primary() else itertools.repeat(None)
  leaves, structure = jax.tree.flatten(like)
  return structure.unflatten(
    [part(_sent(x, shape)) for x, shape in zip(arrays, leaves)]
  )


def _sent(array, like) -> np.ndarray:
  """Returns an array of the primary process; the others give None."""
  if array is None:
    array = np.empty(like.shape, like.dtype)
  flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
  sent = np.asarray(multihost_utils.broadcast_one_to_all(flat))
  return sent.view(like.dtype).reshape(like.shape)


def process_share(count: int) -> range:
  """Returns which of `count` things this process does, in `gather`'s order."""
  each = -(-count // jax.process_count())
  first = jax.process_index() * each
  return range(first, first + each)
