"""report.html: every figure is there, and it refers to nothing outside."""

import base64
import html.parser
import json
import shutil
import sys
import types

import numpy as np
import pytest

from adaptive_attention.modes import inspect
from adaptive_attention.report import page, points, run_figures, runs
from adaptive_attention.training import evaluator, settings
from tests.modes.test_an_older_run import OLDER

FIGURES = ["heads", "spans", "weights", "pairs", "cost", "curves"]
FIGURES += ["front", "losses", "position", "ablation", "mass", "last_query"]
VOID = {"meta", "img"}


class Page(html.parser.HTMLParser):
  """The pictures, addresses and text of a page whose tags are closed."""

  def __init__(self, text):
    super().__init__()
    self.open, self.figures, self.pictures = [], [], []
    self.addresses, self.text = [], ""
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attributes):
    values = dict(attributes)
    self.addresses += [values[n] for n in ("src", "href") if n in values]
    if tag == "img":
      self.pictures.append(values)
    if tag == "figure":
      self.figures.append(values["id"])
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data


@pytest.fixture(scope="module")
def reported(main, tmp_path_factory, text):
  """Returns what is shown of a run, that of an older one beside it.

  That is (the page at the end of training, the output of --mode=inspect, the
  folder of the run, that of the other).
  """
  from tests.conftest import ROOT, TINY

  folder = tmp_path_factory.mktemp("reported")
  flags = [
    f"--config={ROOT / 'configs' / 'base.py'}",
    f"--config.data.path={text}",
    *(f"--config.{name}={value}" for name, value in TINY.items()),
  ]
  one, other = folder / "one", folder / "a <b> & b"
  code, told, err = main(*flags, f"--workdir={one}", "--config.report=True")
  assert code == 0, err
  missing = [line for line in told.splitlines() if line.startswith("missing")]
  assert missing and max(map(len, missing)) <= 80
  at_the_end = (one / "report.html").read_text()
  assert len((one / "heads.csv").read_text().splitlines()) == 1 + 2
  assert main("--mode=eval", f"--workdir={one}")[0] == 0
  shutil.copytree(OLDER / "run", other)
  code, out, err = main(
    *("--mode=inspect", f"--workdir={one}", f"--compare={other}"),
    "--inspect_bytes=100",
  )
  assert code == 0, err
  return at_the_end, out, one, other


def test_the_page_has_all_figures_and_needs_nothing_else(reported):
  _, out, one, other = reported
  shown = Page((one / "report.html").read_text())
  assert shown.figures == FIGURES
  assert len(shown.pictures) == len(FIGURES)
  for picture in shown.pictures:
    assert len(picture["alt"]) > 20
    kind, _, content = picture["src"].partition(",")
    assert kind == "data:image/svg+xml;base64"
    svg = base64.b64decode(content).decode()
    assert svg.count("<path") > 10
  assert {a.partition(":")[0] for a in shown.addresses} == {"data"}
  record = json.loads((one / "eval_valid.json").read_text())
  for said in (
    "The masks of one",
    *("one: step 12, seed 0; a <b> & b: step 6", "model.memory_tokens"),
    "--mode=inspect",
    *(record["data"]["sha256"], f"{record['bits_per_char']:.4f}"),
  ):
    assert said in shown.text
  assert f"{len(FIGURES)} figures" in out
  assert "ablation   8 of 8, eta 0m00s" in out
  assert "attention: multiply-adds per token: dense" in out
  for line in out.splitlines():
    assert len(line) <= 80 or str(one.parent) in line, line
  assert len((one / "ablation.csv").read_text().splitlines()) == 1 + 8
  assert not (other / "report.html").exists()


def test_training_ends_with_a_page(reported):
  """Its loss is what training has measured itself."""
  at_the_end, _, one, _ = reported
  shown = Page(at_the_end)
  assert shown.figures == FIGURES[:8]
  *_, line = (json.loads(line) for line in (one / "metrics.jsonl").open())
  assert line["split"] == "valid"
  assert f"{line['bits_per_char']:.4f}{line['stderr']:.4f}499window12" in (
    shown.text.replace("\n", "")
  )
  assert "--config.report=True" in shown.text


