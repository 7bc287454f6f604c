"""main.py --mode=inspect: what heads learned, of one run and of several."""

import csv
import shutil

import pytest

from adaptive_attention.modes import inspect
from adaptive_attention.report import style
from tests.modes.test_an_older_run import OLDER
from tests.report.test_report import Page, config_of


@pytest.fixture
def run(tmp_path):
  shutil.copytree(OLDER / "run", tmp_path / "run")
  return tmp_path / "run"


def rows(run):
  with (run / "heads.csv").open(newline="") as file:
    return list(csv.DictReader(file))


def test_the_heads_of_two_runs(run, tmp_path, monkeypatch, capsys):
  other = tmp_path / "other"
  shutil.copytree(run, other)
  monkeypatch.setattr(  # it takes seconds
    style, "files", lambda figure: {f"{figure.name}.svg": b"<svg/>"}
  )
  inspect.run(config_of(run), run, step=6, compare=str(other), split="test")
  out = capsys.readouterr().out
  for name in (run, other):
    assert f"step 6 of {name}, span_wave" in out
  places = "0.0", "0.1", "1.0", "1.1"
  assert [line[:3] for line in out.splitlines()[2:6]] == [*places]
  assert "multiply-adds per token" in out and "keys read per token" in out
  assert [(r["run"], f"{r['layer']}.{r['head']}") for r in rows(run)] == [
    (str(name), place) for name in (run, other) for place in places
  ]
  assert (run / "heads.tex").read_text().count("/run & ") == 4
  assert not (other / "heads.csv").exists()
  # A page says what an older run lacks.
  page = Page((run / "report.html").read_text())
  assert page.figures == [
    *("heads", "spans", "weights", "pairs", "cost", "losses")
  ]
  for said in (
    *("has no masks.jsonl", "--mode=eval --split=test evaluates one"),
    "--inspect_bytes=N does",
  ):
    assert said in page.text and said in out


def test_chosen_heads_alone(run, capsys, monkeypatch):
  monkeypatch.setattr(inspect.whole, "_draw", lambda *_: None)
  inspect.run(config_of(run), run, step=6, heads="1.1,0.0")
  assert [(r["layer"], r["head"]) for r in rows(run)] == [
    ("0", "0"),
    ("1", "1"),
  ]
  assert "0.1 " not in capsys.readouterr().out


@pytest.mark.parametrize(
  ("flag", "said"),
  [
    ("--compare=OTHER,NONE", "NONE"),
    ("--compare=DAMAGED", "checkpoint of step 6"),
    ("--compare=RUN", "is shown already"),
    ("--compare=OTHER,", "names an empty folder"),
    ("--heads=0.2", "'0.2' is not a head of"),
    ("--heads=1", "expected LAYER.HEAD from 0.0 to 1.1"),
  ],
)
def test_nothing_is_overwritten_if_a_part_is_wrong(
  main, run, tmp_path, flag, said
):
  damaged, other = tmp_path / "damaged", tmp_path / "other"
  shutil.copytree(run, damaged)
  shutil.copytree(run, other)
  meta = damaged / "checkpoints" / "6" / "meta" / "metadata"
  meta.write_text(meta.read_text()[:-9])
  for name in ("heads.csv", "heads.tex"):
    (run / name).write_text("before")
  for word, path in (
    *(("DAMAGED", damaged), ("OTHER", other), ("RUN", run)),
    ("NONE", tmp_path / "none"),
  ):
    flag, said = flag.replace(word, str(path)), said.replace(word, str(path))
  code, _, err = main("--mode=inspect", f"--workdir={run}", flag)
  assert code in (1, 2)
  assert said in err and err.count("\n") == 1
  for name in ("heads.csv", "heads.tex"):
    assert (run / name).read_text() == "before"
