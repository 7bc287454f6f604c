"""The record has complete lines, which are dropped where a run goes back."""

import json

import pytest

from adaptive_attention.training import files, logbook


def lines(path):
  return [
    json.loads(x) for x in (path / "metrics.jsonl").read_text().splitlines()
  ]


def test_lines_after_the_resumed_step_are_made_again(tiny, tmp_path):
  with logbook.Logbook(tmp_path, tiny.to_dict(), 0) as book:
    for step in (1, 2, 3, 10):
      book.write(step, "train", loss=step / 2)
      book.write_masks(step, span=[[step]])
  # A process killed in writing leaves half a line.
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 2, "sp')
  with logbook.Logbook(tmp_path, tiny.to_dict(), 2) as book:
    book.write(3, "valid", loss=0.1)
    book.write_masks(3, span=[[9]])
  assert lines(tmp_path) == [
    {"step": 1, "split": "train", "loss": 0.5},
    {"step": 2, "split": "train", "loss": 1.0},
    {"step": 3, "split": "valid", "loss": 0.1},
  ]
  rows = files.read_lines(tmp_path / "masks.jsonl")
  assert rows == [
    {"step": s, "span": [[x]]} for s, x in ((1, 1), (2, 2), (3, 9))
  ]


def test_a_record_that_is_gone_takes_no_lines(tiny, tmp_path):
  """It would, as its file is open, and nobody could read them."""
  with logbook.Logbook(tmp_path, tiny.to_dict(), 0) as book:
    book.write(1, "train", loss=1.0)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(files.WriteError, match=r"metrics.jsonl .*No such file"):
      book.write(2, "train", loss=1.0)


def test_what_is_added_stands_in_the_next_line_alone(tiny, tmp_path):
  with logbook.Logbook(tmp_path, tiny.to_dict(), 0) as book:
    book.add(save_seconds=1.0, save_bytes=2)
    book.add(save_seconds=3.0)
    book.write(1, "valid", loss=0.5)
    book.write(2, "train", loss=0.25)
  assert lines(tmp_path) == [
    {"step": 1, "split": "valid", "loss": 0.5, "save_seconds": 3.0}
    | {"save_bytes": 2},
    {"step": 2, "split": "train", "loss": 0.25},
  ]


def test_config_and_environment_are_plain_json(tiny, tmp_path):
  with logbook.Logbook(tmp_path, tiny.to_dict(), 0):
    pass
  config = json.loads((tmp_path / "config.json").read_text())
  assert config == tiny.to_dict()
  environment = json.loads((tmp_path / "environment.json").read_text())
  assert environment["devices"] == ["cpu", "cpu"]
  assert environment["commit"]


def test_every_evaluation_is_kept_and_the_last_one_of_a_split(tmp_path):
  records = [
    {"split": split, "protocol": protocol, "bits_per_char": figure}
    for split, protocol, figure in (
      ("valid", "window", 2.0),
      ("valid", "stride:16", 1.5),
      ("test", "window", 1.75),
    )
  ]
  for record in records:
    logbook.write_evaluation(tmp_path, record)
  text = (tmp_path / "evals.jsonl").read_text()
  assert [json.loads(line) for line in text.splitlines()] == records
  for split, record in (("valid", records[1]), ("test", records[2])):
    path = tmp_path / f"eval_{split}.json"
    assert json.loads(path.read_text()) == record


@pytest.mark.parametrize(
  ("before", "kept"),
  [
    ('{"a": 1}\n', [{"a": 1}]),
    ('{"a": 1}\n{"a": 2, "b', [{"a": 1}]),
    ('{"a": 1}\n{"a": 2}', [{"a": 1}, {"a": 2}]),
    ('{"a', []),
    ("", []),
  ],
)
def test_half_an_evaluation_makes_way_for_the_next(tmp_path, before, kept):
  path = tmp_path / "evals.jsonl"
  path.write_text(before)
  record = {"split": "valid"}
  logbook.write_evaluation(tmp_path, record)
  text = path.read_text()
  assert [json.loads(line) for line in text.splitlines()] == [*kept, record]
  assert text.endswith("\n")
