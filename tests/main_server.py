"""Runs main.py once per line of stdin, each time in a fork of a warm process.

A line is a JSON list of flags. The answer is a JSON list [exit code, stdout,
stderr, whether a backend was started]. Modules that are slow to import are
imported once, before the forks. No child starts with a backend.
"""

import contextlib
import gc
import importlib
import json
import os
import pathlib
import runpy
import sys
import tempfile
import traceback

from jax._src import xla_bridge

from adaptive_attention.command_line import flags as command_line
from adaptive_attention.command_line import prepare  # noqa: F401

ROOT = pathlib.Path(__file__).parent.parent
for mode in command_line.MODES:
  importlib.import_module(f"adaptive_attention.modes.{mode}")
# No fork looks through what was imported, or often through what it traces.
gc.collect()
gc.freeze()
gc.set_threshold(100_000, 10, 10)


def child(flags, out, err, started):
  code = 70
  try:
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.argv = ["main.py", *flags]
    runpy.run_path(str(ROOT / "main.py"), run_name="__main__")
  except SystemExit as stop:
    code = stop.code
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    if xla_bridge._backends:
      started.write("yes")
      started.flush()
    os._exit(code)


def read(file):
  file.seek(0)
  return file.read()


for line in sys.stdin:
  with contextlib.ExitStack() as files:
    out, err, started = (
      files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3)
    )
    pid = os.fork()
    if not pid:
      child(json.loads(line), out, err, started)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    answer = [code, read(out), read(err), bool(read(started))]
  print(json.dumps(answer), flush=True)
