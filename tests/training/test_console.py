"""Any text is written, and a stream that fails is reported once."""

import io
import os
import subprocess
import sys

import pytest

from adaptive_attention.training import console


@pytest.mark.parametrize(
  ("encoding", "shown"),
  [
    ("ascii", "caf\\xe9 \\u20ac \\udce9"),
    ("latin-1", "caf\xe9 \\u20ac \\udce9"),
    ("utf-8", "caf\xe9 \u20ac \\udce9"),
  ],
)
def test_what_cannot_be_encoded_is_escaped(encoding, shown):
  stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
  console.write("caf\xe9 \u20ac \udce9\n", stream)
  assert stream.buffer.getvalue().decode(encoding) == shown + "\n"


def test_streams_without_an_encoding_and_none_at_all():
  stream = io.StringIO()
  console.write("caf\xe9", stream)
  assert stream.getvalue() == "caf\xe9"
  console.write("nobody reads it", None)


@pytest.fixture
def closed_pipe():
  reading, writing = os.pipe()
  os.close(reading)
  with open(writing, "w", encoding="utf-8") as stream:
    yield stream


def test_a_closed_pipe_is_reported_once(closed_pipe):
  with pytest.raises(BrokenPipeError) as error:
    console.write("a", closed_pipe)
  assert error.value.filename == closed_pipe.name
  console.write("b", closed_pipe)


def test_a_handler_gets_the_error_instead(closed_pipe):
  handled = []
  with console.failures(handled.append):
    console.write("a", closed_pipe)
    console.write("b", closed_pipe)
  assert [type(error) for error in handled] == [BrokenPipeError]


def test_the_end_of_python_has_nothing_to_flush():
  reading, writing = os.pipe()
  os.close(reading)
  code = (
    "import sys; from adaptive_attention.training import console\n"
    "try: console.write('a', sys.stdout)\n"
    "except BrokenPipeError: sys.exit(3)"
  )
  process = subprocess.run(
    [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE
  )
  os.close(writing)
  assert (process.returncode, process.stderr) == (3, b"")


@pytest.mark.parametrize(
  ("count", "text"),
  [(0, "0 B"), (1536, "1.5 KiB"), (3 << 30, "3 GiB"), (5 << 50, "5120 TiB")],
)
def test_bytes_text(count, text):
  assert console.bytes_text(count) == text


@pytest.mark.parametrize(
  ("seconds", "text"), [(0, "0m00s"), (59.6, "1m00s"), (3999, "1h06m")]
)
def test_duration_text(seconds, text):
  assert console.duration_text(seconds) == text
