"""Requirements are what is imported, and public functions have types."""

import ast
import re
import sys
import tomllib

import pytest

from tests.conftest import ROOT
from tests.test_architecture import MODULES, OURS, TREES, floor, packages, part

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
PUBLIC = PROJECT["tool"]["mypy"]["files"]
# Packages that are imported by another name.
IMPORT_NAMES = {
  "absl-py": "absl",
  "ml-collections": "ml_collections",
  "orbax-checkpoint": "orbax",
}
# Packages that jax brings along.
OF_JAX = {"jaxlib"}


def requirements(file: str) -> list[str]:
  return (ROOT / file).read_text().split()


def names(lines) -> set[str]:
  """Returns the packages of requirements, without versions and extras."""
  return {re.match(r"[\w-]+", line)[0] for line in lines}


def import_names(lines) -> set[str]:
  return {IMPORT_NAMES.get(name, name) for name in names(lines)}


LIBRARY = import_names(PROJECT["project"]["dependencies"])
TRAINING = LIBRARY | import_names(EXTRAS["train"])
OPTIONAL = {"matplotlib", "wandb", "torch"}


def imported(modules) -> set[str]:
  """Returns the packages of others that modules import."""
  found = {name for n in modules for name in packages(TREES[MODULES[n]])}
  ours = {"adaptive_attention", "configs", "data", "main"}
  return found - ours - {*sys.stdlib_module_names, "msvcrt"} - OF_JAX


def test_requirements_are_those_of_the_library_and_of_training():
  together = [*PROJECT["project"]["dependencies"], *EXTRAS["train"]]
  assert requirements("requirements.txt") == sorted(together)


def test_the_library_imports_its_dependencies_and_no_others():
  found = imported(name for name in OURS if not floor(name))
  assert found - OPTIONAL == LIBRARY


def test_main_imports_the_requirements_and_no_others():
  above = [name for name in MODULES if name not in OURS or floor(name)]
  found = imported(above) - OPTIONAL
  assert found <= TRAINING
  assert import_names(EXTRAS["train"]) <= found


def test_what_is_optional_has_an_extra():
  for name in OPTIONAL & imported(MODULES):
    extra = next(e for e, lines in EXTRAS.items() if name in names(lines))
    assert extra not in ("train", "cuda", "tpu")
  assert {"train", "cuda", "tpu", "report", "wandb", "torch"} == EXTRAS.keys()


def test_each_dependency_has_its_line_in_contributing():
  text = (ROOT / "CONTRIBUTING.md").read_text()
  table = text[text.index("## Dependencies") :]
  told = {
    name
    for line in re.findall(r"^\| (.+?) \|", table, re.MULTILINE)
    for name in line.split(", ")
  } - {"package", "---"}
  extras = [line for lines in EXTRAS.values() for line in lines]
  lines = [*PROJECT["project"]["dependencies"], *extras]
  lines += requirements("requirements-dev.txt")
  assert told == names(lines)


def test_the_version_can_be_read_without_an_import():
  assert PROJECT["project"]["dynamic"] == ["version"]
  statements = ast.parse(
    (ROOT / "adaptive_attention" / "__init__.py").read_text()
  ).body
  versions = [
    ast.literal_eval(statement.value)
    for statement in statements
    if isinstance(statement, ast.Assign)
    and ast.unparse(statement.targets[0]) == "__version__"
  ]
  assert len(versions) == 1
  assert re.fullmatch(r"\d+\.\d+\.\d+", versions[0])


def test_folders_of_the_package_are_packages():
  """Otherwise their files would be found here, but not in the wheel."""
  for name in OURS:
    if part(name):
      assert (MODULES[name].parent / "__init__.py").is_file(), name
  assert (ROOT / "adaptive_attention" / "py.typed").is_file()


@pytest.mark.parametrize("file", PUBLIC)
def test_public_functions_say_their_types(file):
  """mypy does not check functions without types."""
  silent = []
  for owner, node in public_functions(ast.parse((ROOT / file).read_text())):
    arguments = node.args
    said = [
      *arguments.posonlyargs,
      *arguments.args,
      *arguments.kwonlyargs,
      *filter(None, (arguments.vararg, arguments.kwarg)),
    ]
    if owner and said and said[0].arg in ("self", "cls"):
      said = said[1:]
    silent += [f"{node.name}({a.arg})" for a in said if a.annotation is None]
    if node.returns is None and not node.name.startswith("__"):
      silent.append(f"what {node.name} returns")
  assert not silent, f"{file} has no types for {silent}"


def public_functions(tree):
  """Yields (class or None, function) for all that others may call."""
  for node in tree.body:
    members = [(None, node)]
    if isinstance(node, ast.ClassDef) and node.name[0] != "_":
      members = [(node, inner) for inner in node.body]
    for owner, member in members:
      if isinstance(member, ast.FunctionDef) and (
        member.name[0] != "_" or member.name in ("__call__", "__init__")
      ):
        yield owner, member


def test_each_python_that_is_named_is_tested():
  """The workflow runs on all of them, and a script on those but the least."""
  prefix = "Programming Language :: Python :: "
  named = [
    name.removeprefix(prefix)
    for name in PROJECT["project"]["classifiers"]
    if re.fullmatch(rf"{prefix}3\.\d+", name)
  ]
  assert PROJECT["project"]["requires-python"] == f">={named[0]}"
  workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
  assert f"python: {named}".replace("'", '"') in workflow
  script = (ROOT / ".ci" / "versions").read_text()
  assert f"versions=({' '.join(named[1:])})" in script
