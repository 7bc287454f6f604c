"""What the real compilers say of kernels: bundles, registers, spills, memory.

It is static: no time is measured. Import it before libtpu is loaded, which
reads only once where to write its schedules.
"""

import atexit
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import jax
from jax.sharding import SingleDeviceSharding

from adaptive_attention.training import targets
from adaptive_attention.training.targets import TARGETS, device_of

targets.stay_on_cpu()
_DUMP = pathlib.Path(tempfile.mkdtemp(prefix="schedules_"))
atexit.register(shutil.rmtree, _DUMP, ignore_errors=True)
os.environ["LIBTPU_INIT_ARGS"] = " ".join(
  [
    os.environ.get("LIBTPU_INIT_ARGS", ""),
    f"--xla_jf_dump_to={_DUMP}",
    "--xla_jf_dump_llo_text=true",
  ]
)


@dataclasses.dataclass
class Report:
  """What a compiler says of a program.

  Attributes:
    memory: bytes of arguments, outputs and temporaries.
    kernels: static figures of each of our kernels, by its name.
  """

  memory: dict
  kernels: dict


def compiled_for(target, function, *shapes) -> Report:
  """Compiles function(*shapes) for a target.

  Args:
    target: a name of TARGETS.
    function: to be traced where `choice.device()` is the target.
    shapes: jax.ShapeDtypeStruct.
  """
  device = device_of(target)
  sharding = SingleDeviceSharding(device)
  shapes = [
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in shapes
  ]
  is_tpu = bool(TARGETS[target].topology)
  folder = _DUMP if is_tpu else pathlib.Path(tempfile.mkdtemp(dir=_DUMP))
  before = set(folder.iterdir())
  options = {}
  if not is_tpu:
    options["xla_dump_to"] = str(folder)
    options["xla_dump_emitter_re"] = "ptx"  # or else some versions write none
    options["xla_backend_optimization_level"] = 3  # which conftest turns off
  with jax.default_device(device):
    lowered = jax.jit(function).lower(*shapes)
  stats = lowered.compile(compiler_options=options).memory_analysis()
  files = [path for path in folder.iterdir() if path not in before]
  kernels = _of_tpu(files) if is_tpu else _of_gpu(files)
  for path in files:
    if path.is_file():
      path.unlink()
  memory = {
    name: getattr(stats, f"{name}_size_in_bytes")
    for name in ("argument", "output", "temp")
  }
  return Report(memory, kernels)


_UNITS = [
  "MXU",
  "XLU",
  "VALU",
  "VPOP",
  "EUP",
  "VLOAD",
  "FILL",
  "VSTORE",
  "SPILL",
  "SALU",
]
_LINE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:(LH|LB|LE|PB|PF|CT)\s*)?:")


def _of_tpu(files):
  """Returns of each kernel the regions of its schedule that hold products.

  Vector code is unrolled, so that these are the branches of `pl.when`, the
  largest first: a partial block, then a full one.
  """
  kernels = {}
  for path in files:
    match = re.match(
      r"\d+-adaptive_attention_(\w+?)(?:\.\d+)?-\d+-final_bundles\.txt",
      path.name,
    )
    if not match:
      continue
    stem = path.name.split("-", 1)[1].rsplit("-", 2)[0]
    units = next(
      other.read_text(errors="replace")
      for other in files
      if f"-{stem}-" in other.name
      and "final_hlo-static-per-bundle-utilization" in other.name
    )
    regions = _regions(path.read_text(errors="replace"), units)
    kernels[match[1]] = sorted(regions, key=lambda r: -r["bundles"])
  return kernels


def _regions(text, units):
  """Returns bundles and used slots of regions with products.

  A region ends where control may go another way.
  """
  rows = [
    [int(x) for x in line.split()]
    for line in units.partition("UTILIZATION:")[2].splitlines()
    if line.strip()
  ]
  regions, index = [], 0
  for line in text.splitlines():
    match = _LINE.match(line)
    if not match:
      continue
    if match[1] or not regions:
      regions.append({"bundles": 0, **dict.fromkeys(_UNITS, 0)})
    regions[-1]["bundles"] += 1
    for unit, count in zip(_UNITS, rows[index] if index < len(rows) else ()):
      regions[-1][unit] += count
    index += 1
  return [region for region in regions if region["MXU"]]


def _ptxas():
  """Returns the assembler of the nvcc package, or else of the path."""
  for root in sys.path:
    path = pathlib.Path(root) / "nvidia/cuda_nvcc/bin/ptxas"
    if path.exists():
      return str(path)
  return shutil.which("ptxas")


def _of_gpu(files):
  """Returns registers, spilled bytes and shared memory of each kernel."""
  shared = {}
  for path in files:
    if path.name.endswith("thunk_sequence.txt"):
      shared |= {
        name: int(size)
        for name, size in re.findall(
          r"k(?:Custom)?Kernel\s+\S.*?(\S+) grid: \[[\d, ]+\] threads: "
          r"\[\d+, 1, 1\].*?shared_memory: (\d+)",
          path.read_text(),
        )
      }
  kernels = {}
  for path in files:
    if path.suffix != ".ptx" or path.stat().st_size < 100:
      continue
    arch = re.search(r"\.target (sm_\w+)", path.read_text())[1]
    said = subprocess.run(
      [_ptxas(), "-v", f"-arch={arch}", str(path), "-o", os.devnull],
      capture_output=True,
      text=True,
      check=True,
    ).stderr
    for name, body in re.findall(
      r"Function properties for (\S+)\n(.*?Used \d+ registers)",
      said,
      re.DOTALL,
    ):
      if name.startswith("adaptive_attention_"):
        kernels[name.removeprefix("adaptive_attention_")] = {
          "registers": int(re.search(r"Used (\d+) registers", body)[1]),
          "spilled": int(re.search(r"(\d+) bytes spill stores", body)[1]),
          "shared": shared[name],
          "notes": sorted(set(re.findall(r"\((C\d+)\)", said))),
        }
  return kernels
