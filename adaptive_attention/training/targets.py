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


class Target(NamedTuple):
  """A device, by what its maker says of it.

  Attributes:
    memory_bytes: on the device.
    topology: a TPU's name for libtpu; "" for a GPU.
    gpu: a GPU's name, compute capability, multiprocessors, threads of one,
      shared memory of a block in bytes, memory bandwidth in bytes per second,
      bytes of the L2 cache and clock in GHz.
  """

  memory_bytes: int
  topology: str = ""
  gpu: tuple = ()


TARGETS = {
  "v4": Target(32 * _GIB, "v4:2x2x1"),
  "v5e": Target(16 * _GIB, "v5e:2x2"),
  "v5p": Target(95 * _GIB, "v5p:2x2x1"),
  "v6e": Target(32 * _GIB, "v6e:2x2"),
  "h100": Target(
    80 * 10**9,
    gpu=(
      *("NVIDIA H100 80GB HBM3", (9, 0), 132, 2048, 232_448),
      *(3_352_320_000_000, 52_428_800, 1.98),
    ),
  ),
  "a100": Target(
    80 * 10**9,
    gpu=(
      *("NVIDIA A100-SXM4-80GB", (8, 0), 108, 2048, 166_912),
      *(2_039_000_000_000, 41_943_040, 1.41),
    ),
  ),
  # It stands for the GPUs of desktops, which have the least shared memory.
  "rtx4090": Target(
    24 * _GIB,
    gpu=(
      *("NVIDIA GeForce RTX 4090", (8, 9), 128, 1536, 101_376),
      *(1_008_000_000_000, 75_497_472, 2.52),
    ),
  ),
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
        target_config=_gpu_text(target),
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


def _gpu_text(target: Target) -> str:
  """Returns XLA's GpuTargetConfigProto as text."""
  name, capability, cores, threads, shared, bandwidth, l2, clock = target.gpu
  major, minor = capability
  return f"""
    platform_name: "CUDA"
    device_description_str: "{name}"
    runtime_version {{ major: 12 minor: 9 }}
    dnn_version_info {{ major: 9 minor: 8 }}
    gpu_device_info {{
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      core_count: {cores}
      fpus_per_core: {64 if capability == (8, 0) else 128}
      threads_per_warp: 32
      threads_per_block_limit: 1024
      threads_per_core_limit: {threads}
      registers_per_core_limit: 65536
      registers_per_block_limit: 65536
      shared_memory_per_block: 49152
      shared_memory_per_block_optin: {shared}
      shared_memory_per_core: {shared + 1024}
      block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
      clock_rate_ghz: {clock}
      memory_bandwidth: {bandwidth}
      device_memory_size: {target.memory_bytes}
      l2_cache_size: {l2}
    }}"""
