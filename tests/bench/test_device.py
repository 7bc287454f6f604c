"""What an accelerator is timed on, at lengths that a CPU can do."""

import jax
import numpy as np
import pytest

from adaptive_attention.attention import reference
from adaptive_attention.bench import cases, device
from adaptive_attention.bench.cases import Case
from adaptive_attention.modes import bench

SMALL = Case("small", 96, 96, span=(8.0, 8.0), ramp=4.0, B=2, K=16)


def attentions(case):
  found = [*device._ours(case, 1 << 30), *device._dense(case, 1 << 30)]
  return {attention.name: attention for attention in found}


def test_all_compute_the_same():
  """Where masks hide nothing, and where they are a window without a ramp."""
  dense = SMALL._replace(span=None)
  q, k, v, _ = cases.inputs(dense)
  found = attentions(dense)
  assert set(found) == {"ours", "reference", "xla dense"}
  exact = found.pop("reference").run(q, k, v, None)
  for attention in found.values():
    np.testing.assert_allclose(
      attention.run(q, k, v, None), exact, atol=1e-5, err_msg=attention.name
    )
  window = SMALL._replace(span=(11.99, 11.99), ramp=0.01)
  found = attentions(window)
  assert set(found) == {"ours", "reference", "xla dense", "xla window"}
  np.testing.assert_allclose(
    found["xla window"].run(q, k, v, window.mask),
    found["ours"].run(q, k, v, window.mask),
    atol=1e-5,
  )


def test_splash_is_given_what_ours_has():
  case = Case("splash", 256, 256, span=(100.0, 100.0), ramp=28.0, K=128)
  q, k, v, _ = cases.inputs(case)
  options = dict.fromkeys(("ring", "relative_RK", "dropout_seed"))
  options |= {"memory": 0, "first_key": 0, "dropout_rate": 0.0}
  exact = reference.attend(q, k, v, None, **options)
  found = device._splash(case, None, interpret=True)(q, k, v, None)
  np.testing.assert_allclose(found, exact, atol=1e-4)


@pytest.mark.parametrize("kind", ["forward", "both"])
def test_each_round_is_made(kind):
  """Of the last round nothing is known before the one before it."""
  q, k, v, _ = cases.inputs(SMALL)
  loop = device._loop(attentions(SMALL)["ours"].run, kind)
  once = loop(1, q, k, v, SMALL.mask)
  twice, again = loop(2, q, k, v, SMALL.mask), loop(1, *once)
  for x, y in zip(jax.tree.leaves(twice), jax.tree.leaves(again), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-6)
  assert not np.allclose(twice[0], once[0])


def test_a_call_makes_as_many_rounds_as_its_row_says():
  runner = device.in_rounds(SMALL, attentions(SMALL)["ours"], "both")
  assert 1 <= runner.times <= device._MOST_ROUNDS
  runner.call()
  runner.seconds.append(1.0)
  assert runner.row()["median_ms"] == 1000 / runner.times


def test_what_would_take_too_much_is_left_out(capsys):
  long = Case("long", 8192, 8192, B=4, H=8, K=64, dtype="bfloat16")
  assert set(attentions(long)) == {"ours"}
  said = capsys.readouterr().out
  assert "long: reference is left out, as its logits alone are 8 GiB" in said
  assert "long: jax dense is left out" in said


def test_shapes_are_those_of_the_bars():
  names = {case.name for case in cases.DEVICE_SHAPES}
  for bar in device.BARS:
    for width in cases.DEVICE_WIDTHS:
      assert cases.on_device_name(bar.case, width) in names
      assert cases.on_device_name(bar.of or bar.case, width) in names
  for case in cases.DEVICE_SHAPES:
    assert case.B * case.T == 32_768
    assert case.dtype == "bfloat16"
  reach = {device.uniform_reach(case) for case in cases.DEVICE_SHAPES}
  assert reach == {0, 256, 4128}


def row(case, run, median):
  return {"case": case, "run": run, "median_ms": median}


def test_bars():
  rows = [
    row("dense 2048, K 64", "ours both", 1.2),
    row("dense 2048, K 64", "cudnn dense both", 1.0),
    row("spans 8192, K 128", "ours both", 1.0),
    row("spans 8192, K 128", "splash dense both", 3.0),
    row("period 4, 8192, K 64", "ours both", 1.0),
    row("no period, 8192, K 64", "ours both", 2.5),
    row("dense 8192, K 64", "ours both", 2.5),
  ]
  found = {(bar["case"], bar["of"]): bar for bar in device.bars(rows)}
  assert {key: bar["met"] for key, bar in found.items()} == {
    ("dense 2048, K 64", "cudnn dense"): True,
    ("spans 8192, K 128", "splash dense"): False,
    ("period 4, 8192, K 64", "ours of no period, 8192, K 64"): True,
  }
  texts = [device.bar_text(bar) for bar in found.values()]
  assert any("1.20 x of cudnn dense, at most 1.3: met" in x for x in texts)
  assert any("0.33 x of splash dense, at most 0.25: miss" in x for x in texts)


def test_a_trace_is_written(tmp_path):
  runner = device.in_rounds(SMALL, attentions(SMALL)["ours"], "forward")
  bench._profile([runner], tmp_path)
  assert list(tmp_path.rglob("*.xplane.pb"))
