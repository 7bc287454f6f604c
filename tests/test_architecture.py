"""The house: imports go down, some words belong to one file, files are short.

An import does nothing but define names.
"""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PACKAGE = "adaptive_attention"
# The floors, by folder. Files in no folder are the library, as `attention` is.
FLOORS = {
  "attention": 0,
  "training": 1,
  "bench": 1,
  "report": 1,
  "modes": 2,
  "command_line": 3,
}
# Pairs of parts of one floor; the first must not import the second.
APART = (
  ("training", "bench"),
  ("training", "report"),
  ("bench", "report"),
  ("report", "bench"),
)
# The files or folders that may import a package; see `place`.
OWNERS = {
  "orbax": ("training/checkpoint_items.py",),
  "matplotlib": ("report/",),
  "wandb": ("training/copies.py",),
  "tensorboardX": ("training/copies.py",),
  "absl": ("command_line/",),
  "ml_collections": ("training/settings.py", "command_line/", "configs/"),
  "importlib": (
    *("command_line/uses.py", "training/logbook.py", "training/targets.py"),
    "main.py",
  ),
}
# Packages that a user need not have; they are imported where they are used.
OPTIONAL = ("torch", "wandb", "matplotlib")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 50


def files(folder: str) -> list[pathlib.Path]:
  return sorted((ROOT / folder).rglob("*.py"))


def module(path: pathlib.Path) -> str:
  """Returns "adaptive_attention.masks" for adaptive_attention/masks.py."""
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = [*files(PACKAGE), *files("configs"), *files("data"), ROOT / "main.py"]
MODULES = {module(path): path for path in SOURCES}
TREES = {path: ast.parse(path.read_text()) for path in SOURCES}
OURS = [name for name in MODULES if name.split(".")[0] == PACKAGE]
in_each_module = pytest.mark.parametrize("name", MODULES)
in_each_of_ours = pytest.mark.parametrize("name", OURS)


def imports(tree: ast.AST) -> set[str]:
  """Returns the dotted names of all that is imported, in functions too.

  Both `import a.b` and `from a import b` are "a.b", where b may be a module or
  a name out of one.
  """
  found = set()
  for node in ast.walk(tree):
    match node:
      case ast.Import(names=names):
        found |= {alias.name for alias in names}
      case ast.ImportFrom(module=source, names=names, level=level):
        assert not level, f"line {node.lineno} has a relative import"
        found |= {f"{source}.{alias.name}" for alias in names}
  return found


def imported_modules(name: str) -> set[str]:
  """Returns our modules that a module imports."""
  found = set()
  for other in imports(TREES[MODULES[name]]):
    if other not in MODULES:
      other = other.rpartition(".")[0]  # a name out of a module
    if other in MODULES:
      found.add(other)
  return found


def packages(tree: ast.AST) -> set[str]:
  """Returns the top-level packages that are imported."""
  return {name.split(".")[0] for name in imports(tree)}


def part(name: str) -> str:
  """Returns the folder of the package that a module is in, or ""."""
  words = name.split(".")
  inner = [*words, ""][1]
  if MODULES[name] == ROOT / PACKAGE / f"{inner}.py":
    return ""
  return inner


def place(name: str) -> str:
  """Returns a module's path in the package, or in the project beside it."""
  inside = name.split(".")[0] == PACKAGE
  return (
    MODULES[name].relative_to(ROOT / PACKAGE if inside else ROOT).as_posix()
  )


def floor(name: str) -> int:
  """Returns a module's floor: 0 for the library, 4 for main.py on top.

  configs and data, which stand beside the house, are 0 too.
  """
  if name == "main":
    return 4
  return FLOORS.get(part(name), 0)


def test_each_folder_has_its_floor():
  folders = {part(name) for name in OURS} - {""}
  assert folders <= FLOORS.keys(), "a new folder; say which floor it is"


@in_each_module
def test_what_is_imported_of_ours_exists(name):
  for other in imports(TREES[MODULES[name]]):
    if other.split(".")[0] == PACKAGE and other not in MODULES:
      source, _, bound = other.rpartition(".")
      assert source in MODULES, f"{name} imports {other}, which does not exist"
      tree = TREES[MODULES[source]]
      assert bound in names_of(tree), f"{source} has no {bound} for {name}"


def names_of(tree: ast.Module) -> set[str]:
  """Returns the names that a module binds, under whatever condition."""
  bound = set()
  for node in ast.walk(tree):
    match node:
      case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
        bound.add(name)
      case ast.Name(id=name, ctx=ast.Store()):
        bound.add(name)
      case ast.alias(name=name, asname=asname):
        bound.add(asname or name.split(".")[0])
  return bound


@in_each_of_ours
def test_imports_go_down(name):
  for other in imported_modules(name):
    root = other.split(".")[0]
    assert root == PACKAGE, f"{name} imports {other}, which is no part of it"
    assert floor(other) <= floor(name), f"{name} imports {other}, which is up"


@in_each_of_ours
def test_the_tests_are_not_imported(name):
  assert not packages(TREES[MODULES[name]]) & {"tests", "pytest", "hypothesis"}


