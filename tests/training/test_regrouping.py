"""The memory of a run is made anew, and what is said of that."""

import dataclasses

import jax
import numpy as np
import pytest

from adaptive_attention.attention.head_groups import Group
from adaptive_attention.mask_parameters import with_lengths
from adaptive_attention.masks import Mask
from adaptive_attention.model import Transformer
from adaptive_attention.training import evaluator, parallel, regrouping, steps
from tests import drawn
from tests.test_state import CONFIG, T

ONE = dataclasses.replace(CONFIG, n_layer=1)


def masks(*spans):
  return [Mask(np.float32(spans), ONE.ramp)]


@pytest.mark.parametrize(
  ("spans", "said"),
  [
    # Rows are 1.2 (z + 4 + 23), 41 for 7 and 50 for 14, and of 128 bytes: a key
    # and a value of width 8 for 2 streams. 41 rows serve a reach of 18.
    ((7.0, 14.0), "10.25 KiB -> 11.38 KiB per device\n"),
    ((7.0, 15.0), "per device; 1 head(s) reach further than was held\n"),
    ((99.0, 99.0), "per device; 2 head(s) reach further than was held\n"),
  ],
)
def test_heads_that_outgrew_their_margin_are_counted(spans, said, capsys):
  before = regrouping.groups_for(masks(7.0, 7.0), ONE)
  assert before == ((Group((0, 1), 1, 1, 18, (0,)),),)
  memory = steps.start_memory(ONE, 2, before)
  after = regrouping.regrouped(memory, masks(*spans), ONE)
  out = capsys.readouterr().out
  assert out.startswith("memory     follows the spans of 1 of 1 layer(s): ")
  assert out.endswith(said)
  assert after.groups == regrouping.groups_for(masks(*spans), ONE)


def test_programs_of_other_memories_are_let_go():
  """Otherwise they would fill the memory of a long run."""
  client = jax.local_devices()[0].client
  predict = evaluator.Evaluator(Transformer(ONE), 2)
  data = np.zeros(3 * T, np.uint8)
  counts = []
  for span in (5.0, 30.0, 60.0):
    params = with_lengths(
      drawn.parameters(ONE), ONE, lambda _, x, z=span: np.full_like(x, z)
    )
    predict(parallel.replicate(params), data)
    counts.append(len(client.live_executables()))
  assert counts[2] <= counts[1]
