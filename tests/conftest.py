"""Gives all tests two CPU devices, and main.py as a function."""

import contextlib
import ctypes
import gc
import importlib.metadata
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile

# Processes that pytest-xdist and tests start inherit all variables.
if "PYTEST_XDIST_WORKER" not in os.environ:
  # By hand some tests run on the device that this names; see CONTRIBUTING.md.
  if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
    # Tests compile more than they compute. Compiling takes half as long without
    # XLA's optimization of machine code, and half of that with its older
    # emitters, which jaxlib 0.11 no longer has.
    flags = [
      "--xla_backend_optimization_level=0",
      # Two workers fill two cores.
      "--xla_cpu_parallel_codegen_split_count=1",
      "--xla_cpu_multi_thread_eigen=false",
    ]
    jaxlib = importlib.metadata.version("jaxlib").split(".")
    if [int(x) for x in jaxlib[:2]] < [0, 11]:
      flags.append("--xla_cpu_use_fusion_emitters=false")
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = " ".join([given, *flags]).strip()
  # What will be removed is an error in the programs that they start, too.
  os.environ["PYTHONWARNINGS"] = ",".join(
    f"error::{kind}Warning"
    for kind in ("Deprecation", "PendingDeprecation", "Future")
  )
  # These programs compile the same few steps over and over.
  _CACHE = tempfile.TemporaryDirectory(prefix="compiled-")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
# The signal acts as it does where the tests were not started by nohup.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
jax.config.update("jax_num_cpu_devices", 2)
# What a test compiles in its own process hardly ever comes again, and to write
# it down takes a tenth of the time.
jax.config.update("jax_enable_compilation_cache", False)
if os.environ["JAX_PLATFORMS"] != "cpu":
  # Other devices round what they multiply in float32, unless they are asked.
  jax.config.update("jax_default_matmul_precision", "highest")
gc.set_threshold(100_000, 10, 10)  # tracing makes many objects, and few cycles


# The files that take longest, in that order. They come first, so that no worker
# waits for another one at the end.
_LONGEST = (
  "attention/test_attention.py",
  "modes/test_train.py",
  "attention/test_pallas.py",
  "training/test_steps.py",
  "test_readme.py",
  "attention/test_transformations.py",
  "modes/test_ends.py",
  "training/test_evaluator.py",
  "test_kv_cache.py",
  "modes/test_bench.py",
  "modes/test_processes.py",
)


def pytest_collection_modifyitems(items):
  place = {ROOT / "tests" / name: i for i, name in enumerate(_LONGEST)}
  assert all(path.exists() for path in place)
  items.sort(key=lambda item: place.get(item.path, len(place)))


_ROOM_BYTES = 5 << 28  # 1.25 GiB above what was left when room was last made


def _resident_bytes() -> int:
  try:
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
  except OSError:  # on another system than Linux
    return 0
  return int(pages) * resource.getpagesize()


@pytest.fixture(scope="session")
def resident():
  """Returns how many bytes were still used when room was last made."""
  return {"bytes": _resident_bytes()}


@pytest.fixture(autouse=True)
def room(resident):
  """Drops what tests have compiled, where it takes much memory.

  Each program also takes some of the pieces of memory that a process may map.
  """
  yield
  if _resident_bytes() > resident["bytes"] + _ROOM_BYTES:
    jax.clear_caches()
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # where it is not glibc
      ctypes.CDLL(None).malloc_trim(0)
    resident["bytes"] = _resident_bytes()


@contextlib.contextmanager
def files_of_at_most(size):
  """Refuses to write longer files, as a full disk does."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def serving(*options):
  """Yields a function that runs main.py in a server.

  It is called as run(*flags) and returns [exit code, stdout, stderr].
  `run.backend_was_started` tells whether the last call touched a device.

  Args:
    options: the options of Python that start the server.
  """
  with subprocess.Popen(
    [sys.executable, *options],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as server:

    def run(*flags):
      server.stdin.write(json.dumps([str(flag) for flag in flags]) + "\n")
      server.stdin.flush()
      *answer, run.backend_was_started = json.loads(server.stdout.readline())
      return answer

    yield run
    server.stdin.close()


@pytest.fixture(scope="session")
def main():
  with serving("-m", "tests.main_server") as run:
    yield run


@pytest.fixture(scope="session")
def text(tmp_path_factory):
  """A file of 20,000 bytes, in which a model finds something to learn."""
  words = [b"span", b"wave", b"head", b"query", b"key", b"token", b"comb"]
  drawn = np.random.default_rng(0).integers(0, len(words), 5000)
  path = tmp_path_factory.mktemp("data") / "text.txt"
  path.write_bytes(b" ".join(words[i] for i in drawn)[:20_000])
  return path


TINY = {
  "steps": 12,
  "batch_size": 4,
  "log_every_steps": 3,
  "eval_every_steps": 6,
  "eval_tokens": 500,
  "eval_batch_size": 8,
  "checkpoint_every_steps": 3,
  "model.n_layer": 1,
  "model.n_head": 2,
  "model.width": 16,
  "model.context_tokens": 24,
  "model.ramp": 4.0,
  "model.dropout": 0.3,
  # It compiles in half the time. Tests of attention run all implementations.
  "model.implementation": "reference",
  "optimizer.warmup_steps": 4,
  "cpu_devices": 2,
}


@pytest.fixture
def tiny(text):
  """A config whose whole run takes seconds."""
  from configs import base

  config = base.get_config()
  config.update_from_flattened_dict({**TINY, "data.path": str(text)})
  return config


@pytest.fixture
def tiny_flags(text):
  """The same config as flags of main.py."""
  return [
    f"--config={ROOT / 'configs' / 'base.py'}",
    f"--config.data.path={text}",
    *(f"--config.{name}={value}" for name, value in TINY.items()),
  ]
