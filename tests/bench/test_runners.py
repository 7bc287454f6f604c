"""What a benchmark makes of the settings that it is given."""

import pytest

from adaptive_attention.bench import cases, runners
from adaptive_attention.training import settings


@pytest.mark.parametrize("given_heads", [1, 2])
def test_a_step_has_as_many_heads_of_keys_as_of_queries(
  tiny, monkeypatch, given_heads
):
  """Whatever the settings say, of which a step takes other heads."""
  tiny.model.n_head, tiny.model.n_kv_head = 2, given_heads
  made = []
  monkeypatch.setattr(
    runners,
    "_runner_of_step",
    lambda case, name, kind, config, params: made.append(config.model),
  )
  sizes = {"n_layer": 1, "width": 64}
  case = cases.Step("small", 2, 8, (4.0,) * cases.HEADS, {"one": sizes})
  runners.of(case, settings.training_config(settings.check(tiny)))
  assert made[0].n_head == made[0].n_kv_head == cases.HEADS
