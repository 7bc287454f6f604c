"""The meta of a checkpoint: JSON, sealed with a sha256 of its own."""

import hashlib
import json
import pathlib
from collections.abc import Mapping

from adaptive_attention.atomic_write import atomic_write
from adaptive_attention.errors import first_line
from adaptive_attention.training import disks

_REQUIRED = ("step", "bits", "leaves", "sha256")
_EARLIER = {"bits_per_char": "bits"}  # names of earlier versions
_SEAL = "meta_sha256"  # earlier versions wrote none


class DamageError(Exception):
  """One checkpoint is damaged; the message says what is wrong with it."""


class UnreadableError(DamageError):
  """The disk does not give a checkpoint's bytes, which may be whole."""


def sealed(meta: Mapping) -> dict:
  """Returns meta with the sha256 of everything else in it, as JSON."""
  content = {name: value for name, value in meta.items() if name != _SEAL}
  text = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
  return {**content, _SEAL: hashlib.sha256(text.encode()).hexdigest()}


def read(folder: pathlib.Path, step: int) -> dict:
  """Returns the meta of the checkpoint in `folder`, which is of this step.

  Raises:
    DamageError: it is not JSON, was changed, or belongs to another step.
    UnreadableError: the disk does not give it.
  """
  try:
    meta = json.loads(_path(folder).read_text(encoding="utf-8"))
    named = {_EARLIER.get(name, name): meta[name] for name in meta}
    found, *_ = (named[name] for name in _REQUIRED)
  except (OSError, ValueError, KeyError, TypeError) as error:
    if reason := disks.refusal(error):
      raise UnreadableError(f"meta: {reason}") from error
    raise DamageError(f"meta: {first_line(error)}") from error
  if found != step:
    raise DamageError(f"meta: it belongs to step {found}")
  if meta.get(_SEAL, "") not in ("", sealed(meta)[_SEAL]):
    raise DamageError("meta: its sha256 differs from the one that was saved")
  return named


def write(folder: pathlib.Path, meta: Mapping):
  """Seals `meta` and replaces the meta of the checkpoint in `folder` by it.

  Raises:
    OSError: it cannot be written; the old meta stays.
  """
  atomic_write(_path(folder), json.dumps(sealed(meta)).encode())


def _path(folder):
  """Returns the file that orbax makes of an item of JSON."""
  return folder / "meta" / "metadata"
