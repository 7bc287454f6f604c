"""The help page: the ways to call main.py, with their flags and settings."""

import textwrap

from ml_collections import ConfigDict

from adaptive_attention.command_line.flags import FLAGS
from adaptive_attention.command_line.uses import EXAMPLES, USES


def text(defaults: ConfigDict) -> str:
  """Returns the page, 80 columns wide.

  Args:
    defaults: a config with all settings.
  """
  lines = ["python main.py --mode=MODE ...", ""]
  for use in USES:
    lines += [use.name, *_wrapped(use.does, "  ")]
    for name, default in use.flags().items():
      flag = FLAGS[name]
      shown = f"--{name}"
      if default is not None and flag.kind is not bool:
        shown += f"={default}"
      lines += _wrapped(flag.help, f"  {shown:<18}  ", " " * 22)
    acting = ", ".join(_acting(use, defaults)) or "none"
    lines += [*_wrapped(acting, f"  {'settings':<18}  ", " " * 22), ""]
  lines += _wrapped(
    "Settings are given as --config.FIELD=VALUE; each has its default and its "
    "reason in configs/base.py.",
    "",
  )
  return "\n".join([*lines, "", "Examples", *(f"  {x}" for x in EXAMPLES)])


def _wrapped(text, first, others=None):
  return textwrap.wrap(
    text,
    80,
    initial_indent=first,
    subsequent_indent=first if others is None else others,
    break_long_words=False,
    break_on_hyphens=False,
  )


def _acting(use, config, prefix=""):
  """Returns the settings that act; SECTION.* if all of a section do."""
  found = []
  for name, value in config.items():
    if not isinstance(value, ConfigDict):
      found += [prefix + name] if use.acts(prefix + name) else []
    elif (inner := _acting(use, value, f"{name}.")) and len(inner) == len(
      value
    ):
      found.append(f"{name}.*")
    else:
      found += inner
  return found
