"""The record: whole lines, dropped where a run goes back."""

import json

import pytest

from adaptive_attention import logbook


def lines(path):
  return [
    json.loads(x) for x in (path / "metrics.jsonl").read_text().splitlines()
  ]


def test_lines_after_the_resumed_step_are_made_again(tiny, tmp_path):
  with logbook.Logbook(tmp_path, tiny, 0) as book:
    for step in (1, 2, 3, 10):
      book.write(step, "train", loss=step / 2)
  # A process killed in writing leaves half a line.
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 2, "sp')
  with logbook.Logbook(tmp_path, tiny, 2) as book:
    book.write(3, "valid", loss=0.1)
  assert lines(tmp_path) == [
    {"step": 1, "split": "train", "loss": 0.5},
    {"step": 2, "split": "train", "loss": 1.0},
    {"step": 3, "split": "valid", "loss": 0.1},
  ]


def test_config_and_environment_are_plain_json(tiny, tmp_path):
  with logbook.Logbook(tmp_path, tiny, 0):
    pass
  config = json.loads((tmp_path / "config.json").read_text())
  assert config == tiny.to_dict()
  environment = json.loads((tmp_path / "environment.json").read_text())
  assert environment["devices"] == ["cpu", "cpu"]
  assert environment["commit"]


def test_json_is_replaced_whole(tmp_path):
  path = tmp_path / "x.json"
  logbook.write_json(path, {"a": 1})
  with pytest.raises(TypeError):
    logbook.write_json(path, {"a": object()})
  assert json.loads(path.read_text()) == {"a": 1}
  assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
  ("count", "text"),
  [(0, "0 B"), (1536, "1.5 KiB"), (3 << 30, "3 GiB"), (5 << 50, "5120 TiB")],
)
def test_bytes_text(count, text):
  assert logbook.bytes_text(count) == text


@pytest.mark.parametrize(
  ("seconds", "text"), [(0, "0m00s"), (59.6, "1m00s"), (3999, "1h06m")]
)
def test_duration_text(seconds, text):
  assert logbook.duration_text(seconds) == text
