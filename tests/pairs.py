"""Parameters of tests that go through two lists."""

import pytest


def in_turn(ones, others):
  """Returns all pairs, of which each of the first is taken once by default.

  It takes one of the second after the other. The remaining pairs compile nearly
  the same again, and are asked by hand (`-m every_case`).
  """
  others = list(others)
  return [
    pytest.param(
      *(one, other),
      marks=() if j == i % len(others) else pytest.mark.every_case,
    )
    for i, one in enumerate(ones)
    for j, other in enumerate(others)
  ]
