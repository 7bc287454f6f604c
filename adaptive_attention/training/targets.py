"""Devices that a program is compiled for on a machine that has none of them.

The real compilers run on a CPU: libtpu has that of TPUs, and jax's plugin for
CUDA with nvcc's assembler that of NVIDIA GPUs. What they need of a device is
its name, or a table of its properties.
"""

import importlib.metadata
import os
import shutil
from typing import NamedTuple

import jax
from jax.experimental import topologies

from adaptive_attention.errors import SettingsError, first_line

_GIB = 1 << 30


class Gpu(NamedTuple):
  """A GPU, by what XLA asks of it.

  Attributes:
    name: that of its maker.
    capability: the two numbers of its compute capability.
    cores: how many multiprocessors it has.
    core_threads, core_fpus: of one of these.
    block_bytes: shared memory of a block.
    bandwidth: that of its memory, in bytes per second.
    l2_bytes: of its L2 cache.
    clock_ghz: in GHz.
  """

  name: str
  capability: tuple[int, int]
  cores: int
  core_threads: int
  core_fpus: int
  block_bytes: int
  bandwidth: int
  l2_bytes: int
  clock_ghz: float


class Target(NamedTuple):
  """A device that is compiled for.

  Attributes:
    memory_bytes: on the device.
    topology: a TPU's name for libtpu; "" for a GPU.
    gpu: a GPU; None for a TPU.
  """

  memory_bytes: int
  topology: str = ""
  gpu: Gpu | None = None


_H100 = Gpu(
  name="NVIDIA H100 80GB HBM3",
  capability=(9, 0),
  cores=132,
  core_threads=2048,
  core_fpus=128,
  block_bytes=232_448,
  bandwidth=3_352_320_000_000,
  l2_bytes=52_428_800,
  clock_ghz=1.98,
)
_A100 = Gpu(
  name="NVIDIA A100-SXM4-80GB",
  capability=(8, 0),
  cores=108,
  core_threads=2048,
  core_fpus=64,
  block_bytes=166_912,
  bandwidth=2_039_000_000_000,
  l2_bytes=41_943_040,
  clock_ghz=1.41,
)
# It stands for the GPUs of desktops, which have the least shared memory.
_RTX4090 = Gpu(
  name="NVIDIA GeForce RTX 4090",
  capability=(8, 9),
  cores=128,
  core_threads=1536,
  core_fpus=128,
  block_bytes=101_376,
  bandwidth=1_008_000_000_000,
  l2_bytes=75_497_472,
  clock_ghz=2.52,
)
TARGETS = {
  "v4": Target(32 * _GIB, "v4:2x2x1"),
  "v5e": Target(16 * _GIB, "v5e:2x2"),
  "v5p": Target(95 * _GIB, "v5p:2x2x1"),
  "v6e": Target(32 * _GIB, "v6e:2x2"),
  "h100": Target(80 * 10**9, gpu=_H100),
  "a100": Target(80 * 10**9, gpu=_A100),
  "rtx4090": Target(24 * _GIB, gpu=_RTX4090),
}


def device_of(name: str):
  """Returns the first of `devices_of`."""
  return devices_of(name)[0]


def devices_of(name: str) -> list:
  """Returns devices of TARGETS that can be compiled for, not run on.

  Raises:
    SettingsError: a package is missing.
  """
  target = TARGETS[name]
  stay_on_cpu()
  missing = missing_package(name)
  if missing:
    raise SettingsError(
      f"config.target={name!r} needs a compiler that is not installed; "
      f"{missing}"
    )
  try:
    if target.topology:
      topology = topologies.get_topology_desc(
        platform="tpu", topology_name=target.topology
      )
    else:
      topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=_gpu_text(target.gpu, target.memory_bytes),
        topology="1x1x1",
      )
  except Exception as error:  # compilers raise many kinds
    raise SettingsError(
      f"config.target={name!r} cannot be compiled for here "
      f"({first_line(error)}); reinstall its compiler, or leave it out"
    ) from error
  return topology.devices


def missing_package(name: str) -> str:
  """Returns what to install to compile for a target; "" if it is there."""
  version = jax.__version__
  if TARGETS[name].topology:
    return _command(["libtpu"], f'"jax[tpu]=={version}"')
  needed = ["jax-cuda12-plugin", "jax-cuda12-pjrt"]
  wanted = " ".join(f"{package}=={version}" for package in needed)
  if not shutil.which("ptxas"):
    needed.append("nvidia-cuda-nvcc-cu12")
  return _command(needed, f"--no-deps {wanted} nvidia-cuda-nvcc-cu12")


def _command(packages, wanted) -> str:
  """Returns the command that installs packages; "" if all are there."""
  for package in packages:
    try:
      importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      return f"pip install {wanted}"
  return ""


def stay_on_cpu():
  """Lets this process neither look for an accelerator nor ask the network.

  Call it before anything else asks for a device.
  """
  if not jax.config.jax_platforms:
    jax.config.update("jax_platforms", "cpu")
  for name, value in (
    ("TPU_SKIP_MDS_QUERY", "1"),
    ("TPU_WORKER_HOSTNAMES", "localhost"),
    ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
    # Several processes may compile at the same time.
    ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
  ):
    os.environ.setdefault(name, value)


def _gpu_text(gpu: Gpu, memory_bytes: int) -> str:
  """Returns XLA's GpuTargetConfigProto as text."""
  major, minor = gpu.capability
  return f"""
    platform_name: "CUDA"
    device_description_str: "{gpu.name}"
    runtime_version {{ major: 12 minor: 9 }}
    dnn_version_info {{ major: 9 minor: 8 }}
    gpu_device_info {{
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      core_count: {gpu.cores}
      fpus_per_core: {gpu.core_fpus}
      threads_per_warp: 32
      threads_per_block_limit: 1024
      threads_per_core_limit: {gpu.core_threads}
      registers_per_core_limit: 65536
      registers_per_block_limit: 65536
      shared_memory_per_block: 49152
      shared_memory_per_block_optin: {gpu.block_bytes}
      shared_memory_per_core: {gpu.block_bytes + 1024}
      block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
      clock_rate_ghz: {gpu.clock_ghz}
      memory_bandwidth: {gpu.bandwidth}
      device_memory_size: {memory_bytes}
      l2_cache_size: {gpu.l2_bytes}
    }}"""
