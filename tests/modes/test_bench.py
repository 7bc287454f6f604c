"""The benchmark times what its rows say, and compares equal computations."""

import json

import jax
import numpy as np
import pytest

from adaptive_attention import accounting
from adaptive_attention.bench import cases, runners, timing
from adaptive_attention.config import ModelConfig
from adaptive_attention.mask_parameters import mask_params
from adaptive_attention.modes import bench
from adaptive_attention.state import Stateless
from adaptive_attention.training import (
  checkpoint,
  logbook,
  parallel,
)
from tests.training.test_steps import init_state


def only(monkeypatch, shapes=(), steps=(), decodes=()):
  monkeypatch.setattr(cases, "SHAPES", shapes)
  monkeypatch.setattr(cases, "STEPS", steps)
  monkeypatch.setattr(cases, "DECODES", decodes)


@pytest.fixture
def shapes(monkeypatch):
  spans, wave = (
    case._replace(name=name, T=128, S=128, span=(z,) * 8)
    for name, case, z in (
      ("spans", cases.SHAPES[0], 5.0),
      ("wave", cases.SHAPES[-1], 128.0),
    )
  )
  only(monkeypatch, shapes=(spans._replace(B=1), wave))


def test_a_run_leaves_a_table_and_a_record(tiny, shapes, tmp_path, capsys):
  tiny.bench.repeats = 2
  bench.run(tiny, tmp_path)
  rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
  assert [(r["case"], r["run"]) for r in rows] == [
    (case, f"{implementation} {kind}")
    for case in ("spans", "wave")
    for implementation in ("blocked", "reference")
    for kind in ("forward", "both")
  ]
  for row in rows:
    assert 0 < row["fastest_ms"] <= row["median_ms"]
    assert 0 < row["open_pairs"] < row["computed_pairs"] <= 8 * 128**2
  assert "blocked both" in capsys.readouterr().out


def test_ratios_say_what_they_are_of(tiny, shapes, tmp_path, capsys):
  tiny.bench.repeats = 1
  tiny.bench.shapes = "spans"
  bench.run(tiny, tmp_path)
  for line in capsys.readouterr().out.splitlines()[:-1]:
    assert (" x of reference " in line) == ("blocked" in line), line