@in_each_of_ours
def test_a_mode_imports_no_mode(name):
  if part(name) == "modes":
    for other in imported_modules(name):
      assert part(other) != "modes", f"the mode {name} imports {other}"


@pytest.mark.parametrize(("one", "other"), APART)
def test_parts_of_one_floor_stand_apart(one, other):
  for name in OURS:
    if part(name) == one:
      parts = {part(found) for found in imported_modules(name)}
      assert other not in parts, f"{name} imports {other}/"


def test_there_is_no_circle():
  below = {name: imported_modules(name) for name in MODULES}
  while free := {name for name, others in below.items() if not others}:
    below = {
      name: others - free for name, others in below.items() if name not in free
    }
  assert not below, f"these import each other: {below}"


def users(package: str) -> set[str]:
  """Returns which of our modules use a package, or a name out of it.

  Such a name is found where another of our modules that binds it passes it on,
  by an import or as an attribute.
  """
  found = {n for n in MODULES if package in packages(TREES[MODULES[n]])}
  passed_on = {
    f"{name}.{alias.asname or alias.name}"
    for name in found
    for node in ast.walk(TREES[MODULES[name]])
    if isinstance(node, ast.Import | ast.ImportFrom)
    for alias in node.names
    if package in packages(ast.Module([node], []))
  }
  return found | {n for n in MODULES if named(TREES[MODULES[n]]) & passed_on}


def named(tree: ast.Module) -> set[str]:
  """Returns what is imported, and the attributes of what is imported."""
  found, bound = imports(tree), {}
  for node in ast.walk(tree):
    match node:
      case ast.Import(names=names):
        bound |= {alias.asname or alias.name: alias.name for alias in names}
      case ast.ImportFrom(module=source, names=names):
        bound |= {a.asname or a.name: f"{source}.{a.name}" for a in names}
  return found | {
    f"{bound[ast.unparse(node.value)]}.{node.attr}"
    for node in ast.walk(tree)
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) in bound
  }


@pytest.mark.parametrize("package", OWNERS)
def test_a_package_has_one_owner(package):
  for name in users(package):
    path = place(name)
    assert path.startswith(OWNERS[package]), f"{path} imports {package}"


@in_each_module
def test_what_is_imported_by_a_text_is_a_mode(name):
  """No other package can come in by its name."""
  modes = {}
  for node in ast.walk(TREES[MODULES[name]]):
    match node:
      case ast.Call(
        func=ast.Attribute(attr="import_module"),
        args=[ast.JoinedStr(values=[ast.Constant(value=start), _])],
      ) if start == f"{PACKAGE}.modes.":
        modes[node.func] = start
  for node in ast.walk(TREES[MODULES[name]]):
    match node:
      case ast.Attribute(attr=word) | ast.Name(id=word) | ast.alias(name=word):
        assert word not in ("__import__", "import_module") or node in modes
      case ast.Constant(value="__import__" | "import_module"):
        pytest.fail(f"{name} says {node.value} in line {node.lineno}")


@in_each_module
def test_one_file_says_pmap(name):
  """It may stand nowhere else as a name, an attribute or a string."""
  if name == f"{PACKAGE}.training.parallel":
    return
  for node in ast.walk(TREES[MODULES[name]]):
    match node:
      case ast.Attribute(attr="pmap") | ast.alias(name="pmap"):
        pytest.fail(f"{name} says pmap in line {node.lineno}")
      case ast.Name(id="pmap") | ast.Constant(value="pmap"):
        pytest.fail(f"{name} says pmap in line {node.lineno}")


@in_each_module
def test_one_file_connects_processes(name):
  """It alone calls jax.distributed, or a part of jax that is not public."""
  owner = f"{PACKAGE}.training.processes"
  found = {
    other
    for other in imports(TREES[MODULES[name]])
    if other.startswith(("jax._src", "jax.distributed"))
  }
  calls = [
    node
    for node in ast.walk(TREES[MODULES[name]])
    if isinstance(node, ast.Attribute)
    and ast.unparse(node).startswith("jax.distributed.")
  ]
  assert bool(found and calls) == (name == owner)
  assert name == owner or not (found or calls)


@in_each_module
def test_what_is_optional_is_imported_where_it_is_used(name):
  """bench/torch.py and report/ are exempt: they are themselves imported so."""
  if name == f"{PACKAGE}.bench.torch" or part(name) == "report":
    return
  for node in TREES[MODULES[name]].body:
    if isinstance(node, ast.Import | ast.ImportFrom):
      assert not packages(ast.Module([node], [])) & {*OPTIONAL}, name


def test_words_are_owned_where_they_are_used():
  """If an owner were renamed, its check would check nothing."""
  for package, owners in OWNERS.items():
    for owner in owners:
      found = [TREES[MODULES[n]] for n in MODULES if place(n).startswith(owner)]
      assert any(package in packages(tree) for tree in found), (owner, package)
  assert "pmap" in (ROOT / PACKAGE / "training" / "parallel.py").read_text()