def test_each_figure_has_three_files(reported):
  _, _, one, _ = reported
  kinds = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
  assert {path.name for path in (one / "figures").iterdir()} == {
    f"{name}.{kind}" for name in FIGURES for kind in kinds
  }
  for path in (one / "figures").iterdir():
    assert path.read_bytes().startswith(kinds[path.suffix[1:]])
    assert path.stat().st_size < 1 << 19
    if path.suffix == ".pdf":  # fonts are embedded
      assert b"/FontFile2" in path.read_bytes()


def config_of(run):
  """Returns what a mode reads of the settings of a run."""
  return types.SimpleNamespace(model=runs.read(run).config)


def test_without_matplotlib_there_are_tables(tmp_path, monkeypatch, capsys):
  shutil.copytree(OLDER / "run", tmp_path / "run")
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  inspect.run(config_of(tmp_path / "run"), tmp_path / "run", step=6)
  out = capsys.readouterr().out
  assert (
    "no figures: report.html and figures need the package matplotlib" in out
  )
  assert (tmp_path / "run" / "heads.csv").exists()
  assert not (tmp_path / "run" / "report.html").exists()


def made(name, seed, bits, coef=0.0):
  """Returns a run with an evaluation."""
  config = settings.model_config({"n_layer": 1, "attention": "span"})
  macs = {"dense": 100.0, "open": 10.0 * bits, "computed": 20.0}
  line = {
    **{"step": 3, "split": "test", "bits_per_char": bits, "stderr": 0.5},
    **{"attention_macs_per_token": macs, "bytes": 9, "protocol": "window"},
  }
  saved = {"seed": seed, "batch_size": 2, "model": {"span_coef": coef}}
  other = line | {"split": "valid", "bits_per_char": 9.0}
  lines = [line, other, line | {"step": 2, "bits_per_char": 8.0}]
  return runs.Run(name, 3, config, saved, {}, [], [], [], lines)


def test_runs_that_differ_by_seed_are_one_point():
  found = points.of_runs(
    [made("a", 0, 2.0), made("b", 0, 3.0, 0.1), made("c", 1, 2.2)], "test"
  )
  assert [point.name for point in found] == ["a, c", "b"]
  both, one = found
  np.testing.assert_allclose((both.bits, both.low, both.high), (2.1, 2.0, 2.2))
  np.testing.assert_allclose(both.stderr, 0.1)  # 0.1414 / sqrt(2)
  assert both.macs["open"] == pytest.approx(21.0)
  assert (one.bits, one.stderr, one.low, one.high) == (3.0, 0.5, 3.0, 3.0)
  assert points.of_runs([made("a", 0, 2.0)], "train") == []


def test_seeds_share_a_point_wherever_they_were_trained():
  one, other = made("a", 0, 2.0), made("b", 1, 2.0)
  here = {"report": True, "cpu_devices": 2, "bench": {"repeats": 1}}
  other.settings.update(here)
  assert len(points.of_runs([one, other], "test")) == 1
  table = page._table([one, other], ["a", "b"], "test")
  assert "<td>mean of a, b</td><td>2.0000</td><td>0.0000</td><td></td>" in table


@pytest.mark.parametrize(
  "change", [{"step": 4}, {"data": {"sha256": "another"}}], ids=str
)
def test_runs_that_were_not_measured_alike_are_no_seeds(change):
  one, other = made("a", 0, 2.0), made("b", 1, 2.0)
  assert len(points.of_runs([one, other], "test")) == 1
  for line in other.evaluations:
    line["step"] = change.get("step", line["step"])
  assert len(points.of_runs([one, other._replace(**change)], "test")) == 2


@pytest.mark.parametrize("change", [{"bytes": 8}, {"protocol": "memory"}])
def test_runs_that_read_otherwise_are_no_seeds(change):
  one, other = made("a", 0, 2.0), made("b", 1, 2.0)
  other.evaluations[0].update(change)
  assert len(points.of_runs([one, other], "test")) == 2
  front = run_figures.fronts([one, other], "test").drawn
  labels = [text.get_text() for text in front.legends[0].get_texts()]
  alike = "protocol" not in change
  assert labels == (["a", "b"] if alike else ["a (window)", "b (memory)"])


CHUNKS = np.full(3, 6.0), np.array([506.0, 506.0, 256.0])


def with_chunks(*some):
  """Returns runs that were evaluated on the same 2,500 bytes."""
  for run, bits in zip(some, CHUNKS, strict=True):
    run.evaluations[0].update(chunk_bits=list(bits), bytes=2_500)
  return some


