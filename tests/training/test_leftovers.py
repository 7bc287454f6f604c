"""What a save left half done is removed, also while threads still write it."""

import pathlib
import shutil
import threading

import pytest

from adaptive_attention.training import leftovers

REMOVES = shutil.rmtree


@pytest.fixture
def left(tmp_path):
  folder = tmp_path / "2.orbax-checkpoint-tmp" / "params" / "d"
  folder.mkdir(parents=True)
  (folder / "0").write_bytes(b"")
  return folder


def test_a_folder_to_which_a_thread_still_adds(tmp_path, left, monkeypatch):
  """The thread adds a file when the folder has been emptied, five times."""
  tries = []

  def remove_but_for_what_is_added(path):
    tries.append(path)
    for file in left.iterdir():
      file.unlink()
    if len(tries) <= 5:
      writer = threading.Thread(target=(left / "1").write_bytes, args=(b"1",))
      writer.start()
      writer.join()
      left.rmdir()
    REMOVES(path)

  monkeypatch.setattr(shutil, "rmtree", remove_but_for_what_is_added)
  leftovers.remove(tmp_path)
  assert len(tries) == 6
  assert not list(tmp_path.iterdir())


def test_one_that_is_gone_before_it_is_removed(tmp_path, left, monkeypatch):
  def gone(path):
    REMOVES(path)
    REMOVES(path)

  monkeypatch.setattr(shutil, "rmtree", gone)
  leftovers.remove(tmp_path)
  assert not list(tmp_path.iterdir())


def test_one_that_is_written_without_end_is_said(tmp_path, left, monkeypatch):
  def never(path):
    pathlib.Path(path).rmdir()

  monkeypatch.setattr(shutil, "rmtree", never)
  monkeypatch.setattr(leftovers, "_PATIENCE", 0.05)
  with pytest.raises(OSError, match="not empty"):
    leftovers.remove(tmp_path)
  assert left.exists()


def test_what_bears_no_name_of_ours_stays(tmp_path):
  for name in ("1", "2.mine", "notes.removed"):
    (tmp_path / name).mkdir()
  leftovers.set_aside(tmp_path / "1")
  leftovers.remove(tmp_path)
  assert {p.name for p in tmp_path.iterdir()} == {"2.mine", "notes.removed"}
