"""What all figures share."""

import pytest

from adaptive_attention.report import style


@pytest.mark.parametrize(
  ("ends", "written"),
  [((31_000, 41_000), "40,000"), ((125.3, 130.9), "126"), ((1, 4096), "1,000")],
)
def test_numbers_of_a_logarithmic_axis_are_plain(ends, written):
  drawn, ((ax,),) = style.axes(1, 1, width=3, height=2.8)
  ax.set(yscale="log", ylim=ends)
  style.plain_log(ax.yaxis)
  drawn.canvas.draw()
  labels = [text.get_text() for text in ax.get_yticklabels(which="both")]
  shown = [label for label in labels if label]
  assert written in shown
  assert len({*shown}) == len(shown)
  assert not any("e" in label or "$" in label for label in shown)
