"""Imports go down, floor by floor, and some words belong to one file."""

import ast
import pathlib

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "adaptive_attention"
FILES = sorted(PACKAGE.rglob("*.py"))
# The folders that are floors of their own; everything else is the library.
FLOORS = {"command_line": 3, "modes": 2, "bench": 1, "report": 1, "training": 1}
# What a word may be said in, as code; prose and settings may speak of it.
OWNERS = {
  "pmap": "training/parallel.py",
  "orbax": "training/checkpoint.py",
  "matplotlib": "report/figures.py",
  "wandb": "training/logbook.py",
  "tensorboardX": "training/logbook.py",
}


def module(path: pathlib.Path) -> str:
  """adaptive_attention/masks.py -> "adaptive_attention.masks"."""
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in FILES}


def floor(name: str) -> int:
  return FLOORS.get([*name.split("."), ""][1], 0)


def imported(path: pathlib.Path) -> set[str]:
  """What a file imports, anywhere in it, as whole module names."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path} has a relative import"
      names = {f"{node.module}.{alias.name}" for alias in node.names}
      inside = names & MODULES.keys()
      found |= inside
      if len(inside) < len(names):
        found.add(node.module)
  return found


def named(path: pathlib.Path) -> set[str]:
  """The words of the imports and attributes of a file."""
  words = set()
  for node in ast.walk(ast.parse(path.read_text())):
    match node:
      case ast.Attribute():
        words.add(node.attr)
      case ast.Import():
        words |= {w for a in node.names for w in a.name.split(".")}
      case ast.ImportFrom():
        words |= {*node.module.split("."), *(a.name for a in node.names)}
  return words


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
  for other in imported(MODULES[name]):
    root = other.split(".")[0]
    assert root not in ("configs", "data", "main", "tests"), (name, other)
    if root != "adaptive_attention":
      continue
    assert other in MODULES, f"{name} imports {other}, which is no module"
    assert floor(other) <= floor(name), f"{name} imports {other}, which is up"
    if name.startswith("adaptive_attention.modes."):
      assert ".modes" not in other, f"the mode {name} imports {other}"


def test_there_is_no_circle():
  below = {
    name: imported(path) & MODULES.keys() for name, path in MODULES.items()
  }
  while free := {name for name, others in below.items() if not others}:
    below = {
      name: others - free for name, others in below.items() if name not in free
    }
  assert not below, f"these import each other: {below}"


@pytest.mark.parametrize("word", OWNERS)
def test_a_library_has_one_owner(word):
  for path in FILES:
    if path != PACKAGE / OWNERS[word]:
      assert word not in named(path), f"{path} says {word}"


def acts(statement: ast.stmt, own: set[str]) -> bool:
  """Whether a statement of a module does more than to bind names of its own."""
  match statement:
    case ast.Import() | ast.ImportFrom() | ast.FunctionDef() | ast.ClassDef():
      return False
    case ast.Assign(targets=targets):
      names = [node for target in targets for node in ast.walk(target)]
      return any(isinstance(n, ast.Attribute | ast.Subscript) for n in names)
    case ast.AnnAssign(target=ast.Name()) | ast.Expr(value=ast.Constant()):
      return False
    case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name)))):
      return name not in own  # as `f.defvjp(...)` of an f of this module
  return True


@pytest.mark.parametrize("name", MODULES)
def test_no_import_has_a_side_effect(name):
  body = ast.parse(MODULES[name].read_text()).body
  own = {n.name for n in body if isinstance(n, ast.FunctionDef)}
  found = [ast.unparse(node) for node in body if acts(node, own)]
  assert not found, f"{name} does this when it is imported: {found}"


def test_bench_and_report_stand_beside_training():
  for name, path in MODULES.items():
    if name.startswith("adaptive_attention.training"):
      for other in imported(path):
        assert ".bench" not in other and ".report" not in other, (name, other)


def test_data_needs_only_numpy_and_the_standard_library():
  import sys

  allowed = {*sys.stdlib_module_names, "numpy", "data"}
  for path in (ROOT / "data").glob("*.py"):
    roots = {name.split(".")[0] for name in imported(path)}
    assert roots <= allowed, (path.name, roots - allowed)
