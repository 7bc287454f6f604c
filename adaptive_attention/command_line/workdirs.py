"""The folder of a run: its name, and whether a run may be written there."""

import pathlib
import urllib.parse

from adaptive_attention.command_line import config_file
from adaptive_attention.errors import SettingsError


def of(given) -> pathlib.Path:
  """Returns the folder that the flags name.

  Args:
    given: the command line, as `flags.parse` returns it.

  Raises:
    SettingsError: no folder can have this name.
  """
  workdir = _named(given)
  try:
    workdir.resolve().exists()
  except (OSError, RuntimeError) as error:  # too long, or a circle of links
    raise SettingsError(
      f"--workdir={workdir} cannot be reached ({error}); give another folder"
    ) from error
  return workdir


def _named(given):
  if "workdir" in given.flags:
    return pathlib.Path(given.flags["workdir"])
  if "config" not in given.flags:
    return pathlib.Path("runs") / given.use.mode
  file, argument = config_file.file_and_argument(given.flags["config"])
  # In the folder's name the argument is quoted, as it may hold a slash.
  quoted = [urllib.parse.quote(text, safe="") for text in argument]
  return pathlib.Path("runs") / "_".join([pathlib.Path(file).stem, *quoted])


def check(workdir: pathlib.Path, source: pathlib.Path):
  """Checks that a run may be written there.

  Args:
    workdir: the run's folder, which need not exist.
    source: the folder of main.py; no run is written into its packages.

  Raises:
    SettingsError: a file or a part of the source is there.
  """
  packages = [p for p in source.iterdir() if (p / "__init__.py").is_file()]
  packages += [p for p in source.glob(".*") if p.is_dir()]
  place = workdir.resolve()
  above = [p for p in (place, *place.parents) if p.exists()]
  if not above[0].is_dir():
    raise SettingsError(
      f"--workdir={workdir} is not possible, as {above[0]} is a file; give a "
      "folder"
    )
  # The files themselves are compared, as one may have several paths.
  inside = [s for s in packages if any(p.samefile(s) for p in above)]
  inside += [source] if place.exists() and place.samefile(source) else []
  if inside:
    raise SettingsError(
      f"--workdir={workdir} is not possible, as the source is in {inside[0]}; "
      f"give another folder, as runs/{place.name}"
    )
