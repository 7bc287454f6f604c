"""Units of losses, and how tokens are read and written."""

import math

import numpy as np
import pytest

from adaptive_attention.training import units
from adaptive_attention.training.evaluator import Result
from adaptive_attention.training.units import Numbers, Text, Units

BPE = Units("token", 4.0)
RESULT = Result(3.0, 0.01, 900, 50.0, np.array([1350.0, 1350.0]))


def test_text_is_safe_to_show():
  data = "né\ttab\nline".encode() + b"\x1b[2J\xff\x00\x7f" + "\x85".encode()
  expected = "né\ttab\nline\\x1b[2J\\xff\\x00\\x7f\\x85"
  assert Units().text_of(np.frombuffer(data, np.uint8)) == expected
  # A character may come in parts.
  part = Text()
  bytes_ = np.frombuffer(data, np.uint8)
  shown = "".join(part(bytes_[i : i + 1]) for i in range(len(bytes_)))
  assert shown + part(bytes_[:0], last=True) == expected


def test_numbers_come_in_parts():
  part = Numbers()
  shown = part(np.array([12, 3])) + part(np.array([], int)) + part([50256])
  assert shown == "12 3 50256" == BPE.text_of([12, 3, 50256])


def test_a_prompt_is_read_as_it_is_written():
  np.testing.assert_array_equal(BPE.tokens_of(b" 12 3\n50256 "), [12, 3, 50256])
  np.testing.assert_array_equal(Units().tokens_of(b"a\xff"), [97, 255])
  assert not len(BPE.tokens_of(b" \n"))
  assert (Units().draw_below, BPE.draw_below) == (256, None)
  for word in (b"def", b"-1", b"1.5", b"1234567890", b"\xff"):
    with pytest.raises(units.TokensError, match="give such numbers"):
      BPE.tokens_of(b"1 " + word)


def test_losses_have_the_names_of_their_units():
  of_text = Units().record(RESULT)
  assert of_text == {
    "bits_per_char": 3.0,
    "stderr": 0.01,
    "bytes": 900,
    "tokens_per_second": 50.0,
  }
  of_tokens = BPE.record(RESULT)
  assert (of_tokens["bits_per_token"], of_tokens["bits_per_byte"]) == (3, 0.75)
  assert of_tokens["tokens"] == 900
  assert not {"bits_per_char", "bytes"} & of_tokens.keys()
  assert "bits_per_byte" not in Units("token", None).record(RESULT)
  assert RESULT.loss == 3.0 * math.log(2)


def test_what_is_printed_names_its_unit():
  assert Units().brief(3.0, 0.01) == "bpc 3.0000 +- 0.0100"
  assert BPE.brief(3.0) == "bpt 3.0000  bpb 0.7500"
  assert Units("token", None).brief(3.0) == "bpt 3.0000"
  assert Units().full(3.0, 0.01) == "3.0000 +- 0.0100 bits per character"
  assert BPE.full(3.0, 0.01) == (
    "3.0000 +- 0.0100 bits per token, 0.7500 per byte (at 4 bytes a token), "
    "2.0794 nats per token"
  )


def test_a_record_of_the_data_gives_its_units_back():
  class Tokens:
    name, sha256, unit, bytes_per_token = "owt", "00", "token", 4.5

  class Bytes:
    name, sha256 = "enwik8", "00"

  assert units.of_record(units.source(Tokens)) == Units("token", 4.5)
  assert units.source(Bytes) == {"name": "enwik8", "sha256": "00"}
  assert units.of_record(units.source(Bytes)) == Units()