def test_no_ratio_is_printed_where_nothing_else_ran(
  tiny, shapes, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(runners, "MOST_PAIRS_BYTES", 1)
  tiny.bench.repeats = 1
  tiny.bench.shapes = "spans"
  bench.run(tiny, tmp_path)
  out = capsys.readouterr().out
  assert "reference is left out" in out
  assert " x " not in out


def test_a_bench_that_is_stopped_keeps_what_it_timed(
  tiny, shapes, tmp_path, monkeypatch
):
  timed = timing.time_in_turns

  def stopped_at_the_second(runners, repeats):
    if runners[0].case == "wave":
      raise KeyboardInterrupt
    timed(runners, repeats)

  monkeypatch.setattr(timing, "time_in_turns", stopped_at_the_second)
  tiny.bench.repeats = 1
  with pytest.raises(KeyboardInterrupt):
    bench.run(tiny, tmp_path)
  rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
  assert [row["case"] for row in rows] == ["spans"] * 4


def test_rows_are_printed_before_they_are_written(
  tiny, shapes, tmp_path, capsys
):
  (tmp_path / "bench.json").mkdir()
  tiny.bench.repeats = 1
  tiny.bench.shapes = "spans"
  with pytest.raises(logbook.LogbookError, match=r"bench.json cannot be writ"):
    bench.run(tiny, tmp_path)
  assert "blocked both" in capsys.readouterr().out


def test_steps_are_timed_in_the_middle_of_their_streams(
  tiny, tmp_path, monkeypatch
):
  """The spans are those of the case, cut to the tokens that there are."""
  runs = {
    "short": {"n_layer": 1, "memory_tokens": 64, "position": "rotary"},
    "none": {"n_layer": 1, "attention": "span"},
  }
  spans = (0.0, 1.0, 5.0, 20.0, 30.0, 40.0, 60.0, 100.0)
  shape = cases.Step("small", 2, 32, spans, runs)
  only(monkeypatch, steps=(shape,))
  compiled = []
  compile_step = parallel.compile_step

  def watched(step, state, memory, batch):
    compiled.append(jax.device_get((state.params, memory)))
    return compile_step(step, state, memory, batch)

  monkeypatch.setattr(parallel, "compile_step", watched)
  tiny.bench.repeats = 1
  bench.run(tiny, tmp_path)
  rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
  assert [row["run"] for row in rows] == ["short step", "none step"]
  for (params, _), limit in zip(compiled, (64, 32)):
    config = ModelConfig(attention="span", max_span=limit)
    np.testing.assert_allclose(
      mask_params(params, config)[0].span, np.minimum(spans, limit), atol=1e-3
    )
  (_, memory), (_, none) = compiled
  assert (memory.tokens_read == 96).all()
  assert none == Stateless(1)


def test_tokens_are_timed_in_the_middle_of_texts(tiny, tmp_path, monkeypatch):
  """Keys that are read and cached are those counted for the case's spans."""
  wave = {"attention": "span_wave", "period": "integer", "harmonics": 0}
  spans = (0.0, 1.0, 5.0, 20.0, 30.0, 40.0, 60.0, 200.0)
  runs = {
    "spans": ({"n_layer": 1}, "spans", 500),
    "wave": ({"n_layer": 1} | wave, "spans", 500),
    "dense": ({"n_layer": 1}, "dense", 500),
    "context": ({"n_layer": 1}, None, 500),
  }
  shape = cases.Decode("written", 2, 256, spans, runs)
  only(monkeypatch, decodes=(shape,))
  tiny.bench.repeats = 1
  bench.run(tiny, tmp_path)
  rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
  found = {row["run"].removesuffix(" token"): row for row in rows}
  assert found.keys() == runs.keys()
  reached = sum(spans) + 8 * 32
  for name in ("spans", "wave", "dense"):
    # Some spans are a rounding above a whole number of tokens.
    assert 0 <= found[name]["reach_bytes"] / (2 * 64 * 4) - reached <= 8
  assert found["dense"]["cache_bytes"] == 8 * 256 * 2 * 64 * 4
  assert reached <= found["spans"]["keys_read"] <= 1.1 * reached
  # The longest head has 232 keys, and one in four of them is read.
  read = found["spans"]["keys_read"] - found["wave"]["keys_read"]
  assert abs(read - 232 * 3 / 4) < 0.1 * reached


def test_the_masks_of_a_run_are_taken_completely(tiny, tmp_path):
  """Spans, waves, heads and widths of each layer are those of the run."""
  state = init_state(tiny)
  with checkpoint.Checkpoints(tmp_path) as saved:
    meta = {"config": tiny.to_dict(), "data": {"name": "x", "sha256": "0"}}
    saved.save(7, state.params, state.opt_state, meta, None)
  tiny.bench.checkpoint = str(tmp_path)
  tiny.bench.repeats = 1
  bench.run(tiny, tmp_path)
  rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
  T = tiny.model.context_tokens
  layers = mask_params(state.params, ModelConfig(**tiny.model))
  for i, mask in enumerate(layers):
    found = [r for r in rows if r["case"] == f"layer {i} of step 7"]
    assert len(found) == 4
    opened = int(accounting.open_pairs(mask, T).sum())
    assert {r["open_pairs"] for r in found} == {opened}


def test_an_unknown_shape_is_named(tiny, shapes, tmp_path):
  tiny.bench.shapes = "spans;huge"
  with pytest.raises(cases.BenchmarkError, match="'huge'"):
    bench.run(tiny, tmp_path)
  assert not list(tmp_path.iterdir())


def test_torch_is_asked_for_by_name(tiny, shapes, tmp_path):
  tiny.bench.compare = "torch"
  tiny.bench.shapes = "wave"
  tiny.bench.repeats = 1
  try:
    import torch  # noqa: F401
  except ImportError:
    with pytest.raises(cases.BenchmarkError, match="pip install torch"):
      bench.run(tiny, tmp_path)
    return
  bench.run(tiny, tmp_path)
  rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
  assert any(row["run"].startswith("torch") for row in rows)
