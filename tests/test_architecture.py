"""Imports only go down, and some words belong to one file."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "adaptive_attention"
LAYERS = (
  {"config_file", "console", "masks", "parameters", "positions"}
  | {"signals", "uses"},
  {"attention", "command_line"},
  {"memory"},
  {"model"},
  {"accounting", "batches", "logbook", "losses", "optimizer", "parallel"}
  | {"checkpoint", "settings", "weights", "steps"},
  {"evaluate", "generate", "plan"},
  {"benchmark"},
  {"train"},
  {"export"},
)
# Within a layer only these: what they build on.
SIDEWAYS = {
  ("accounting", "logbook"),
  ("parallel", "settings"),
  ("weights", "settings"),
  ("weights", "logbook"),
  ("steps", "losses"),
  ("steps", "optimizer"),
  ("steps", "parallel"),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def owner(path):
  """masks.py -> "masks"; everything in attention/ -> "attention"."""
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
  """The names of our own modules that a file imports."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      parts = node.module.split(".")
      if parts[0] in ("configs", "data", "main", "tests"):
        yield parts[0]
      elif parts[0] == "adaptive_attention":
        names = parts[1:2] or [alias.name for alias in node.names]
        yield from names
    elif isinstance(node, ast.Import):
      for alias in node.names:
        parts = alias.name.split(".")
        if parts[0] in ("configs", "data", "main", "tests"):
          yield parts[0]
        elif parts[0] == "adaptive_attention" and parts[1:]:
          yield parts[1]


def level(name):
  found = [i for i, layer in enumerate(LAYERS) if name in layer]
  assert found, f"{name} stands in no layer of this test"
  return found[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: owner(p) + "/" + p.name)
def test_imports_go_down(path):
  name = owner(path)
  for other in imported(path):
    if name in ("__init__", other) or (name, other) in SIDEWAYS:
      continue
    assert level(other) < level(name), f"{name} imports {other}"


@pytest.mark.parametrize(
  ("word", "only"),
  [
    ("pmap", "parallel.py"),
    ("orbax", "checkpoint.py"),
    ("wandb", "logbook.py"),
  ],
)
def test_a_library_has_one_owner(word, only):
  """The word as code; prose and settings may speak of it."""
  for path in FILES:
    names = {
      part
      for node in ast.walk(ast.parse(path.read_text()))
      for part in (
        [node.attr]
        if isinstance(node, ast.Attribute)
        else [p for a in node.names for p in a.name.split(".")]
        if isinstance(node, ast.Import)
        else (node.module or "").split(".")
        if isinstance(node, ast.ImportFrom)
        else []
      )
    }
    if word == "wandb":
      names -= {"wandb"} if path.name == only else set()
    assert word not in names or path.name == only, path


def test_data_needs_only_numpy_and_the_standard_library():
  import sys

  allowed = {*sys.stdlib_module_names, "numpy", "data"}
  for path in (ROOT / "data").glob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        roots = [alias.name.split(".")[0] for alias in node.names]
      elif isinstance(node, ast.ImportFrom) and not node.level:
        roots = [node.module.split(".")[0]]
      else:
        continue
      assert set(roots) <= allowed, (path.name, roots)
