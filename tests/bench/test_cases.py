"""The cases that are timed are what their names say."""

import jax
import numpy as np
import pytest

from adaptive_attention import masks
from adaptive_attention.bench import cases, trained
from adaptive_attention.masks import Mask, Wave


def test_one_residue_is_open_under_the_wave():
  mask = cases.SHAPES[-1].mask
  opened = np.asarray(masks.is_open(mask, np.arange(128)))
  expected = np.arange(128) % 4 == 0
  np.testing.assert_array_equal(opened, [expected] * cases.HEADS)


@pytest.mark.parametrize(
  "mask",
  [
    None,
    Mask(np.float32([1.7, 30.1]), ramp=8.0),
    Mask(
      np.float32([1.7, 30.1]),
      wave=Wave(np.float32([2.3, 7.9]), np.float32([0.1, -0.2]), harmonics=5),
    ),
    Mask(
      np.float32([1.7, 30.1]),
      wave=Wave(np.float32([2, 7]), np.float32([0.1, -0.2]), integer=True),
    ),
  ],
)
def test_a_case_has_the_mask_it_was_made_of(mask):
  case = trained.case_of_mask("x", 64, mask, H=2, K=8)
  assert [x.shape for x in cases.inputs(case)] == [(1, 64, 2, 8)] * 4
  jax.tree.map(np.testing.assert_array_equal, case.mask, mask)
  # Ramp, harmonics and integer are not leaves.
  assert jax.tree.structure(case.mask) == jax.tree.structure(mask)


def test_names_choose_cases_in_their_order():
  names = [case.name for case in cases.named(cases.SHAPES, "2048;512")]
  assert names == ["512", "2048"]
  assert cases.named(cases.SHAPES, "") == list(cases.SHAPES)
  known = (*cases.SHAPES, *cases.STEPS, *cases.DECODES)
  assert len({case.name for case in known}) == len(known)
  with pytest.raises(cases.BenchmarkError, match="'huge'; expected some of"):
    cases.named(cases.SHAPES, "512;huge")
