"""The kernels as the real compilers compile them, without a device.

They need packages that the other tests do not: CONTRIBUTING.md has the lines.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from adaptive_attention.attention import attend, attend_ring
from adaptive_attention.attention.ring import Ring
from adaptive_attention.masks import Mask
from adaptive_attention.training import targets
from tests.attention import schedules
from tests.attention.schedules import H, of_attention

# TARGETS by whose compiler is asked.
on_tpu = pytest.mark.skipif(
  bool(targets.missing_package("v5e")), reason="libtpu is not installed"
)
on_gpu = pytest.mark.gpu_compiler


def bundles(kernel):
  """(partial, full) blocks of a kernel."""
  return [region["bundles"] for region in kernel["blocks"][:2]]


by_hand = pytest.mark.every_case


@on_tpu
@pytest.mark.parametrize("target", ["v5e", pytest.param("v6e", marks=by_hand)])
def test_bands_on_a_tpu_take_no_more_than_they_did(target):
  """Of a block of 512 x 512 at K = 128."""
  report = of_attention(target, 8192, 128)
  partial, full = bundles(report.kernels["forward"])
  assert partial <= 1640
  assert full <= 1400
  partial, full = bundles(report.kernels["backward"])
  assert partial <= 2850
  assert full <= 2450
  memory = report.memory
  assert memory["temp"] <= memory["argument"] + memory["output"]


COMPILED = {
  "integer": ("v5e", 2048, 64, "integer", {}),
  "real": ("v6e", 2048, 64, "real", {}),
}
BY_HAND = {
  "float32": ("v5p", 1024, 96, "spans", {"dtype": jnp.float32}),
  "memory, dropout": (
    *("v5e", 1024, 32, "spans"),
    {"older": 500, "dropout_rate": 0.2, "dropout_seed": 3},
  ),
  "wide": ("v5e", 1024, 256, "spans", {}),
  **{
    f"{target}, {T}, {K}": (target, T, K, "spans", {})
    for target in ("v5e", "v6e")
    for T in (2048, 8192)
    for K in (64, 128)
  },
}


@on_tpu
@pytest.mark.parametrize(
  "call",
  [*COMPILED.values()]
  + [pytest.param(call, marks=by_hand) for call in BY_HAND.values()],
  ids=[*COMPILED, *BY_HAND],
)
def test_kernels_of_a_tpu_compile(call):
  *call, more = call
  kernels = set(of_attention(*call, **more).kernels)
  of_gradients = {"dq", "dkv"} if "older" in more else {"backward"}
  assert kernels == {"forward"} | of_gradients


@on_tpu
@pytest.mark.parametrize(
  ("T", "mask"),
  [
    (32_768, "spans"),
    pytest.param(16_384, "integer", marks=by_hand),
  ],
)
def test_long_texts_on_a_tpu_compile(T, mask):
  report = of_attention("v5e", T, 128, mask)
  assert set(report.kernels) == {"forward", "backward"}
  memory = report.memory
  if mask == "spans":
    assert memory["temp"] <= memory["argument"] + memory["output"]


@on_tpu
def test_a_tpu_without_a_strided_roll_is_refused_by_name():
  with pytest.raises(NotImplementedError, match="the device is TPU v4"):
    of_attention("v4", 512, 64, implementation="pallas_tpu")


def on_two_tpus(kind, axis, inside_shard_map=False):
  """Compiles gradients over two devices that have parts of an axis each.

  That of streams is 0 and that of heads 2; -1 is one that is mapped over.
  """
  devices = targets.devices_of("v5e")[:2]
  mesh = Mesh(np.array(devices), ("devices",), axis_types=(kind,))
  rows = PartitionSpec(*("devices" if i == axis else None for i in range(4)))
  lengths = PartitionSpec("devices" if axis == 2 else None)

  def attended(span, *arrays):
    return attend(*arrays, Mask(span))

  is_mapped = axis == -1
  if is_mapped:
    attended, rows, lengths = (
      jax.vmap(attended),
      *[PartitionSpec("devices")] * 2,
    )
  if inside_shard_map:
    attended = jax.shard_map(
      attended, mesh=mesh, in_specs=(lengths, *(rows,) * 3), out_specs=rows
    )

  def loss(*arrays):
    return jnp.sum(attended(*arrays).astype(jnp.float32) ** 2)

  def shape(spec, *of):
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(*of, sharding=sharding)

  mapped = (2,) if is_mapped else ()
  x = shape(rows, (*mapped, 2, 512, H, 64), jnp.bfloat16)
  shapes = shape(lengths, (*mapped, H), jnp.float32), x, x, x
  with jax.default_device(devices[0]), jax.set_mesh(mesh):
    return jax.jit(jax.grad(loss, range(4))).lower(*shapes).compile().as_text()


@on_tpu
@pytest.mark.parametrize(
  ("inside_shard_map", "axis"),
  [
    *((False, axis) for axis in (0, 2, -1)),
    (True, 0),
    pytest.param(True, 2, marks=by_hand),
  ],
)
def test_each_tpu_computes_its_part(inside_shard_map, axis):
  """Of streams, heads or models, where a program says how these are dealt."""
  kind = AxisType.Auto if inside_shard_map else AxisType.Explicit
  text = on_two_tpus(kind, axis, inside_shard_map)
  assert text.count("tpu_custom_call") >= 2
  assert "all-gather" not in text


@on_tpu
def test_arrays_that_xla_deals_to_tpus_are_refused():
  with pytest.raises(NotImplementedError, match="shard_map"):
    on_two_tpus(AxisType.Auto, 0)


@on_gpu
@pytest.mark.parametrize("target", ["h100", "a100"])
@pytest.mark.parametrize("T", [2048, 8192])
@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize("mask", ["spans", "real", "integer"])
def test_kernels_of_a_gpu_spill_little(target, T, K, mask):
  """What spills a little was faster on a device than what spills nothing."""
  kernels = of_attention(target, T, K, mask).kernels
  assert set(kernels) == {"forward", "dq", "dkv"}
  for kernel in kernels.values():
    assert kernel["spilled"] <= 200
    assert kernel["shared"] <= 128 << 10
    assert not kernel["notes"]
    partial, full, *around_both = kernel["loops"]
    assert full < partial
    most = max(barriers for _, barriers in (partial, full))
    assert most <= {"h100": 6, "a100": 16}[target]
    assert len(around_both) == (mask == "integer")  # over residues


@on_gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("K", [64, 128, 256])
@pytest.mark.parametrize("mask", ["spans", "real", "integer"])
def test_kernels_fit_a_gpu_of_a_desktop(mask, K, dtype):
  """99 KiB of shared memory is the least of all GPUs that are served."""
  kernels = of_attention("rtx4090", 2048, K, mask, dtype=dtype).kernels
  assert set(kernels) == {"forward", "dq", "dkv"}
  assert max(x["shared"] for x in kernels.values()) <= 99 << 10


@on_gpu
@pytest.mark.parametrize("K", [32, 96, 256])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_any_width_on_a_gpu_compiles(K, dtype):
  more = {"older": 500, "dropout_rate": 0.2, "dropout_seed": 3}
  kernels = of_attention(
    "a100", 1000, K, "integer", dtype=dtype, **more
  ).kernels
  assert set(kernels) == {"forward", "dq", "dkv"}


@on_gpu
def test_a_ring_under_vmap_on_a_gpu_compiles():
  """By one more axis of the grid."""

  def one(span, q, k, v, rows, first_row):
    out, _ = attend_ring(Ring(rows, rows, first_row), q, k, v, Mask(span))
    return jnp.sum(out.astype(jnp.float32))

  s = jax.ShapeDtypeStruct
  new, rows = (s((3, 2, n, H, 64), jnp.bfloat16) for n in (256, 1024))
  shapes = s((3, H), jnp.float32), new, new, new, rows, s((3,), jnp.int32)
  gradients = jax.vmap(jax.grad(one, range(4)))
  kernels = schedules.compiled_for("h100", gradients, *shapes).kernels
  assert set(kernels) == {"forward", "dq", "dkv"}
