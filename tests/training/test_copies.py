"""Copies of the metrics show a resumed run as one, and fail with a sentence."""

import shutil
import struct
import sys
import types

import pytest
from tensorboardX.proto import event_pb2

from adaptive_attention.training import copies, files, logbook
from tests.conftest import files_of_at_most


def events(path):
  """The records of a file of TensorBoard: length, checksum, event, checksum."""
  content = path.read_bytes()
  while content:
    (length,) = struct.unpack("<Q", content[:8])
    yield event_pb2.Event.FromString(content[12 : 12 + length])
    content = content[16 + length :]


def seen_by_tensorboard(folder):
  """Step -> value: a file that begins a session takes back the later steps."""
  seen = {}
  for path in sorted(folder.iterdir()):
    for event in events(path):
      if event.session_log.status == event_pb2.SessionLog.START:
        seen = {k: v for k, v in seen.items() if k < event.step}
      for value in event.summary.value:
        assert event.step not in seen
        seen[event.step] = value.simple_value
  return seen


def test_tensorboard_sees_a_resumed_run_as_one(tiny, tmp_path):
  for first, last in ((0, 5), (3, 6), (3, 4), (0, 2)):
    copied = {"copies": ("tensorboard",)}
    with logbook.Logbook(tmp_path, tiny.to_dict(), first, **copied) as book:
      for step in range(first + 1, last + 1):
        book.write(step, "train", loss=last)
    expected = {1: 5, 2: 5, 3: 5, 4: last, 5: last, 6: last}
    if first == 0:
      expected = dict.fromkeys(range(1, last + 1), last)
    assert seen_by_tensorboard(tmp_path / "tensorboard") == {
      step: value for step, value in expected.items() if step <= last
    }
  assert len(list((tmp_path / "tensorboard").iterdir())) == 4


@pytest.fixture
def wandb_calls(monkeypatch):
  """Returns the arguments that a double of wandb was started with, per call."""
  calls = []
  wandb = types.ModuleType("wandb")

  def init(**options):
    calls.append(options)
    return types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

  wandb.init = init
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID"):
    monkeypatch.delenv(name, raising=False)
  return calls


def wandb_id(calls, workdir, config):
  workdir.mkdir(parents=True, exist_ok=True)
  with logbook.Logbook(workdir, config.to_dict(), 0, copies=("wandb",)):
    return calls[-1]["id"]


def test_wandb_knows_a_run_by_an_id_of_its_workdir(tiny, tmp_path, wandb_calls):
  first = wandb_id(wandb_calls, tmp_path / "a" / "run", tiny)
  assert wandb_id(wandb_calls, tmp_path / "a" / "run", tiny) == first
  assert wandb_id(wandb_calls, tmp_path / "b" / "run", tiny) != first
  # A copy is another run, a folder that was moved is the same.
  shutil.copytree(tmp_path / "a", tmp_path / "copy")
  copied = wandb_id(wandb_calls, tmp_path / "copy" / "run", tiny)
  assert copied != first
  assert wandb_id(wandb_calls, tmp_path / "copy" / "run", tiny) == copied
  (tmp_path / "a").rename(tmp_path / "moved")
  assert wandb_id(wandb_calls, tmp_path / "moved" / "run", tiny) == first
  assert wandb_id(wandb_calls, tmp_path / "moved" / "run", tiny) == first
  (tmp_path / "moved" / "run" / "wandb.json").write_text('{"id')
  assert wandb_id(wandb_calls, tmp_path / "moved" / "run", tiny) != first
  assert {call["name"] for call in wandb_calls} == {"run"}
  assert all(call["resume"] == "allow" for call in wandb_calls)


def test_wandb_is_told_by_its_own_environment(
  tiny, tmp_path, wandb_calls, monkeypatch
):
  wandb_id(wandb_calls, tmp_path, tiny)
  assert wandb_calls[-1]["project"] == "adaptive_attention"
  monkeypatch.setenv("WANDB_PROJECT", "spans")
  monkeypatch.setenv("WANDB_NAME", "third try")
  monkeypatch.setenv("WANDB_RUN_ID", "mine")
  assert wandb_id(wandb_calls, tmp_path, tiny) == "mine"
  assert wandb_calls[-1]["project"] == "spans"
  assert wandb_calls[-1]["name"] == "third try"
  # Wandb reads these itself unless something else is given.
  assert not {"entity", "mode"} & wandb_calls[-1].keys()


def test_wandb_that_cannot_be_started_is_told(
  tiny, tmp_path, wandb_calls, monkeypatch
):
  def init(**_):
    raise RuntimeError("no API key\nconfigured.")

  monkeypatch.setattr(sys.modules["wandb"], "init", init)
  with pytest.raises(files.WriteError) as error:
    wandb_id(wandb_calls, tmp_path, tiny)
  assert "(no API key configured); run wandb login" in str(error.value)


def test_what_tensorboard_cannot_be_given_is_told(tmp_path, monkeypatch):
  monkeypatch.setattr(copies, "_FLUSH_SECONDS", -1)
  copy = copies.TensorBoard(tmp_path, 0)
  with (
    files_of_at_most(100),
    pytest.raises(files.WriteError, match=r"tensorboard cannot be written"),
  ):
    copy.write(1, {"loss": 1.0})
