"""Disks that are full, read-only or gone: a sentence, and nothing is lost."""

import contextlib
import hashlib
import os
import platform
import subprocess
import sys

import pytest

from adaptive_attention.training import logbook
from adaptive_attention.training.checkpoint import CheckpointError, Checkpoints
from data import CorpusError, text_file
from tests.conftest import ROOT
from tests.modes.test_ends import before_call
from tests.modes.test_train import final, metrics, start, wait_for_step


def system(*command):
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@contextlib.contextmanager
def mounted(folder, *command):
  """Mounts something on a new folder; skips the test where that is refused."""
  folder.mkdir()
  tried = system("mount", *command, str(folder))
  if tried.returncode:
    pytest.skip(f"nothing may be mounted here: {tried.stderr.strip()}")
  try:
    yield folder
  finally:
    while os.path.ismount(folder):
      assert system("umount", "--lazy", str(folder)).returncode == 0


@pytest.fixture
def disk(tmp_path):
  """A disk of its own, with room for all."""
  with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=8m", "none") as at:
    yield at


def remount(disk, options):
  done = system("mount", "-o", f"remount,{options}", str(disk))
  assert done.returncode == 0, done.stderr


def make_read_only(disk):
  """Hides a disk under itself without the right to write, as it is in use."""
  done = system("mount", "--bind", "-o", "ro", str(disk), str(disk))
  assert done.returncode == 0, done.stderr


def take_off(disk):
  """Takes away what was mounted last."""
  assert system("umount", "--lazy", str(disk)).returncode == 0


def empty(disk):
  (disk / "filler").unlink()


def fill(disk):
  """Takes all the room that is left."""
  with contextlib.suppress(OSError), (disk / "filler").open("wb", 0) as file:
    while True:
      file.write(b"x" * 512)


def content(folder):
  """Returns the digest of each file below a folder, by its name."""
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


def one_sentence(text, *parts):
  assert text.startswith("main.py: "), text
  assert text.count("\n") == 1, text
  for part in parts:
    assert part in text


def also(*values):
  """More values of a parameter, for runs by hand."""
  return [pytest.param(x, marks=pytest.mark.every_case) for x in values]


IN_SAVE, IN_RECORD = (Checkpoints, "save", 3), (logbook.Logbook, "write", 4)


@pytest.mark.every_case
@pytest.mark.parametrize("kilobytes", [4, 16, 48, 128])
def test_a_disk_that_is_too_small(main, tiny_flags, disk, whole, kilobytes):
  """With room the same command makes the run that was to be."""
  remount(disk, f"size={kilobytes}k")
  flags = [*tiny_flags, "--config.sample_every_steps=0", f"--workdir={disk}/w"]
  code, _, err = main(*flags)
  assert code == 1
  one_sentence(err, f"{disk}/w", "No space left on device", "make room")
  remount(disk, "size=8m")
  code, _, err = main(*flags)
  assert code == 0, err
  assert final(disk / "w") == final(whole)
  assert metrics(disk / "w") == metrics(whole)
  assert not list(disk.rglob("*.part")) + list(disk.rglob("*orbax*tmp*"))


def test_a_process_that_ends_prints_a_sentence_alone(tiny_flags, disk):
  """Threads of a save that failed end as the process does, without a word."""
  remount(disk, "size=48k")
  process = start(tiny_flags, disk / "w")
  _, err = process.communicate(timeout=60)
  assert process.returncode == 1
  one_sentence(err, f"{disk}/w", "No space left on device", "make room")


FULL = fill, empty, "No space left on device"
READ_ONLY = make_read_only, take_off, "Read-only file system"


@pytest.mark.parametrize(
  ("failure", "before"),
  [
    (FULL, IN_SAVE),
    *(
      pytest.param(*case, marks=pytest.mark.every_case)
      for case in (
        (FULL, IN_RECORD),
        (READ_ONLY, IN_SAVE),
        (READ_ONLY, IN_RECORD),
      )
    ),
  ],
)
def test_a_disk_that_fails_in_a_run(
  run, whole, disk, monkeypatch, failure, before
):
  """What is saved stays, and the same command goes on from there."""
  fails, mend, said = failure
  workdir = disk / "w"
  with monkeypatch.context() as changed:
    before_call(changed, *before, lambda: fails(disk))
    with pytest.raises(CheckpointError) as error:
      run(workdir)
  message = str(error.value)
  assert (
    f"step 9 cannot be written to {workdir}/checkpoints ({said})" in message
  )
  assert "(3, 6 is kept)" in message
  mend(disk)
  with Checkpoints(workdir) as saved:
    assert saved.steps() == [3, 6]
    saved.restore_items(6)
  run(workdir)
  assert final(workdir) == final(whole)
  assert metrics(workdir) == metrics(whole)


