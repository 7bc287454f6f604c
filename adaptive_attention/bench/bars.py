"""The bars: how fast our kernels must be, against other implementations."""

from typing import NamedTuple

from adaptive_attention.bench import cases

_DENSE = ("cudnn dense", "splash dense")
_WINDOW = ("cudnn window", "splash window")
_FLEX = ("torch FlexAttention",)


class Bar(NamedTuple):
  """A bar: at most so many times another median, of forward and gradients.

  Attributes:
    case: as it is named without its head width.
    others: names of runners, of which the first that ran counts.
    most: times.
    of: the case of the other without its head width, if it is another one.
  """

  case: str
  others: tuple[str, ...]
  most: float
  of: str = ""


BARS = (
  Bar("dense 2048", _DENSE, 1.3),
  Bar("dense 8192", _DENSE, 1.3),
  Bar("spans 2048", _DENSE, 0.5),
  Bar("spans 8192", _DENSE, 0.25),
  Bar("spans 2048", _FLEX, 0.8),
  Bar("spans 8192", _FLEX, 0.8),
  Bar("reach 256, 8192", _WINDOW, 1.0),
  Bar("period 4, 8192", ("ours",), 0.4, of="no period, 8192"),
)


def judged(rows: list[dict]) -> list[dict]:
  """Returns for each bar and head width whether the rows of bench.json meet it.

  Each entry has `case`, `of`, `most`, `times` and `met`. `times` is the ratio
  of two medians, of forward and all gradients together; it and `met` are None
  if one of the two did not run. Bars of cases without any row are left out.
  """
  medians = {(row["case"], row["run"]): row["median_ms"] for row in rows}
  timed = {case for case, _ in medians}
  return [
    _judged(bar, width, medians)
    for bar in BARS
    for width in cases.DEVICE_WIDTHS
    if cases.on_device_name(bar.case, width) in timed
  ]


def _judged(bar, width, medians):
  case = cases.on_device_name(bar.case, width)
  of = cases.on_device_name(bar.of or bar.case, width)
  ours = medians.get((case, "ours both"))
  ran = [name for name in bar.others if (of, f"{name} both") in medians]
  name = ran[0] if ran else " or ".join(bar.others)
  times = None
  if ours is not None and ran:
    times = ours / medians[of, f"{name} both"]
  return {
    "case": case,
    "of": f"{name} of {of}" if bar.of else name,
    "most": bar.most,
    "times": times,
    "met": None if times is None else times <= bar.most,
  }


def text(bar: dict) -> str:
  """Returns a line about a bar."""
  of, most = bar["of"], f"at most {bar['most']:g}"
  if bar["times"] is None:
    said = f"- x of {of}, {most}: not judged, as one of the two did not run"
  else:
    met = "met" if bar["met"] else "missed"
    said = f"{bar['times']:.2f} x of {of}, {most}: {met}"
  return f"{bar['case']:<26} ours both {said}"
