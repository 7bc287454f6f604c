"""The console: text of any characters, and streams that may be closed."""

import contextlib
import os
import re
import sys

import jax

from adaptive_attention import accounting
from adaptive_attention.attention.choice import Choice
from adaptive_attention.config import ModelConfig

_handlers = []  # the last is the innermost


def write(text: str, stream):
  """Writes at once; what the stream cannot encode is escaped, as \\xNN.

  Raises:
    OSError: the stream cannot be written to, as a closed pipe or a file on a
      full disk. What is written from then on is dropped, so that Python does
      not fail when it flushes the stream at its end.
  """
  if stream is None:  # closed before the program began
    return
  encoding = stream.encoding or "utf-8"
  try:
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()
  except OSError as error:
    error.filename = getattr(stream, "name", "the console")
    _lead_nowhere(stream)
    if not _handlers:
      raise
    _handlers[-1](error)


def one_line(text: str) -> str:
  """Returns the text with line breaks and the like escaped, as \\n."""
  return re.sub(
    r"[\0-\x1f\x7f-\x9f\u2028\u2029]",
    lambda found: found[0].encode("unicode_escape").decode(),
    text,
  )


@contextlib.contextmanager
def failures(handle):
  """Has `write` call `handle(error)` and not raise while the context lasts."""
  _handlers.append(handle)
  try:
    yield
  finally:
    _handlers.pop()


def _lead_nowhere(stream):
  with contextlib.suppress(OSError, ValueError):  # of streams without a file
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def say(text: str):
  """Prints a line, if this is the primary process."""
  if jax.process_index() == 0:
    write(text + "\n", sys.stdout)


def write_out(text: str):
  """Prints a part of a line at once, if this is the primary process."""
  if jax.process_index() == 0:
    write(text, sys.stdout)


def bytes_text(count: float) -> str:
  """Returns a size for people to read: 1536 -> "1.5 KiB"."""
  for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
    if count < 1024 or unit == "TiB":
      return f"{count:.4g} {unit}"
    count /= 1024


def duration_text(seconds: float) -> str:
  """Returns a time for people to read: 4000 -> "1h06m"."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}h{minutes:02}m"
  return f"{minutes}m{seconds:02}s"


def step_text(step, last, numbers, bits, seconds, tokens_per_second) -> str:
  """Returns the line about a step.

  Args:
    step, last: its number, and that of the run's last step.
    numbers: its metrics.
    bits: its bits per token, as `Units.brief` writes them.
    seconds, tokens_per_second: of one step; None if no step was timed yet.
  """
  timed = ""
  if seconds is not None:
    remaining = duration_text(seconds * (last - step))
    timed = (
      f"  {1000 * seconds:.0f} ms  {tokens_per_second:,.0f} tok/s  "
      f"eta {remaining}"
    )
  return (
    f"step {step:>6} {100 * step / last:5.1f}%  "
    f"loss {numbers['loss']:.4f}  {bits}  "
    f"lr {numbers['learning_rate']:.2e}  grad {numbers['grad_norm']:.3f}  "
    f"span {numbers['span_mean']:.1f}  open {numbers['open_share']:.3f}{timed}"
  )


def macs_text(macs: dict, found: Choice) -> str:
  """Returns a line about the counts of `attention_macs_per_token`.

  Args:
    found: what computes attention.
  """
  counts = ", ".join(f"{name} {n:,.0f}" for name, n in macs.items())
  text = f"multiply-adds per token: {counts}"
  if macs["computed"] <= macs["dense"]:
    return text
  if found.blocks:
    reason = (
      f"pairs are computed in whole blocks of {found.blocks}, "
      "which matters less in a longer context"
    )
  else:
    reason = "the reference computes pairs with later keys too"
  return f"{text} (computed is more than dense, as {reason})"


def cache_text(layers, config: ModelConfig) -> str:
  """Returns a line about the bytes and the reads of the KV cache."""
  sizes = ", ".join(
    f"{name} {bytes_text(n)}"
    for name, n in accounting.cache_bytes(layers, config).items()
  )
  reads = ", ".join(
    f"{name} {n:,}"
    for name, n in accounting.cache_reads(layers, config).items()
  )
  return f"{sizes} per sequence; keys read per token: {reads}"
