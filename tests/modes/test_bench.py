"""The benchmark times what its rows say, and compares equal computations."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from adaptive_attention import accounting
from adaptive_attention.bench import (
  cases,
  device,
  rounds,
  runners,
  timing,
  torch,
  trained,
)
from adaptive_attention.config import ModelConfig
from adaptive_attention.mask_parameters import mask_params, with_lengths
from adaptive_attention.modes import bench
from adaptive_attention.state import Stateless
from adaptive_attention.training import (
  checkpoint,
  files,
  parallel,
  settings,
)
from tests.training.test_steps import init_state


def parts(config):
  return settings.training_config(settings.check(config))


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


@pytest.fixture
def soon(monkeypatch):
  """Attention is soon compiled, where a test is of what surrounds it."""

  def attend(q, k, v, mask, **options):
    return q + k + v

  for module in (runners, device):
    monkeypatch.setattr(module, "attend", attend)


soon_compiled = pytest.mark.usefixtures("soon")


def test_a_run_leaves_a_table_and_a_record(tiny, shapes, tmp_path, capsys):
  tiny.bench.repeats = 2
  bench.run(settings.check(tiny), tmp_path)
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


@soon_compiled
def test_ratios_say_what_they_are_of(tiny, shapes, tmp_path, capsys):
  tiny.bench.repeats = 1
  tiny.bench.shapes = "spans"
  bench.run(settings.check(tiny), tmp_path)
  for line in capsys.readouterr().out.splitlines()[:-1]:
    assert (" x of reference " in line) == ("blocked" in line), line


@soon_compiled
def test_no_ratio_is_printed_where_nothing_else_ran(
  tiny, shapes, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(runners, "MOST_PAIRS_BYTES", 1)
  tiny.bench.repeats = 1
  tiny.bench.shapes = "spans"
  bench.run(settings.check(tiny), tmp_path)
  out = capsys.readouterr().out
  assert "reference is left out" in out
  assert " x " not in out


@soon_compiled
def test_a_bench_that_is_stopped_keeps_what_it_timed(
  tiny, shapes, tmp_path, monkeypatch
):
  timed = timing.time_in_turns

  def stopped_at_the_second(runners, repeats, seconds):
    if runners[0].case == "wave":
      raise KeyboardInterrupt
    timed(runners, repeats, seconds)

  monkeypatch.setattr(timing, "time_in_turns", stopped_at_the_second)
  tiny.bench.repeats = 1
  with pytest.raises(KeyboardInterrupt):
    bench.run(settings.check(tiny), tmp_path)
  rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
  assert [row["case"] for row in rows] == ["spans"] * 4


@soon_compiled
def test_rows_are_printed_before_they_are_written(
  tiny, shapes, tmp_path, capsys
):
  (tmp_path / "bench.json").mkdir()
  tiny.bench.repeats = 1
  tiny.bench.shapes = "spans"
  with pytest.raises(files.WriteError, match=r"bench.json cannot be writ"):
    bench.run(settings.check(tiny), tmp_path)
  assert "blocked both" in capsys.readouterr().out


@pytest.mark.every_case
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
  bench.run(settings.check(tiny), tmp_path)
  rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
  assert [row["run"] for row in rows] == ["short step", "none step"]
  assert rows[0]["memory_bytes"] > rows[0]["reach_bytes"] > 0
  for (params, _), limit in zip(compiled, (64, 32)):
    config = ModelConfig(attention="span", max_span=limit)
    np.testing.assert_allclose(
      mask_params(params, config)[0].span, np.minimum(spans, limit), atol=1e-3
    )
  (_, memory), (_, none) = compiled
  assert (memory.tokens_read == 96).all()
  assert none == Stateless(1)


@pytest.mark.every_case
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
  bench.run(settings.check(tiny), tmp_path)
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
  tiny.model.position = "rotary"
  tiny.model.max_span = 12
  state = init_state(tiny)
  with checkpoint.Checkpoints(tmp_path) as saved:
    meta = {"config": tiny.to_dict(), "data": {"name": "x", "sha256": "0"}}
    saved.save(7, state.params, state.opt_state, meta, None)
  tiny.bench.checkpoint = str(tmp_path)
  tiny.bench.shapes = "layer 0 of step 7;decode 1, step 7"
  tiny.bench.repeats = 1
  bench.run(settings.check(tiny), tmp_path)
  rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
  T = tiny.model.context_tokens
  layers = mask_params(state.params, ModelConfig(**tiny.model))
  for i, mask in enumerate(layers):
    found = [r for r in rows if r["case"] == f"layer {i} of step 7"]
    assert len(found) == 4
    opened = int(accounting.open_pairs(mask, T).sum())
    assert {r["open_pairs"] for r in found} == {opened}
  # Its texts are timed with its own cache, and with a dense one.
  reach = accounting.cache_bytes(layers, ModelConfig(**tiny.model))["reach"]
  texts = {r["run"]: r for r in rows if r["case"] == "decode 1, step 7"}
  assert texts.keys() == {"spans token", "dense token"}
  for row in texts.values():
    assert row["reach_bytes"] == reach
    assert row["median_ms"] > 0
  assert texts["spans token"]["keys_read"] < texts["dense token"]["keys_read"]


def test_a_run_is_timed_beside_one_without_masks(tiny, capsys):
  """At its own context and stretched, where spans are as much longer."""
  tiny.model.max_span, tiny.model.n_layer = 12, 2
  config = ModelConfig(**tiny.model)
  params = with_lengths(
    init_state(tiny).params,
    config,
    lambda name, x: x + np.arange(2) if name == "span_logit" else x,
  )
  T = config.context_tokens
  longer_params, longer = trained.stretched(params, config, 5 * T)
  assert (longer.context_tokens, longer.max_span) == (5 * T, 60)
  assert longer_params["position_1"].shape == (5 * T, config.width)
  for before, after in zip(
    mask_params(params, config), mask_params(longer_params, longer)
  ):
    np.testing.assert_allclose(after.span, 5 * before.span, rtol=1e-6)
    np.testing.assert_array_equal(after.wave.period, before.wave.period)

  found = trained.of_run(7, params, config, 48)
  names = [f"{work}, step 7 at 48" for work in ("training", "evaluation")]
  assert [c.name for c in found] == [
    *(f"layer {i} of step 7 at 48" for i in range(2)),
    *names,
    *(f"decode {B}, step 7 at 48" for B in (1, 8)),
  ]
  for case in found[2:4]:
    assert case.B == 4096 // 48
    made = runners.of(dataclasses.replace(case, B=2), parts(tiny))
    timing.time_in_turns(made, 1)
    rows = [runner.row() for runner in made]
    assert [row["run"] for row in rows] == ["dense token", "masks token"]
    for runner, row in zip(made, rows, strict=True):
      assert row["median_ms"] == 1e3 * runner.seconds[0] / (2 * 48)


def test_texts_of_a_model_without_spans_are_timed_at_two_lengths(tiny):
  tiny.model.attention, tiny.model.position = "dense", "rotary"
  config = ModelConfig(**tiny.model)
  params = init_state(tiny).params
  one, eight = trained.texts("x", params, config)
  assert (one.B, eight.B) == (1, 8)
  learned = ModelConfig(attention="dense")
  assert trained.texts("x", {}, learned)[0].runs.keys() == {"dense 512"}
  found = {
    runner.name: runner.counts for runner in runners.of(one, parts(tiny))
  }
  T, key_bytes = config.context_tokens, 2 * config.width * 4
  assert {n: counts["cache_bytes"] for n, counts in found.items()} == {
    f"dense {T}": T * key_bytes,
    f"dense {T + 4096}": (T + 4096) * key_bytes,
  }


def test_an_unknown_shape_is_named(tiny, shapes, tmp_path):
  tiny.bench.shapes = "spans;huge"
  with pytest.raises(cases.BenchmarkError, match="'huge'"):
    bench.run(settings.check(tiny), tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_context_is_that_of_a_run(tiny, tmp_path):
  tiny.bench.context = 48
  with pytest.raises(cases.BenchmarkError, match=r"give config\.bench\.check"):
    bench.run(settings.check(tiny), tmp_path)
  assert not list(tmp_path.iterdir())


@soon_compiled
def test_torch_is_asked_for_by_name(tiny, shapes, tmp_path):
  tiny.bench.compare = "torch"
  tiny.bench.shapes = "wave"
  tiny.bench.repeats = 1
  try:
    import torch  # noqa: F401
  except ImportError:
    with pytest.raises(cases.BenchmarkError, match="pip install torch"):
      bench.run(settings.check(tiny), tmp_path)
    return
  bench.run(settings.check(tiny), tmp_path)
  rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
  assert any(row["run"].startswith("torch") for row in rows)


@pytest.fixture
def on_device(monkeypatch):
  """Lets a short case run as on a GPU, where cuDNN turns out to be missing."""
  names = ("dense 2048, K 64", "reach 256, 8192, K 64")
  small = cases.Case(names[0], 64, 64, H=2, K=16)
  reach = small._replace(name=names[1], span=(8.0, 8.0), ramp=4.0)
  monkeypatch.setattr(cases, "DEVICE_SHAPES", (small, reach))
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(rounds, "CALL_SECONDS", 1e-3)


def test_on_a_device_kernels_are_timed_beside_the_bars(
  tiny, on_device, tmp_path, capsys
):
  tiny.bench.repeats = 1
  bench.run(settings.check(tiny), tmp_path)
  record = json.loads((tmp_path / "bench.json").read_text())
  assert [(row["case"], row["run"]) for row in record["rows"]] == [
    (case.name, f"{name} {kind}")
    for case in cases.DEVICE_SHAPES
    for name in ("ours", "reference")
    for kind in ("forward", "both")
  ]
  for row in record["rows"]:
    ours = row["run"].startswith("ours")
    assert row["attention"].startswith("blocked in " if ours else "reference")
    assert row["median_ms"] > 0
  assert [(bar["case"], bar["of"], bar["met"]) for bar in record["bars"]] == [
    ("dense 2048, K 64", "cudnn dense or splash dense", None),
    ("reach 256, 8192, K 64", "cudnn window or splash window", None),
  ]
  said = capsys.readouterr().out
  assert "dense 2048, K 64: ours is blocked in blocks of 64 x 64" in said
  for name in ("dense", "window"):
    assert f"cudnn {name} both is left out, as it does not run here" in said
  assert "at most 1.3: not judged, as one of the two did not run" in said


@soon_compiled
def test_on_a_device_shapes_are_its_own(tiny, on_device, tmp_path, capsys):
  tiny.bench.repeats = 1
  tiny.bench.shapes = "512"
  with pytest.raises(cases.BenchmarkError, match=r"'512'.*'dense 2048, K 64'"):
    bench.run(settings.check(tiny), tmp_path)
  tiny.bench.shapes = "reach 256, 8192, K 64"
  bench.run(settings.check(tiny), tmp_path)
  assert "dense 2048" not in capsys.readouterr().out


def test_on_a_device_what_is_too_late_is_named(
  tiny, on_device, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(device, "SECONDS", 0.0)
  bench.run(settings.check(tiny), tmp_path)
  assert capsys.readouterr().out == (
    "left out, as no time is left of 0 s: "
    "--config.bench.shapes='dense 2048, K 64;reach 256, 8192, K 64' "
    "times them\n"
  )


@soon_compiled
def test_on_a_device_no_case_begins_that_could_end_too_late(
  tiny, on_device, tmp_path, capsys, monkeypatch
):
  """The next one is taken to be made in as long as the longest before it."""
  now, of = [0.0], runners.of

  def slow(*args, **options):
    now[0] += 200.0
    return of(*args, **options)

  clock = types.SimpleNamespace(perf_counter=lambda: now[0])
  monkeypatch.setattr(bench, "time", clock)
  monkeypatch.setattr(runners, "of", slow)
  tiny.bench.repeats = 1
  bench.run(settings.check(tiny), tmp_path)
  rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
  assert {row["case"] for row in rows} == {"dense 2048, K 64"}
  assert (
    "left out, as no time is left of 300 s: "
    "--config.bench.shapes='reach 256, 8192, K 64' times them"
  ) in capsys.readouterr().out


@soon_compiled
def test_on_a_device_the_time_bounds_the_turns(
  tiny, on_device, tmp_path, monkeypatch
):
  """The case that comes last has all that is left."""
  shares = []
  timed = timing.time_in_turns

  def watched(runners, repeats, seconds):
    shares.append(seconds)
    timed(runners, 1, seconds)

  monkeypatch.setattr(timing, "time_in_turns", watched)
  bench.run(settings.check(tiny), tmp_path)
  first, last = shares
  assert first < device.SECONDS / 2 < last < device.SECONDS


@soon_compiled
def test_on_a_device_torch_that_sees_none_is_left_out(
  tiny, on_device, tmp_path, capsys, monkeypatch
):
  cuda = types.SimpleNamespace(is_available=lambda: False)
  there = types.SimpleNamespace(cuda=cuda), None
  monkeypatch.setattr(torch, "_imported", lambda: there)
  tiny.bench.compare = "torch"
  tiny.bench.repeats = 1
  tiny.bench.shapes = "dense 2048, K 64"
  bench.run(settings.check(tiny), tmp_path)
  assert "PyTorch is left out, as it sees no GPU" in capsys.readouterr().out


@soon_compiled
def test_on_a_cpu_there_are_no_bars(tiny, shapes, tmp_path):
  tiny.bench.repeats = 1
  tiny.bench.shapes = "spans"
  bench.run(settings.check(tiny), tmp_path)
  assert "bars" not in json.loads((tmp_path / "bench.json").read_text())


@pytest.mark.every_case
def test_a_profile_has_one_round_of_each(
  tiny, on_device, tmp_path, capsys, monkeypatch
):
  """Each is named in the trace as in the table."""
  tiny.bench.profile = True
  tiny.bench.repeats = 1
  tiny.bench.shapes = "dense 2048, K 64"
  bench.run(settings.check(tiny), tmp_path)
  folder = tmp_path / "profile" / "dense_2048_K_64"
  assert f"a trace of one round of each is in {folder}" in (
    capsys.readouterr().out
  )
  (trace,) = folder.rglob("*.xplane.pb")
  for name in ("ours", "reference"):
    for kind in ("forward", "both"):
      assert f"{name} {kind}".encode() in trace.read_bytes()


def test_a_profile_calls_a_round_where_a_call_has_many(tmp_path):
  calls = []
  many = timing.Runner(
    *("case", "many", "both", lambda: calls.append("call")),
    one_round=lambda: calls.append("round"),
  )
  one = timing.Runner("case", "one", "both", lambda: calls.append("one"))
  bench._profile([many, one], tmp_path)
  assert calls == ["round", "one"] * 2  # to warm up, and for the trace


@soon_compiled
def test_without_a_profile_no_trace_is_written(tiny, shapes, tmp_path):
  tiny.bench.repeats = 1
  tiny.bench.shapes = "spans"
  bench.run(settings.check(tiny), tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
