"""The console: texts of any characters, and streams that nobody reads."""

import codecs
import contextlib
import os
import re
import sys

import jax
import numpy as np

from adaptive_attention import accounting
from adaptive_attention.attention import tiles
from adaptive_attention.config import ModelConfig
from adaptive_attention.generation import BYTES

_handlers = []  # the innermost one is the last


def write(text: str, stream):
  """Writes at once; what the stream cannot encode is escaped, as \\xNN.

  Raises:
    OSError: the stream takes no more, as a closed pipe or a file on a full
      disk. From then on it leads nowhere, so that Python has nothing left to
      fail with at its end.
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


@contextlib.contextmanager
def failures(handle):
  """Has `handle(error)` called where `write` would raise, while it lasts."""
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
  """Writes a line, good on a console and in a file; in the primary process."""
  if jax.process_index() == 0:
    write(text + "\n", sys.stdout)


def write_out(text: str):
  """Writes some of a line, at once; in the primary process."""
  if jax.process_index() == 0:
    write(text, sys.stdout)


def bytes_text(count: float) -> str:
  """Returns a size as a person reads it: 1536 -> "1.5 KiB"."""
  for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
    if count < 1024 or unit == "TiB":
      return f"{count:.4g} {unit}"
    count /= 1024


def duration_text(seconds: float) -> str:
  """Returns a time as a person reads it: 4000 -> "1h06m"."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}h{minutes:02}m"
  return f"{minutes}m{seconds:02}s"


def step_text(step, last, numbers, seconds, tokens_per_second) -> str:
  """Returns a line about a step.

  Args:
    step, last: which one it is, and the run's last.
    numbers: its metrics, and `bits_per_char`.
    seconds, tokens_per_second: of a step; None where none was timed yet.
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
    f"loss {numbers['loss']:.4f}  bpc {numbers['bits_per_char']:.4f}  "
    f"lr {numbers['learning_rate']:.2e}  grad {numbers['grad_norm']:.3f}  "
    f"span {numbers['span_mean']:.1f}  open {numbers['open_share']:.3f}{timed}"
  )


def macs_text(macs: dict, config: ModelConfig) -> str:
  """Returns what `attention_macs_per_token` gives, for a person to read."""
  counts = ", ".join(f"{name} {n:,.0f}" for name, n in macs.items())
  text = f"multiply-adds per token: {counts}"
  if macs["computed"] <= macs["dense"]:
    return text
  match config.implementation:
    case "reference":
      reason = "the reference computes the pairs with later keys too"
    case _:
      reason = (
        f"pairs are computed in whole blocks of {tiles.TILE} x {tiles.TILE}, "
        "of which a longer context wastes less"
      )
  return f"{text} (computed is more than dense, as {reason})"


def cache_text(layers, config: ModelConfig) -> str:
  """Returns the KV cache's sizes and reads, for a person to read."""
  sizes = ", ".join(
    f"{name} {bytes_text(n)}"
    for name, n in accounting.cache_bytes(layers, config).items()
  )
  reads = ", ".join(
    f"{name} {n:,}"
    for name, n in accounting.cache_reads(layers, config).items()
  )
  return f"{sizes} a sequence; keys read per token: {reads}"


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Text:
  """Makes bytes text that a terminal can show, as they come.

  Bytes that are not UTF-8 and control characters, but for newline and tab, are
  written as \\xNN.
  """

  def __init__(self):
    make = codecs.getincrementaldecoder("utf-8")
    self._decoder = make(errors="backslashreplace")

  def __call__(self, tokens, last=False) -> str:
    for token in tokens[(tokens < 0) | (tokens >= BYTES)][:1]:
      raise ValueError(
        f"the token {token} is not a byte; expected 0 to {BYTES - 1}, which "
        f"generate(draw_below={BYTES}) draws alone"
      )
    text = self._decoder.decode(bytes(tokens.astype(np.uint8)), last)
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def text_of(tokens) -> str:
  """Returns all of some tokens as text that a terminal can show.

  Raises:
    ValueError: a token that is not a byte.
  """
  return Text()(np.asarray(tokens), last=True)
