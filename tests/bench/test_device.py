"""What an accelerator is timed on, at lengths that a CPU can do."""

import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_attention.bench import cases, device, others
from adaptive_attention.bench.cases import Case

SMALL = Case("small", 96, 96, span=(8.0, 8.0), ramp=4.0, B=2, K=16)
LONG = Case("long", 8192, 8192, B=4, H=8, K=64, dtype="bfloat16")
MOST = 1 << 30


def attentions(case):
  found = [*device.ours(case, MOST), *device.of_others(case, MOST)]
  return {attention.name: attention for attention in found}


def test_all_compute_the_same():
  """Of masks that hide nothing, and of one that is a window without a ramp."""
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


def test_rows_of_ours_say_what_ran():
  """The reference computes all pairs, and `blocked` runs in its blocks."""
  found = attentions(SMALL)
  ours, exact = found["ours"].counts, found["reference"].counts
  assert ours["attention"] == "blocked in blocks of 64 x 64"
  assert exact["attention"] == "reference"
  assert exact["computed_pairs"] == SMALL.H * SMALL.T**2
  assert ours["open_pairs"] == exact["open_pairs"] < ours["computed_pairs"]


def test_runners_are_made_of_all_that_runs():
  found = device.runners(SMALL, MOST)
  assert [f"{runner.name} {runner.kind}" for runner in found] == [
    f"{name} {kind}"
    for name in ("ours", "reference", "xla dense", "xla window")
    for kind in ("forward", "both")
  ]
  for runner in found:
    assert runner.times >= 1
    runner.one_round()
    runner.seconds.append(1.0)
    assert runner.row()["median_ms"] == 1000 / runner.times


def test_what_does_not_run_is_left_out_and_said(capsys):
  """Here in tracing, in compiling for a device, and in its backward pass."""

  def refused(q, k, v, mask):
    raise NotImplementedError("no kernel for this\nand more of it")

  broken = device.Attention("broken", refused)
  cudnn = device.Attention("cudnn dense", others.of_jax("cudnn", 0))
  ours = device.Attention("ours", lambda q, k, v, mask: q + k + v)
  found = device.in_rounds(SMALL, [broken, cudnn, ours])
  assert {runner.name for runner in found} == {"ours"}
  said = capsys.readouterr().out.splitlines()
  assert (
    "small: broken forward is left out, as it does not run here (no ker"
    in (said[0])
  )
  assert [line.split(" is left out")[0] for line in said] == [
    f"small: {name} {kind}"
    for name in ("broken", "cudnn dense")
    for kind in ("forward", "both")
  ]


def test_what_would_take_too_much_is_left_out(capsys):
  assert not attentions(LONG)
  said = capsys.readouterr().out
  # 128 query blocks of each of 8 heads, and 1 to 128 key blocks of each.
  assert "long: ours is left out, as it walks 66,048 blocks in turn" in said
  assert "long: reference is left out, as its logits alone are 8 GiB" in said
  assert "long: xla dense is left out, as its logits alone are 8 GiB" in said


def test_blocks_are_those_with_an_open_pair():
  """A query block reaches its own block and so many before it."""
  spans = LONG._replace(span=(33.0,) * 8)  # reaches 65, of which 64 before
  assert device.blocks_in_turn(spans) == 8 * (2 * 128 - 1)
  assert device.blocks_in_turn(SMALL._replace(span=None)) == 2 * 3


@pytest.mark.parametrize("width", cases.DEVICE_WIDTHS)
@pytest.mark.parametrize(
  ("name", "reach"),
  {"dense 8192": 0, "spans 8192": 0, "reach 256, 8192": 256}.items(),
)
def test_there_is_a_window_where_all_reach_the_same(name, reach, width):
  name = cases.on_device_name(name, width)
  (case,) = (case for case in cases.DEVICE_SHAPES if case.name == name)
  assert others.uniform_reach(case) == reach
  backends = {
    backend: [name for name, _, _ in others.named(case, backend)]
    for backend in ("cpu", "gpu", "tpu")
  }
  kinds = ["dense", "window"] if reach else ["dense"]
  assert backends == {
    "cpu": [f"xla {kind}" for kind in kinds],
    "gpu": [f"cudnn {kind}" for kind in kinds],
    "tpu": [f"{name} {kind}" for kind in kinds for name in ("splash", "xla")],
  }


@pytest.mark.parametrize("window", [0, 100])
def test_splash_is_given_what_the_others_are(window):
  case = Case("splash", 256, 256, K=128)
  q, k, v, _ = cases.inputs(case)
  exact = others.of_jax("xla", window)(q, k, v, None)
  found = others.splash(case, window, interpret=True)(q, k, v, None)
  np.testing.assert_allclose(found, exact, atol=1e-4)


def test_cases_have_as_many_tokens():
  assert {case.B * case.T for case in cases.DEVICE_SHAPES} == {32_768}
  assert {case.dtype for case in cases.DEVICE_SHAPES} == {"bfloat16"}
  assert {case.H for case in cases.DEVICE_SHAPES} == {8}
  assert {case.K for case in cases.DEVICE_SHAPES} == {64, 128}
  assert len({case.name for case in cases.DEVICE_SHAPES}) == 16


def test_one_residue_of_the_wave_is_open():
  (case,) = (c for c in cases.DEVICE_SHAPES if c.name == "period 4, 8192, K 64")
  (plain,) = (
    c for c in cases.DEVICE_SHAPES if c.name == "no period, 8192, K 64"
  )
  assert case.span == plain.span
  short = case._replace(T=512, S=512, span=(4096.0,) * 8)
  ours = device._counts(short, device.choice.Choice("blocked", "64 x 64"))[
    "open_pairs"
  ]
  assert ours == 8 * sum(-(-(t + 1) // 4) for t in range(512))


def test_arrays_are_as_the_case_says():
  arrays = device._inputs(SMALL._replace(dtype="bfloat16"))
  assert {x.shape for x in arrays} == {(2, 96, 2, 16)}
  assert {x.dtype for x in arrays} == {jnp.dtype("bfloat16")}
  assert not np.array_equal(arrays[0], arrays[1])