@pytest.mark.every_case
@pytest.mark.skipif(
  (sys.platform, platform.machine()) != ("linux", "x86_64"),
  reason="system calls have other numbers",
)
@pytest.mark.parametrize("before", [IN_SAVE, IN_RECORD])
def test_a_quota_that_is_used_up(main, tiny_flags, whole, tmp_path, before):
  owner, *call = before
  flags = [*tiny_flags, "--config.sample_every_steps=0"]
  flags.append(f"--workdir={tmp_path / 'w'}")
  done = system(
    *(sys.executable, "-m", "tests.over_quota"),
    *(f"{owner.__module__}.{owner.__name__}", *map(str, call), *flags),
  )
  assert done.returncode == 1
  one_sentence(
    done.stderr,
    f"step 9 cannot be written to {tmp_path}/w/checkpoints "
    "(Disk quota exceeded)",
    "(3, 6 is kept)",
    "make room",
  )
  code, _, err = main(*flags)
  assert code == 0, err
  assert final(tmp_path / "w") == final(whole)
  assert metrics(tmp_path / "w") == metrics(whole)


@pytest.mark.parametrize("before", [IN_RECORD, *also(IN_SAVE)])
def test_a_disk_that_vanishes(run, whole, tmp_path, monkeypatch, before):
  """Nothing is written to what was under it; when it is back, it goes on."""
  (tmp_path / "real").mkdir()
  with mounted(tmp_path / "disk", "--bind", str(tmp_path / "real")) as disk:
    with monkeypatch.context() as changed:
      before_call(changed, *before, lambda: take_off(disk))
      with pytest.raises(CheckpointError) as error:
        run(disk)
    assert "is not the folder any more that the run began in" in str(
      error.value
    )
    assert list(disk.iterdir()) == []
  run(tmp_path / "real")
  assert final(tmp_path / "real") == final(whole)
  assert metrics(tmp_path / "real") == metrics(whole)


def test_copies_for_tensorboard_do_not_hold_up_a_full_disk(
  run,
  disk,
  monkeypatch,
):
  """Its writer has a thread of its own, whose end would not be noticed."""
  with monkeypatch.context() as changed:
    before_call(changed, logbook.Logbook, "write", 2, lambda: fill(disk))
    with pytest.raises(CheckpointError, match="No space left"):
      run(disk / "w", tensorboard=True, log_every_steps=1)


@pytest.mark.every_case
@pytest.mark.parametrize("full", [True, False])
def test_other_modes(main, run, disk, full):
  """Figures are printed, what was there stays, and no half file is left."""
  workdir = disk / "w"
  run(workdir)
  flags = {
    "eval": [],
    "sample": ["--prompt=a", "--tokens=2"],
    "export": [],
    "inspect": [],
  }
  (fill if full else make_read_only)(disk)
  before = content(workdir)
  for mode, more in flags.items():
    code, out, err = main(f"--mode={mode}", f"--workdir={workdir}", *more)
    if code:
      one_sentence(err, str(workdir), "cannot be written", "make room")
    assert mode != "eval" or "bits per character" in out
    assert content(workdir) == before, mode
  (empty if full else take_off)(disk)


@pytest.mark.parametrize("replaced", [False, True])
def test_data_that_change_while_they_are_read(
  run, text, tmp_path, monkeypatch, replaced
):
  """What is learned from it is not kept, unless the file is another one."""
  data = tmp_path / "data"
  data.write_bytes(text.read_bytes())

  def change():
    if replaced:
      (tmp_path / "new").write_bytes(b"other " * 4000)
      (tmp_path / "new").rename(data)
    else:
      with data.open("r+b") as file:
        file.write(b"other")

  before_call(monkeypatch, logbook.Logbook, "write", 2, change)
  corpus = text_file.load(data)
  if replaced:
    run(tmp_path / "w", corpus=corpus)
    return
  with pytest.raises(CorpusError, match=f"{data} was written to while"):
    run(tmp_path / "w", corpus=corpus)
  with Checkpoints(tmp_path / "w") as saved:
    assert saved.steps() == [3]


def test_data_that_vanish_while_they_are_read(tiny_flags, text, tmp_path):
  """A file that is mapped into memory makes no read fail."""
  data = tmp_path / "data"
  data.write_bytes(text.read_bytes() * 50)
  path = f"--config.data.path={data}"
  flags = [*tiny_flags, path, "--config.steps=1000000"]
  process = start(flags, tmp_path / "w")
  wait_for_step(tmp_path / "w", 3, process)
  os.truncate(data, 1000)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 1
  one_sentence(
    err, f"data.path={data} cannot be read any more", "bring it back"
  )
