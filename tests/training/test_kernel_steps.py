"""Whole training steps by the Pallas kernels, interpreted on two devices."""

import numpy as np
import pytest

from adaptive_attention.attention import choice
from tests.training.test_steps import flat, train


@pytest.fixture
def interpreted(monkeypatch):
  """Lets kernels serve on a CPU, where a model cannot ask for it."""
  monkeypatch.setattr(choice, "refusal_of_device", lambda implementation: "")
  for name in ("pallas_tpu", "pallas_gpu"):
    kernel = choice.kernel(name)

    def attend(*args, interpret, attend=kernel.attend, **options):
      assert interpret is False
      return attend(*args, interpret=True, **options)

    monkeypatch.setattr(kernel, "attend", attend)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
  "kernel",
  [pytest.param("pallas_tpu", marks=pytest.mark.every_case), "pallas_gpu"],
)
def test_five_steps_are_those_of_the_reference(tiny, kernel):
  """With dropout, a segment memory, integer waves and two devices."""
  tiny.model.update(
    n_layer=1,
    context_tokens=40,
    memory_tokens=60,
    position="rotary",
    period="integer",
    harmonics=0,
    width=32,
  )
  results = []
  for implementation in ("reference", kernel):
    tiny.model.implementation = implementation
    results.append(train(tiny, 5))
  (_, expected), (_, found) = results
  for one, other in zip(found, expected, strict=True):
    for name, value in one.items():
      np.testing.assert_allclose(value, other[name], rtol=1e-5, err_msg=name)
  # Adam turns a rounding of a gradient near zero into as much as a step.
  spans = [
    value
    for (state, _) in results
    for name, value in flat(state.params).items()
    if "span_logit" in name
  ]
  np.testing.assert_allclose(*spans, atol=1e-5)
