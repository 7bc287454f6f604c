"""Runs main.py once per line of stdin, each time in a fork of a warm process.

A line is a JSON list of flags; the answer is a JSON list [exit code, stdout,
stderr]. What is slow to import is imported once; no child starts with a
backend, and one that ends with code 2 must not have started any.
"""

import json
import os
import pathlib
import runpy
import sys
import tempfile
import traceback

from jax._src import xla_bridge

import adaptive_attention.plan
import adaptive_attention.train  # noqa: F401

ROOT = pathlib.Path(__file__).parent.parent
BACKEND_WAS_STARTED = 99


def child(flags, out, err):
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
    if code == 2 and xla_bridge._backends:
      code = BACKEND_WAS_STARTED
    os._exit(code)


for line in sys.stdin:
  with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
    pid = os.fork()
    if not pid:
      child(json.loads(line), out, err)
    _, status = os.waitpid(pid, 0)
    out.seek(0)
    err.seek(0)
    answer = [os.waitstatus_to_exitcode(status), out.read(), err.read()]
  print(json.dumps(answer), flush=True)
