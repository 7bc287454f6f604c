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
def test_five_steps_are_those_of_blocked(tiny, kernel):
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
  for implementation in ("blocked", kernel):
    tiny.model.implementation = implementation
    results.append(train(tiny, 5))
  (_, expected), (_, found) = results
  for one, other in zip(found, expected, strict=True):
    for name, value in one.items():
      np.testing.assert_allclose(value, other[name], rtol=1e-5, err_msg=name)
  parameters = [flat(state.params) for state, _ in results]
  for name, value in parameters[1].items():
    expected = parameters[0][name]
    np.testing.assert_allclose(value, expected, atol=1e-6, err_msg=name)
