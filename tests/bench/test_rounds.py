"""Each round of a loop is made, and a call has as many as are wanted."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_attention.attention import attend
from adaptive_attention.bench import cases, rounds
from adaptive_attention.bench.cases import Case

SMALL = Case("small", 96, 96, span=(8.0, 8.0), ramp=4.0, B=2, K=16)
both_kinds = pytest.mark.parametrize("kind", ["forward", "both"])


def arrays():
  return *cases.inputs(SMALL), SMALL.mask


def run(q, k, v, mask):
  return attend(q, k, v, mask, implementation="reference")


@both_kinds
def test_rounds_go_on_from_each_other(kind):
  loop = rounds.loop(run, kind)
  q, k, v, dout, mask = arrays()
  once = loop(1, q, k, v, dout, mask)
  twice = loop(2, q, k, v, dout, mask)
  again = loop(1, *once[:3], dout, once[3])
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), twice, again
  )
  assert not np.allclose(twice[0], once[0])


@both_kinds
def test_a_round_gives_what_the_work_gives(kind):
  q, k, v, dout, mask = arrays()
  out, pull = jax.vjp(run, q, k, v, mask)
  dq, dk, dv, _ = pull(dout)
  found = rounds.loop(run, kind)(1, q, k, v, dout, mask)
  wanted = dq if kind == "both" else out
  np.testing.assert_allclose(found[0], wanted, atol=1e-5)
  if kind == "both":
    for x, y in zip(found[4], (out, dk, dv), strict=True):
      np.testing.assert_allclose(x, y, atol=1e-5)
  for x, y in zip(found[1:3], (k, v), strict=True):  # all but one stay
    assert (np.asarray(x) != np.asarray(y)).sum() == 1
  np.testing.assert_array_equal(found[3].span, mask.span)


def test_numbers_stay_finite_over_many_rounds():
  """Gradients that became keys would grow, and inf is another work load."""
  found = rounds.loop(run, "both")(rounds.MOST_ROUNDS, *arrays())
  for x in jax.tree.leaves(found):
    assert np.isfinite(x).all()
  assert np.std(found[0]) > 1e-3


@both_kinds
def test_nothing_is_moved_out_of_the_loop(kind):
  """Not even what depends on keys, values or spans alone.

  Each is marked by a function that the compiler keeps for itself.
  """

  def marked(q, k, v, mask):
    k, v, span = jnp.cbrt(k), jnp.arctan(v), jnp.log1p(mask.span)
    out = run(q, k, v, mask)
    return out + span[None, None, :, None]

  compiled = rounds.loop(marked, kind).lower(1, *arrays()).compile()
  computations = re.split(r"\n(?=\S)", compiled.as_text())
  (entry,) = (text for text in computations if text.startswith("ENTRY"))
  assert " while(" in entry
  whole = compiled.as_text()
  # Positive controls: the marks are there, and a dot product is.
  for mark in ("cbrt", "atan", "log-plus-one|log1p"):
    assert re.search(mark, whole), mark
  called = set(re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", entry))
  outside = [entry] + [
    text for text in computations if text.split(" ")[0].lstrip("%") in called
  ]
  for mark in ("cbrt", "atan", "log-plus-one|log1p", r"\bdot\("):
    assert not any(re.search(mark, text) for text in outside), mark


@pytest.mark.parametrize(
  ("round_seconds", "beside", "wanted"),
  [(1e-3, 0.0, 50), (1e-3, 2e-3, 48), (0.2, 0.0, 1), (1e-9, 1e-9, 1000)],
)
def test_rounds_take_about_as_long_as_a_call(round_seconds, beside, wanted):
  found = rounds.rounds_for(lambda count: beside + count * round_seconds)
  assert abs(found - wanted) <= 0.1 * wanted