def test_configs_need_only_the_settings_of_the_library():
  allowed = {"ml_collections", "configs", *sys.stdlib_module_names}
  for path in files("configs"):
    others = packages(TREES[path]) - allowed
    assert others <= {PACKAGE}, (path.name, others)
    if others:
      used = imported_modules(module(path))
      assert used - {"configs", "configs.base"} <= {f"{PACKAGE}.config"}


def test_data_needs_only_numpy_and_the_standard_library():
  allowed = {*sys.stdlib_module_names, "numpy", "data"}
  for path in files("data"):
    found = packages(TREES[path])
    assert found <= allowed, (path.name, found - allowed)


def test_the_oracle_needs_nothing_of_ours():
  tree = ast.parse((ROOT / "tests" / "oracle.py").read_text())
  assert not packages(tree) & {PACKAGE, "tests", "jax", "flax"}


@in_each_module
def test_files_are_short(name):
  lines = len(MODULES[name].read_text().splitlines())
  assert lines <= MAX_FILE_LINES, f"{MODULES[name]} has {lines} lines"


@in_each_module
def test_functions_are_short(name):
  """They are counted from `def` on, comments and docstring included."""
  long = {}
  for node in ast.walk(TREES[MODULES[name]]):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      lines = node.end_lineno - node.lineno + 1
      if lines > MAX_FUNCTION_LINES:
        long[node.name] = lines
  assert not long, f"{MODULES[name]} has functions of so many lines: {long}"


def acts(statement: ast.stmt, own: set[str]) -> bool:
  """Returns whether a statement of a module does more than define names.

  Args:
    own: the functions of the module, whose methods may be called, as in
      `f.defvjp(...)`.
  """
  match statement:
    case ast.Import() | ast.ImportFrom() | ast.FunctionDef() | ast.ClassDef():
      return False
    case ast.Assign(targets=targets):
      nodes = [node for target in targets for node in ast.walk(target)]
      return any(isinstance(n, ast.Attribute | ast.Subscript) for n in nodes)
    case ast.AnnAssign(target=ast.Name()) | ast.Expr(value=ast.Constant()):
      return False
    case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name)))):
      return name not in own
    case ast.If(test=ast.Name(id="TYPE_CHECKING")):
      return False
  return True


@in_each_of_ours
def test_a_module_only_defines_names(name):
  body = TREES[MODULES[name]].body
  own = {node.name for node in body if isinstance(node, ast.FunctionDef)}
  found = [ast.unparse(node) for node in body if acts(node, own)]
  assert not found, f"{name} does this when it is imported: {found}"


# Prints what differs in the state of the process after all of ours is imported.
# Other packages are imported first, whatever these may do.
_IMPORT_ALL = """
import importlib, json, logging, os, signal, sys, threading, warnings
theirs, ours = json.load(sys.stdin)

def state():
  names = ["root", *logging.root.manager.loggerDict]
  loggers = {name: logging.getLogger(name) for name in names}
  plain = ([], [], 0, True, False)
  found = {
    f"logger {name}": (
      x.filters, x.handlers, 0 if x is logging.root else x.level,
      x.propagate, x.disabled,
    )
    for name, x in loggers.items()
  }
  found = {name: value for name, value in found.items() if value != plain}
  found |= {
    "root level": logging.root.level,
    "warnings": len(warnings.filters),
    "hooks": (sys.excepthook, sys.unraisablehook, sys.displayhook),
    "threads": (threading.excepthook, threading.active_count()),
    "signals": [signal.getsignal(n) for n in (1, 2, 15)],
    "environment": dict(os.environ),
    "path": list(sys.path),
    "streams": (sys.stdout, sys.stderr),
    "folder": os.getcwd(),
    "jax": dict(jax.config.values),
    "backends": list(xla_bridge._backends),
  }
  return {name: repr(value) for name, value in found.items()}

import jax
from jax._src import xla_bridge
for name in theirs:
  importlib.import_module(name)
logging.root.handlers.clear()  # with any, basicConfig would do nothing
before = state()
for name in ours:
  importlib.import_module(name)
after = state()
print(json.dumps({
  name: (before.get(name), after.get(name))
  for name in {**before, **after} if before.get(name) != after.get(name)
}))
"""


def test_imports_have_no_side_effect():
  """Logging, hooks, signals and settings of jax stay as they were before."""
  theirs = set()
  for path in TREES:
    for node in TREES[path].body:
      if isinstance(node, ast.Import):
        theirs |= {alias.name for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        theirs.add(node.module)
  roots = {PACKAGE, "configs", "data", *OPTIONAL}
  theirs = sorted(n for n in theirs if n.split(".")[0] not in roots)
  ours = [n for n in MODULES if n != f"{PACKAGE}.bench.torch"]
  process = subprocess.run(
    [sys.executable, "-c", _IMPORT_ALL],
    cwd=ROOT,
    input=json.dumps([theirs, ours]),
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr
  assert process.stderr == ""
  changed = json.loads(process.stdout)  # nothing else was printed either
  assert not changed
