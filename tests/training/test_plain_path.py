"""Checkpoints are kept in folders of any name."""

import shutil
import tempfile

import pytest

from adaptive_attention.training.checkpoint import CheckpointError, Checkpoints
from tests.training.test_checkpoint import read, save


@pytest.mark.parametrize(
  "name",
  [
    "lr[1]",
    "a*",
    "a?",
    "a**b",
    "back\\slash",
    "gs:",
    "{a,b}",
    "\udce9",
    "a\nb",
    "~",
    "$HOME",
    "%41",
    "caf\xe9",
    "-a",
    "a.",
    "x" * 255,
  ],
)
def test_folders_of_any_name(tmp_path, name):
  """A name may be a pattern, next to a folder that it would match."""
  save(tmp_path / "plain", [1], [1.0])
  (tmp_path / "plain").rename(tmp_path / name)
  shutil.copytree(tmp_path / name, tmp_path / "ab")
  before = sorted(tmp_path.iterdir())
  save(tmp_path / name, [2, 3], [3.0, 2.0], keep=1)
  for step in (1, 3):
    assert read(tmp_path / name, step)[0]["span_logit"][0] == step
  assert sorted(tmp_path.iterdir()) == before
  with Checkpoints(tmp_path / "ab") as saved:
    assert saved.steps() == [1]


def test_a_name_without_a_link_is_refused_before_anything_is_done(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  (tmp_path / "[1]").mkdir()
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "[1]"))
  with Checkpoints(tmp_path / "plain"):
    pass
  with (
    pytest.raises(CheckpointError, match="give a --workdir of letters"),
    Checkpoints(tmp_path / "lr[2]"),
  ):
    pass
  assert not list((tmp_path / "[1]").iterdir())
