"""The memory of the devices: what there is, and what to do where it lacks."""

import contextlib
import os
import pathlib

import jax

from adaptive_attention.errors import Error, first_line
from adaptive_attention.training import console, parallel

ADVICE = (
  "give --config.accumulation_steps more, --config.model.remat, or several "
  "devices a smaller part of --config.batch_size each"
)
SMALLER = f"make the model smaller, or {ADVICE}"
_CGROUP = pathlib.Path("/sys/fs/cgroup/memory.max")


class RoomError(Error):
  """The memory does not hold what is to be computed."""


def bytes_per_device(count: int | None = None) -> int | None:
  """Returns what a device of this process has for arrays; None if not known.

  Devices of a CPU share what the process may use.

  Args:
    count: how many devices are used; by default all.
  """
  device, *_ = devices = parallel.local_devices()[:count]
  if device.platform != "cpu":
    return (device.memory_stats() or {}).get("bytes_limit")
  limits = []
  with contextlib.suppress(ValueError, OSError, AttributeError):
    limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
  with contextlib.suppress(ValueError, OSError):  # no group, or no limit
    limits.append(int(_CGROUP.read_text()))
  return min(limits) // len(devices) if limits else None


def check(
  needed: int, what: str, advice: str = SMALLER, count: int | None = None
):
  """Checks that a device has room, before it is asked for.

  Args:
    needed: bytes per device.
    what: what takes them; for the message.
    advice: what to do where it lacks; for the message.
    count: as in `bytes_per_device`.

  Raises:
    RoomError: naming both sizes.
  """
  there = bytes_per_device(count)
  if there is not None and needed > there:
    raise RoomError(
      f"{what} takes {console.bytes_text(needed)} per device, which has "
      f"{console.bytes_text(there)}; {advice}"
    )


@contextlib.contextmanager
def failures():
  """Turns what fails for want of memory into a `RoomError`."""
  try:
    yield
  except (MemoryError, jax.errors.JaxRuntimeError) as error:
    said = str(error).lower()
    if not isinstance(error, MemoryError) and not any(
      x in said for x in ("resource_exhausted", "out of memory")
    ):
      raise
    raise RoomError(
      f"there is not enough memory ({first_line(error)}); {SMALLER}"
    ) from error
