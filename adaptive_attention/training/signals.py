"""SIGINT, SIGTERM and SIGHUP: the program ends at once, or saves first.

Python calls its handlers in the main thread, which XLA may hold for minutes
while it compiles. So another thread watches too: the number of each signal
reaches it at once, through a pipe.
"""

import contextlib
import os
import select
import signal
import threading

from adaptive_attention.errors import Error
from adaptive_attention.training import last_words

_NUMBERS = tuple(
  getattr(signal, name)
  for name in ("SIGINT", "SIGTERM", "SIGHUP")
  if hasattr(signal, name)
)
_TOGETHER_SECONDS = 0.1  # `timeout` and closing terminals send one twice
_PATIENCE_SECONDS = 0.5  # before a line says that a step is finished first


_SIGPIPE = getattr(signal, "SIGPIPE", 13)


class Stopped(Error):
  """A run was asked to end; its step is finished and saved.

  Attributes:
    exit_code: 128 + the number of a signal, as in a shell, or 1.
  """

  def __init__(self, message, exit_code):
    super().__init__(message)
    self.exit_code = exit_code


class Interrupted(BaseException):
  """A signal came when nothing was left to be saved."""


class Signals:
  """Decides what a signal does while the context lasts.

  Without `saving` the program ends at once, with one sentence. With it the
  first signal is noted and a second one ends the program.

  Args:
    saving: whether the run saves first.
    limit: seconds after which the first one ends the program too; None for
      never.

  Attributes:
    reason: what asks for the end, as "SIGTERM"; None until then.
    exit_code: 128 + the number of the signal, as in a shell, or 1.
  """

  def __init__(self, *, saving: bool, limit: float | None = None):
    self.reason = self.exit_code = None
    self._limit = limit
    self._saving = saving
    self._interrupting = False

  def __enter__(self):
    self._reading, self._writing = os.pipe()
    os.set_blocking(self._writing, False)
    self._handlers = {
      number: signal.signal(number, self._note)
      for number in _NUMBERS
      # Under nohup SIGHUP is ignored, and stays so.
      if (number, signal.getsignal(number)) != (_hangup(), signal.SIG_IGN)
    }
    self._wakeup_fd = signal.set_wakeup_fd(self._writing)
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_):
    signal.set_wakeup_fd(self._wakeup_fd)
    for number, handler in self._handlers.items():
      signal.signal(number, handler)
    os.close(self._writing)  # which ends the thread
    self._thread.join()
    os.close(self._reading)

  def stop(self, reason: str, exit_code: int):
    """Asks for the end as a signal does; only the first reason is kept."""
    if self.reason is None:
      self.reason, self.exit_code = reason, exit_code

  def stop_unheard(self, error: OSError):
    """Asks for the end as the console can no longer be written to."""
    if isinstance(error, BrokenPipeError):
      self.stop("a closed pipe", 128 + _SIGPIPE)
    else:
      self.stop(f"a failed write to the console ({error.strerror})", 1)

  def stopped(self, step: int) -> Stopped:
    """Returns the error of a run that ends after `step`, which is saved.

    If no signal came to this process, one came to another process.
    """
    return Stopped(
      f"stopped by {self.reason or 'SIGTERM'} after step {step}, which is "
      "saved; the same command goes on from there",
      self.exit_code or 128 + signal.SIGTERM,
    )

  @contextlib.contextmanager
  def interrupting(self):
    """Has a signal, also one that came before, raise Interrupted inside."""
    self._interrupting = True
    try:
      self._interrupt()
      yield
      self._interrupt()
    finally:
      self._interrupting = False

  def _note(self, number, _frame):
    self.stop(signal.Signals(number).name, 128 + number)
    self._interrupt()

  def _interrupt(self):
    if self._interrupting and self.reason is not None:
      self._interrupting = False
      raise Interrupted

  def _watch(self):
    number = self._next()
    if number and not self._saving:
      _end(number, f"stopped by {signal.Signals(number).name}")
    while number and self._next(_TOGETHER_SECONDS):
      pass
    second = number and self._next(_PATIENCE_SECONDS)
    if second == 0:
      last_words.say(
        f"{signal.Signals(number).name}: finishing the step and saving it; a "
        "second signal ends the program at once"
      )
      second = self._next(self._limit)
    if second == 0:
      _end(
        number,
        f"ended by {signal.Signals(number).name}, as the step was not finished "
        f"in {self._limit:g} s (config.stop_seconds): the other processes do "
        "not go on; the same command goes on from the newest checkpoint",
      )
    if second:
      _end(
        second,
        f"ended by a second signal, {signal.Signals(second).name}; the same "
        "command goes on from the newest checkpoint",
      )

  def _next(self, timeout=None):
    """Returns the next signal's number; 0 after `timeout`, None at the end."""
    while True:
      ready, _, _ = select.select([self._reading], [], [], timeout)
      if not ready:
        return 0
      read = os.read(self._reading, 1)
      if not read:
        return None
      if read[0] in self._handlers:  # other signals may come here too
        return read[0]


def _hangup():
  return getattr(signal, "SIGHUP", None)


def _end(number, text):
  last_words.say(text)
  os._exit(128 + number)
