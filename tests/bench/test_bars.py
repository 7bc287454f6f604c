"""A bar is judged by the medians of its two rows."""

import pytest

from adaptive_attention.bench import bars, cases


def row(case, run, median):
  return {"case": case, "run": run, "median_ms": median}


ROWS = [
  row("dense 2048, K 64", "ours forward", 9.0),
  row("dense 2048, K 64", "ours both", 1.2),
  row("dense 2048, K 64", "cudnn dense both", 1.0),
  row("spans 8192, K 128", "ours both", 1.0),
  row("spans 8192, K 128", "splash dense both", 3.0),
  row("spans 8192, K 128", "torch FlexAttention both", 2.0),
  row("reach 256, 8192, K 64", "ours both", 1.0),
  row("reach 256, 8192, K 64", "cudnn dense both", 0.5),
  row("reach 256, 8192, K 64", "cudnn window both", 1.0),
  row("period 4, 8192, K 64", "ours both", 1.0),
  row("no period, 8192, K 64", "ours both", 2.5),
  row("dense 8192, K 64", "ours both", 2.5),
]


def test_bars_are_judged_by_medians_of_forward_and_gradients():
  found = {(bar["case"], bar["of"]): bar for bar in bars.judged(ROWS)}
  met = {key: (bar["most"], bar["met"]) for key, bar in found.items()}
  assert met == {
    ("dense 2048, K 64", "cudnn dense"): (1.3, True),
    ("dense 8192, K 64", "cudnn dense or splash dense"): (1.3, None),
    ("spans 8192, K 128", "splash dense"): (0.25, False),
    ("spans 8192, K 128", "torch FlexAttention"): (0.8, True),
    ("reach 256, 8192, K 64", "cudnn window"): (1.0, True),
    ("period 4, 8192, K 64", "ours of no period, 8192, K 64"): (0.4, True),
  }
  assert found["dense 2048, K 64", "cudnn dense"]["times"] == pytest.approx(1.2)


def test_a_bar_is_said_in_a_line():
  lines = [bars.text(bar) for bar in bars.judged(ROWS)]
  assert lines[0].split("  ") == [
    *("dense 2048, K 64", *[""] * 4),
    " ours both 1.20 x of cudnn dense, at most 1.3: met",
  ]
  assert any("0.33 x of splash dense, at most 0.25: missed" in x for x in lines)
  assert any(
    line.startswith("dense 8192, K 64")
    and line.endswith("at most 1.3: not judged, as one of the two did not run")
    for line in lines
  )


def test_bars_are_of_cases_that_there_are():
  names = {case.name for case in cases.DEVICE_SHAPES}
  for bar in bars.BARS:
    for width in cases.DEVICE_WIDTHS:
      assert cases.on_device_name(bar.case, width) in names
      assert cases.on_device_name(bar.of or bar.case, width) in names
