"""A file is replaced as a whole or left as it was."""

import pytest

from adaptive_attention.atomic_write import atomic_write
from tests.conftest import files_of_at_most


def test_who_reads_the_old_content_reads_it_to_its_end(tmp_path):
  path = tmp_path / "file"
  atomic_write(path, b"old" * 1000)
  with path.open("rb", buffering=0) as reader:
    begun = reader.read(10)
    atomic_write(path, b"new")
    assert begun + reader.read() == b"old" * 1000
  assert path.read_bytes() == b"new"


@pytest.mark.parametrize("before", [b"old", None])
def test_a_full_disk_leaves_what_was_there(tmp_path, before):
  path = tmp_path / "file"
  if before:
    path.write_bytes(before)
  with files_of_at_most(100), pytest.raises(OSError, match="File too large"):
    atomic_write(path, b"new" * 1000)
  found = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
  assert found == ({"file": before} if before else {})


def test_a_folder_in_the_way_is_left(tmp_path):
  (tmp_path / "file").mkdir()
  with pytest.raises(OSError, match="directory"):
    atomic_write(tmp_path / "file", b"new")
  assert [p.name for p in tmp_path.iterdir()] == ["file"]
