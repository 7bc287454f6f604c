"""Files are replaced as a whole, and lines are added as a whole."""

import json

import pytest

from adaptive_attention.training import files
from tests.conftest import files_of_at_most


def test_json_that_cannot_be_written_leaves_the_old(tmp_path):
  path = tmp_path / "x.json"
  files.write_json(path, {"a": 1})
  with (
    files_of_at_most(100),
    pytest.raises(files.WriteError, match=r"x.json .*\(File too large\)"),
  ):
    files.write_json(path, {"a": "long" * 1000})
  assert json.loads(path.read_text()) == {"a": 1}
  assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("before", [None, b"", b'{"a": 1}\n', b'{"a": 1}'])
def test_a_line_is_added_whole_or_not_at_all(tmp_path, before):
  path = tmp_path / "x.jsonl"
  if before is not None:
    path.write_bytes(before)
  with (
    files_of_at_most(100),
    pytest.raises(files.WriteError, match=r"x.jsonl .*\(File too large\)"),
  ):
    files.append_line(path, {"b": "long" * 1000})
  assert (path.read_bytes() if path.exists() else None) == before
  files.append_line(path, {"b": 2})
  assert files.read_lines(path)[-1] == {"b": 2}
  assert path.read_bytes().endswith(b'\n{"b": 2}\n') == bool(before)


def test_a_file_that_is_open_gets_whole_lines(tmp_path):
  path = tmp_path / "x.jsonl"
  with path.open("ab", buffering=0) as file:
    files.add_line(file, {"a": 1})
    with files_of_at_most(100), pytest.raises(OSError, match="too large"):
      files.add_line(file, {"b": "long" * 1000})
    assert path.read_bytes() == b'{"a": 1}\n'
    files.add_line(file, {"c": 3})
  assert path.read_bytes() == b'{"a": 1}\n{"c": 3}\n'
