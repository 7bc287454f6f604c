"""The sources of Python are the same on each machine, without its own files."""

import sysconfig

import pytest

from data import CorpusError, python_source
from tests.data.samples import sha256


def test_python_source_is_the_same_twice_and_bounded():
  first, second = python_source.load(), python_source.load()
  assert first.sha256 == second.sha256
  total = len(first.train) + len(first.valid) + len(first.test)
  assert 1_000_000 < total <= python_source.CAP_BYTES
  # The text is Python, and not tables of characters.
  assert first.train.tobytes().count(b"def ") > 5_000


def test_python_source_takes_the_library_and_no_more(tmp_path, monkeypatch):
  monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
  with pytest.raises(CorpusError, match=r"no \.py files.*data\.path") as error:
    python_source.load()
  assert "\n" not in str(error.value)
  for name in (
    "b.py",
    "a/test/c.py",
    "a/tests/c.py",
    "a/idle_test/c.py",
    "a/d.py",
    "a/test_d.py",
    "a.txt",
    "site-packages/e.py",
    "encodings/f.py",
    "config-3/g.py",
    "_sysconfigdata_x.py",
    "sitecustomize.py",
  ):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(f"# {name}".ljust(99))
  wanted = b"".join(
    f"# {n}".ljust(99).encode() + b"\n" for n in ("a/d.py", "b.py")
  )
  assert python_source.load().sha256 == sha256(wanted)
  monkeypatch.setattr(python_source, "CAP_BYTES", 150)
  assert python_source.load().sha256 == sha256(wanted[:150])
  (tmp_path / "a/d.py").unlink()
  (tmp_path / "a/d.py").symlink_to("gone")
  with pytest.raises(CorpusError, match="cannot be read"):
    python_source.load()
