"""What a token is to a reader: a byte of text, or a number of a tokenizer.

It decides the units of losses, and how tokens are read and written.
"""

import codecs
import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from adaptive_attention.errors import Error
from adaptive_attention.generation import BYTES
from adaptive_attention.training.evaluator import Result


class TokensError(Error):
  """A text is not one of tokens."""


@dataclasses.dataclass(frozen=True)
class Units:
  """The units of a run's data.

  Attributes:
    unit: "byte" or "token".
    bytes_per_token: how many bytes of text a token stands for on average; None
      if that is not known.
  """

  unit: str = "byte"
  bytes_per_token: float | None = 1.0

  @property
  def is_text(self) -> bool:
    return self.unit == "byte"

  @property
  def name(self) -> str:
    """The unit of losses, as a part of a sentence."""
    return "bits per character" if self.is_text else "bits per token"

  @property
  def draw_below(self) -> int | None:
    """Which tokens generation may draw: of text bytes alone; None for all."""
    return BYTES if self.is_text else None

  def figures(self, bits: float) -> dict[str, float]:
    """Returns bits per token by the names that they have in records.

    Of text that is `bits_per_char`; else `bits_per_token`, and `bits_per_byte`
    where it is known.
    """
    if self.is_text:
      return {"bits_per_char": bits}
    found = {"bits_per_token": bits}
    if self.bytes_per_token:
      found["bits_per_byte"] = bits / self.bytes_per_token
    return found

  def record(self, result: Result) -> dict[str, float]:
    """Returns the result of an evaluation as a record names it.

    What is counted is `bytes` of text, else `tokens`.
    """
    return {
      **self.figures(result.bits),
      "stderr": result.stderr,
      f"{self.unit}s": result.tokens,
      "tokens_per_second": result.tokens_per_second,
    }

  def brief(self, bits: float, stderr: float | None = None) -> str:
    """Returns bits per token for a narrow line: "bpc 2.7132 +- 0.0295".

    `bpc`, `bpt` and `bpb` are bits per character, per token and per byte.
    """
    spread = "" if stderr is None else f" +- {stderr:.4f}"
    if self.is_text:
      return f"bpc {bits:.4f}{spread}"
    text = f"bpt {bits:.4f}{spread}"
    if self.bytes_per_token:
      text += f"  bpb {bits / self.bytes_per_token:.4f}"
    return text

  def full(self, bits: float, stderr: float) -> str:
    """Returns bits per token as a part of a sentence."""
    text = f"{bits:.4f} +- {stderr:.4f} {self.name}"
    if self.is_text:
      return text
    if self.bytes_per_token:
      text += (
        f", {bits / self.bytes_per_token:.4f} per byte (at "
        f"{self.bytes_per_token:g} bytes a token)"
      )
    return f"{text}, {bits * math.log(2):.4f} nats per token"

  def tokens_of(self, text: bytes) -> np.ndarray:
    """Returns the tokens that a user wrote: bytes, or numbers with spaces.

    Raises:
      TokensError: a word is not a number of a token.
    """
    if self.is_text:
      return np.frombuffer(text, np.uint8)
    words = text.split()
    for word in words:
      if not (word.isdigit() and len(word) <= 9):
        raise TokensError(
          f"{word.decode(errors='backslashreplace')!r} is not a token: the "
          "model was trained on numbers of a tokenizer; give such numbers with "
          "spaces between them"
        )
    return np.array(words, np.int32)

  def writer(self) -> "Text | Numbers":
    """Returns what turns tokens into text, part by part."""
    return Text() if self.is_text else Numbers()

  def text_of(self, tokens) -> str:
    """Returns tokens as text that a terminal can show.

    Raises:
      ValueError: the data are text, and a token is not a byte.
    """
    return self.writer()(np.asarray(tokens), last=True)


def of(source) -> Units:
  """Returns the units of a corpus, which are those of text if it says none."""
  return Units(
    getattr(source, "unit", "byte"), getattr(source, "bytes_per_token", 1.0)
  )


def of_record(data: Mapping) -> Units:
  """Returns the units of the data that a checkpoint's meta names."""
  return Units(data.get("unit", "byte"), data.get("bytes_per_token", 1.0))


def source(corpus) -> dict:
  """Returns what a record says of its data; `of_record` reads it."""
  data = {"name": corpus.name, "sha256": corpus.sha256}
  units = of(corpus)
  return data if units.is_text else data | dataclasses.asdict(units)


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Text:
  """Turns bytes into text that a terminal can show, part by part.

  Bytes that are not UTF-8 and control characters, but for newline and tab, are
  written as \\xNN.
  """

  def __init__(self):
    make = codecs.getincrementaldecoder("utf-8")
    self._decoder = make(errors="backslashreplace")

  def __call__(self, tokens, last=False) -> str:
    for token in tokens[(tokens < 0) | (tokens >= BYTES)][:1]:
      raise ValueError(
        f"the token {token} is not a byte; expected 0 to {BYTES - 1}; "
        f"generate(draw_below={BYTES}) draws bytes alone"
      )
    text = self._decoder.decode(bytes(tokens.astype(np.uint8)), last)
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class Numbers:
  """Turns tokens into their numbers, with a space before all but the first."""

  def __init__(self):
    self._space = ""

  def __call__(self, tokens, last=False) -> str:
    del last  # a number is complete at once
    text = ""
    for token in tokens:
      text += f"{self._space}{token}"
      self._space = " "
    return text
