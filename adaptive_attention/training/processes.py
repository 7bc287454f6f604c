"""Several processes that train one model: how they meet, agree and end.

jax.distributed connects them. By its heartbeats each learns of the death of
another, and what it keeps for all of them carries short texts. Arrays go
through `parallel`.
"""

import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping

import jax
from jax._src import distributed  # what it keeps for all has no public name

from adaptive_attention.errors import Error, SettingsError, first_line
from adaptive_attention.training import last_words

_AGAIN = "the same command goes on from the newest checkpoint"
# A failed collective has no class of its own. Words of gloo, NCCL and gRPC:
_LOST = ("gloo", "nccl", "heartbeat", "coordination", "connection", "socket")
_LEAVING_SECONDS = 5  # in which the others learn why a process leaves
_JOIN_SECONDS = 300  # in which all processes must come
_END_SECONDS = 86_400  # the primary process may have much to do at the end
_calls = itertools.count()


class PeerError(Error):
  """Another process has failed, has ended or does not answer.

  The exit code is that of a failure that may pass, EX_TEMPFAIL of sysexits.h.
  """

  exit_code = 75


def join(
  *,
  distributed: bool = False,
  coordinator_address: str = "",
  process_count: int = 0,
  process_index: int = -1,
  heartbeat_seconds: int = 100,
):
  """Meets the other processes; call it before anything asks for a device.

  Args:
    distributed: whether there are other processes; otherwise nothing is done.
    coordinator_address, process_count, process_index: HOST:PORT of the first
      process, how many there are, and which one this is; "", 0 and -1 on
      clusters where jax finds them out.
    heartbeat_seconds: a process that was not heard of for so long is dead, and
      all others end.

  Raises:
    SettingsError: the processes cannot find each other.
  """
  if not distributed:
    return
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  _speak_at_abort(
    f"ended, as the other processes did not come within {_JOIN_SECONDS} s (the "
    "lines above are of jax.distributed); start all of them, each with its own "
    "process_index and the same coordinator_address and process_count"
  )
  try:
    jax.distributed.initialize(
      coordinator_address=coordinator_address or None,
      num_processes=process_count or None,
      process_id=None if process_index < 0 else process_index,
      initialization_timeout=_JOIN_SECONDS,
      heartbeat_timeout_seconds=heartbeat_seconds,
      shutdown_timeout_seconds=_END_SECONDS,
    )
  except (ValueError, RuntimeError) as error:
    raise SettingsError(
      "config.distributed=True finds no other processes "
      f"({first_line(error)}); give coordinator_address, process_count and "
      "process_index too"
    ) from error
  _speak_at_abort(
    "ended by jax.distributed, as another process has ended or has not been "
    f"heard of for {heartbeat_seconds} s (the lines above have its number); "
    f"{_AGAIN}"
  )
  sys.excepthook = _leaving_after(sys.excepthook)


def exchange(value) -> list:
  """Returns what each process gave, by their index; each waits for all.

  All processes call it, in the same order.

  Args:
    value: what JSON can hold.

  Raises:
    PeerError: another process has failed, and gives nothing any more.
  """
  client, call = _client(), next(_calls)
  if client is None:
    return [value]
  client.key_value_set(f"{call}/{_index()}", json.dumps(value))
  count = distributed.global_state.num_processes
  return [json.loads(_text(client, f"{call}/{i}")) for i in range(count)]


def from_primary(make: Callable):
  """Returns what `make` returns on the primary process, which alone calls it.

  Raises:
    PeerError: it failed there.
  """
  return exchange(make() if _index() == 0 else None)[0]


def agree(facts: Mapping[str, object]):
  """Checks that all processes have the same facts, by name.

  Raises:
    SettingsError: naming a process, and what differs there.
  """
  of_first, *others = exchange(dict(facts))
  for i, of_other in enumerate(others, 1):
    for name in [*of_first, *(n for n in of_other if n not in of_first)]:
      one, other = (facts.get(name) for facts in (of_first, of_other))
      if one != other:
        raise SettingsError(
          f"process {i} has {name}={other!r} where process 0 has {one!r}; "
          "start all processes with the same settings, data, code and packages"
        )


@contextlib.contextmanager
def failures():
  """Turns what fails as another process has ended into a `PeerError`."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if not _is_of_another(error):
      raise
    raise _lost(error) from error


def _is_of_another(error: BaseException) -> bool:
  """Tells whether an error says that another process cannot be reached."""
  text = str(error).lower()
  return (
    _client() is not None
    and isinstance(error, jax.errors.JaxRuntimeError)
    and any(word in text for word in _LOST)
  )


def leave(reason: str, exit_code: int):
  """Parts with the other processes after an error that this one has told.

  They have some seconds in which to learn the reason and to leave too. If all
  do, it returns. Otherwise it ends this process, as the ordinary end would wait
  for the others, which may wait for this one.
  """
  client = _client()
  if client is None:
    return
  last_words.on(signal.SIGABRT, lambda: exit_code)
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    if exit_code != PeerError.exit_code:
      client.key_value_set(f"failed/{_index()}", reason)
    client.wait_at_barrier("leaving", _LEAVING_SECONDS * 1000)
    jax.distributed.shutdown()
    return
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError, AttributeError):
      stream.flush()
  os._exit(exit_code)


def _client():
  return distributed.global_state.client


def _index() -> int:
  return distributed.global_state.process_id


def _text(client, key: str) -> str:
  """Waits for a text, as long as no process has failed."""
  while True:
    try:
      return client.blocking_key_value_get(key, 1000)
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise _lost(error) from error
    if failed := _failed(client):
      raise PeerError(failed)


def _failed(client) -> str:
  """Returns a sentence on the first process that has failed; "" if none has."""
  for name, reason in client.key_value_dir_get("failed/"):
    index = name.rpartition("/")[2]
    return (
      f"process {index} has ended ({reason}); when that is mended, {_AGAIN}"
    )
  return ""


def _lost(error) -> PeerError:
  """Returns the error of a process that has lost another one."""
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    if failed := _failed(_client()):
      return PeerError(failed)
  return PeerError(
    "another process has ended or cannot be reached "
    f"({first_line(error)}); {_AGAIN}"
  )


def _speak_at_abort(text):
  """Has the process say this when jax.distributed ends it.

  That calls abort() in a thread of its own, for which Python has no handler: it
  would ask for the main thread, which waits in a collective.
  """

  def speak():
    last_words.say(text)
    return PeerError.exit_code

  last_words.on(signal.SIGABRT, speak)


def _leaving_after(hook):
  """Returns an excepthook that leaves the other processes after `hook`."""

  def told(kind, error, trace):
    hook(kind, error, trace)
    leave(first_line(error), 1)

  return told
