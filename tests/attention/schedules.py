"""What the real compilers say of kernels: bundles, registers, spills, memory.

It is static: no time is measured. Import it before libtpu is loaded, which
reads only once where to write its schedules. As a program it prints the tables
of RESULTS.md, for names of TARGETS:

python -m tests.attention.schedules v5e v6e
python -m tests.attention.schedules h100 a100 rtx4090
"""

import argparse
import atexit
import dataclasses
import itertools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from adaptive_attention.attention import attend, choice
from adaptive_attention.masks import Mask, Wave
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
    kernels: static figures of each of our kernels, by its name: on a GPU
      registers of a thread, spilled bytes of it, shared memory and loops of a
      program; on a TPU regions of products, the bundles of all others, VMEM
      and the bytes of it that are spilled.
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


H = 8


def of_attention(
  target, T, K, mask="spans", older=0, dtype=jnp.bfloat16, **more
):
  """Compiles `attend` of eight heads, forward and all gradients.

  Args:
    mask: "spans", or the period of waves beside them: "real" or "integer".
    older: how many keys of a memory there are.
    more: options of `attend`.
  """

  def loss(lengths, q, k, v):
    span, period, ratio = lengths
    wave = None
    if mask != "spans":
      wave = Wave(period, ratio, integer=mask == "integer")
    out = attend(q, k, v, Mask(span, 32.0, wave), memory=older, **more)
    return jnp.sum(out.astype(jnp.float32))

  def gradients(span, period, ratio, *arrays):
    return jax.grad(loss, range(4))((span, period, ratio), *arrays)

  length = jax.ShapeDtypeStruct((H,), jnp.float32)
  queries, keys = (
    jax.ShapeDtypeStruct((1, n, H, K), dtype) for n in (T, T + older)
  )
  return compiled_for(target, gradients, *[length] * 3, queries, keys, keys)


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
  """Returns of each kernel its VMEM and the regions that hold products.

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
    allocations = next(
      other.read_text(errors="replace")
      for other in files
      if re.search(rf"-{re.escape(stem)}-\d+-post-ra\.txt$", other.name)
    )
    blocks = [region for region in regions if region["MXU"]]
    kernels[match[1]] = {
      "blocks": sorted(blocks, key=lambda r: -r["bundles"]),
      "other": sum(r["bundles"] for r in regions if not r["MXU"]),
      **_vmem(allocations),
    }
  return kernels


def _vmem(text):
  """Returns the bytes of what is allocated, and of registers spilled there."""
  found = {"vmem": 0, "spilled": 0}
  for size, tag in re.findall(
    r"space=vmem, size = (\w+),.*?tag = '([^']*)'", text
  ):
    kind = "spilled" if tag.startswith("spilled") else "vmem"
    found[kind] += int(size, 0)
  return found


def _regions(text, units):
  """Returns bundles and used slots of regions.

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
  return regions


def _tool(name):
  """Returns the path of a program of CUDA, of a package or installed."""
  for root in sys.path:
    for path in pathlib.Path(root).glob(f"nvidia/*/bin/{name}"):
      return str(path)
  path = shutil.which(name)
  if path is None:
    raise FileNotFoundError(
      f"{name} is not installed; CONTRIBUTING.md has the packages"
    )
  return path


def _of_gpu(files):
  """Returns registers, spills, shared memory and loops of each kernel."""
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
    binary = path.with_suffix(".cubin")
    arch = re.search(r"\.target (sm_\w+)", path.read_text())[1]
    said = _printed(_tool("ptxas"), "-v", f"-arch={arch}", path, "-o", binary)
    loops = _loops(_printed(_tool("nvdisasm"), "-c", binary))
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
          "loops": loops[name],
          "notes": sorted(set(re.findall(r"\((C\d+)\)", said))),
        }
  return kernels


def _printed(*command):
  ended = subprocess.run(command, capture_output=True, text=True, check=True)
  return ended.stdout + ended.stderr


def _loops(assembly):
  """Returns, by function, (instructions, barriers) of each of its loops.

  A loop is what stands between a branch backwards and its target, so that one
  around others has theirs too. They stand in the order of their ends.
  """
  found = {}
  for text in re.split(r"\n(?=\.text\.)", assembly)[1:]:
    targets, barriers, loops = {}, [0], []
    for line in text.splitlines():
      if label := re.match(r"(\.L_x_\d+):", line):
        targets[label[1]] = len(barriers) - 1
      elif code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
        barriers.append(barriers[-1] + ("BAR." in code[1]))
        goal = re.search(r"\bBRA\b.*`\((\S+)\)", code[1])
        begin = targets.get(goal[1]) if goal else None
        here = len(barriers) - 1
        if begin is not None and here - begin > 1:  # one is the end's
          loops.append((here - begin, barriers[here] - barriers[begin]))
    found[re.match(r"\.text\.([^:]+)", text)[1]] = loops
  return found


def _table_row(target, T, K, mask):
  """Returns a line of Markdown on one call."""
  call = choice.Call(1, T, T, H, K, 2, mask == "integer")
  with jax.default_device(device_of(target)):
    blocks = choice.chosen(call).blocks
  cells = [f"{target}, {T}, {K}, {mask}", blocks]
  for name, kernel in sorted(of_attention(target, T, K, mask).kernels.items()):
    if TARGETS[target].topology:
      counts = [x["bundles"] for x in kernel["blocks"][:2]]
      counts = " / ".join(map(str, [*counts, kernel["other"]]))
      sizes = [f"{kernel[x] / 2**20:.1f} MiB" for x in ("vmem", "spilled")]
      cells.append(f"{name}: {counts} / {' / '.join(sizes)}")
    else:
      counts = f"{kernel['registers']} / {kernel['spilled']}"
      loops = ", ".join(f"{n} ({bars})" for n, bars in kernel["loops"])
      size = f"{kernel['shared'] / 1024:.0f} KiB"
      cells.append(f"{name}: {counts} / {size} / {loops}")
  return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description="Prints tables of RESULTS.md.")
  parser.add_argument("targets", nargs="+", choices=TARGETS)
  asked = parser.parse_args().targets
  print(
    "bfloat16, 8 heads, forward and all gradients of attend. Target, T, K and\n"
    "mask; blocks of the forward pass; then of each kernel: on a TPU bundles\n"
    "of a partial and of a full block and of all that is not a block, VMEM\n"
    "and what is spilled there; on a GPU registers of a thread, spilled\n"
    "bytes, shared memory of a program, and instructions (and barriers) of\n"
    "its loops: partial blocks, full ones, and residues around both."
  )
  for wanted in itertools.product(
    *(asked, (2048, 8192), (64, 128), ("spans", "real", "integer"))
  ):
    print(_table_row(*wanted), flush=True)