def bars_of(front):
  """Returns (from, to) of the bar of each point, on the left."""
  lines = [bar.lines[2][0] for bar in front.drawn.axes[0].containers]
  return [tuple(line.get_segments()[0][:, 1]) for line in lines]


def test_bars_of_the_front_are_of_the_difference_from_the_first():
  one, other = with_chunks(made("a", 0, 2.0), made("b", 0, 2.5, 0.1))
  error = evaluator.standard_error(CHUNKS[1] - CHUNKS[0], 2_500)
  front = run_figures.fronts([one, other], "test")
  expected = (2.0, 2.0), (2.5 - error, 2.5 + error)
  np.testing.assert_allclose(bars_of(front), expected)
  assert "difference from a, token by token" in front.caption
  seeds = [
    made("c", seed, bits, 0.2) for seed, bits in enumerate((3, 3.5, 3.6))
  ]
  front = run_figures.fronts([one, other, *seeds], "test")
  np.testing.assert_allclose(bars_of(front), [*expected, (3.0, 3.6)])
  assert "difference" in front.caption and "several seeds" in front.caption


def test_bars_are_of_each_loss_where_one_cannot_be_compared():
  """As it read other tokens, or the first run has no point to itself."""
  one, other = with_chunks(made("a", 0, 2.0), made("b", 0, 2.5, 0.1))
  elsewhere = made("c", 0, 3.0, 0.2)
  front = run_figures.fronts([one, other, elsewhere], "test")
  np.testing.assert_allclose(bars_of(front), [(1.5, 2.5), (2, 3), (2.5, 3.5)])
  assert "difference" not in front.caption
  third, seed = with_chunks(made("c", 0, 3.0, 0.2), made("d", 1, 2.4))
  front = run_figures.fronts([one, seed, other, third], "test")
  expected = (2.0, 2.4), (2.0, 3.0), (2.5, 3.5)
  np.testing.assert_allclose(bars_of(front), expected)


def test_the_table_tells_what_runs_lose_more_than_the_first():
  """On the same tokens, with the error of the difference."""
  one, other = with_chunks(made("a", 0, 2.0), made("b", 1, 2.5))
  table = page._table([one, other], ["a", "b"], "test")
  assert "<th>more than a</th>" in table
  error = evaluator.standard_error(CHUNKS[1] - CHUNKS[0], 2_500)
  assert f"<td>+0.5000 +- {error:.4f}</td>" in table
  assert table.count(" +- ") == 1
  del one.evaluations[0]["chunk_bits"]
  assert " +- " not in page._table([one, other], ["a", "b"], "test")


def test_the_loss_of_training_stands_where_there_is_no_other():
  run = made("a", 0, 2.0)
  line = {"step": 3, "split": "valid", "bits_per_char": 4.0}
  run.metrics[:] = [line, {"step": 3, "split": "train"}]
  assert run.bits(run.evaluation("valid")) == 9.0
  run.evaluations[:] = run.evaluations[:1]
  found = run.evaluation("valid")
  assert run.bits(found) == 4.0 and found["protocol"] == "window"
  assert run.evaluation("test")["bits_per_char"] == 2.0
  assert run._replace(step=2).evaluation("valid") is None


def test_the_front_is_what_nothing_beats():
  x, y = run_figures._front([(3, 1.0), (1, 2.0), (2, 2.5), (4, 1.5)])
  assert (x, y) == ((1, 3), (2.0, 1.0))


def test_names_of_runs_are_short_where_they_can_be():
  named = [made(name, 0, 1.0) for name in ("x/a", "y/a", "x/b")]
  assert runs.labels(named) == ["x/a", "y/a", "b"]


def test_loss_by_position_is_the_mean_of_each_place():
  """Of 16 places of one token each, the last of them short of a window."""
  run = made("a", 0, 2.0)
  T = run.config.context_tokens
  place = np.arange(3 * T + T // 2) % T
  figure = run_figures.by_position(
    run, np.log(2) * (place // (T // 16)), "test"
  )
  line = figure.drawn.axes[0].lines[0]
  np.testing.assert_allclose(line.get_ydata(), np.arange(16), atol=1e-6)
  np.testing.assert_allclose(line.get_xdata(), T / 32 + T / 16 * np.arange(16))
