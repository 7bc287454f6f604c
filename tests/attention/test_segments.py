"""Packed sequences: no pair across segments, and no block of such pairs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_attention.attention import attend
from adaptive_attention.attention.heads_and_segments import (
  NEVER,
  Segments,
  segments_of,
)
from adaptive_attention.masks import Mask, Wave
from tests.attention.cases import Case, everywhere, inputs
from tests.attention.test_attention import compiled

INTEGER = Wave(jnp.float32([4.0, 1.0]), jnp.float32([-0.25, 0.0]), integer=True)


def arrays(B, T):
  """Returns q, k and v of two heads."""
  random = np.random.default_rng(0)
  return random.standard_normal((3, B, T, 2, 4), np.float32)


@everywhere
def test_a_segment_gives_what_it_gives_alone(implementation):
  """Its positions matter by their distances alone."""
  lengths = 37, 1, 90
  q, k, v = arrays(2, 128)
  mask = Mask(jnp.float32([20.5, 100.0]), 8.0)
  ids = np.repeat([7, -3, 7_000_000], lengths)
  run = jax.jit(functools.partial(attend, implementation=implementation))
  packed = run(q, k, v, mask, segment_ids=np.stack([ids, ids]))
  start = 0
  for n in lengths:
    part = slice(start, start + n)
    alone = run(*(x[:, part] for x in (q, k, v)), mask)
    np.testing.assert_allclose(packed[:, part], alone, atol=2e-6)
    start += n


@everywhere
def test_a_segment_may_come_back(implementation):
  """Then its later queries also attend to its earlier keys."""
  ids = np.array([[1, 1, 2, 2, 1, 3, 1]])
  mask = (ids[:, :, None] == ids[:, None]) & np.tri(7, dtype=bool)
  q, k, v = arrays(1, 7)
  run = functools.partial(
    attend, segment_ids=ids, implementation=implementation
  )
  out = jax.jit(run)(q, k, v, None)
  expected = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
  np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize(
  "wave", [pytest.param(None, marks=pytest.mark.every_case), INTEGER]
)
def test_blocks_across_segments_are_not_computed(wave):
  """Products with nan would show, also where the weights are zero."""
  T, first = 1024, 512  # whole blocks also under a stride of four
  q, k, v = arrays(2, T)
  # In the second sequence the segment begins where another does in the first.
  ids = np.repeat([[0, 1, 2], [0, 0, 1]], [256, 256, 512], axis=1)
  poisoned = k.copy(), v.copy()
  for x in poisoned:
    x[:, :first] = np.nan

  @jax.jit
  def last(k, v):
    mask = Mask(jnp.full(2, 1e4), 32.0, wave)
    return attend(q, k, v, mask, segment_ids=ids, implementation="blocked")[
      :, first:
    ]

  out, pull = jax.vjp(last, *poisoned)
  np.testing.assert_array_equal(out, last(k, v))
  for found in pull(jnp.ones_like(out)):
    assert np.isfinite(found[:, first:]).all()


def test_memory_is_linear_in_the_length():
  def temporary(T):
    case = Case("linear", T, T, (T / 2, 10.0), segments=((T // 4, T - T // 4),))
    return compiled(case, "blocked").memory_analysis().temp_size_in_bytes

  assert temporary(4096) <= 4.2 * temporary(1024)


def test_the_first_key_of_each_segment():
  query_BT = jnp.array([[5, 5, 9], [2, 3, 2]])
  key_BS = jnp.array([[1, 5, 5, 9], [2, NEVER, 2, 2]])
  first_BT = Segments(query_BT, key_BS).first_keys()
  np.testing.assert_array_equal(first_BT[0], [1, 1, 3])
  np.testing.assert_array_equal(first_BT[1, ::2], [0, 0])
  assert first_BT[1, 1] >= 4  # there is none


def test_what_the_segments_of_a_call_are():
  assert segments_of(None, None, 3) is None
  ids, key_mask = jnp.array([[1, 1, 2]]), jnp.array([[True, False, True]])
  segments = segments_of(ids, key_mask, 2)
  np.testing.assert_array_equal(segments.query_BT, [[1, 2]])
  np.testing.assert_array_equal(segments.key_BS, [[1, NEVER, 2]])
  np.testing.assert_array_equal(
    segments_of(None, key_mask, 1).key_BS, [[0, NEVER, 0]]
  )


@pytest.mark.parametrize(
  "transform",
  [jax.jit, pytest.param(jax.checkpoint, marks=pytest.mark.every_case)],
)
def test_under_transformations_as_plainly(transform):
  case = Case("plain", 70, 70, (9.5, 60.5), segments=((30, 40), (70,)), B=2)
  q, k, v, _ = inputs(case)

  def total(q, k, v, ids):
    out = attend(q, k, v, case.mask, segment_ids=ids)
    return jnp.sum(out**2)

  gradient = jax.jit(jax.grad(total, (0, 1, 2)))
  plain = gradient(q, k, v, case.segment_ids)
  found = jax.grad(transform(total), (0, 1, 2))(q, k, v, case.segment_ids)
  for one, other in zip(found, plain, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-6)
  # Two calls of other segments at once.
  ids = np.stack([case.segment_ids, 0 * case.segment_ids])
  together = jax.vmap(gradient, (None, None, None, 0))(q, k, v, ids)
  for i in range(2):
    for one, other in zip(together, gradient(q, k, v, ids[i]), strict=True):
      np.testing.assert_allclose(one[i], other, atol=1e-6)


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
@pytest.mark.parametrize(
  "hidden",
  [{"segment_ids": np.zeros((1, 8), int)}, {"key_mask": np.ones((1, 8), bool)}],
)
def test_kernels_refuse_them_by_name(implementation, hidden):
  x = np.zeros((1, 8, 1, 16), np.float32)
  with pytest.raises(NotImplementedError, match="segment_ids"):
    attend(
      *(x, x, x, None), implementation=implementation, interpret=True, **hidden
    )
