"""Queries and keys are turned as they would be in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_attention.positions import rotate


def turned(x_TK, position_T, base=10_000.0):
  """Returns x turned pair by pair, as complex numbers times exp(i angle)."""
  half = x_TK.shape[1] // 2
  out = np.zeros(x_TK.shape)
  for t, position in enumerate(position_T):
    for j in range(half):
      angle = position * base ** (-j / half)
      z = complex(x_TK[t, j], x_TK[t, j + half])
      z *= complex(np.cos(angle), np.sin(angle))
      out[t, j], out[t, j + half] = z.real, z.imag
  return out


@pytest.fixture
def vectors():
  random = np.random.default_rng(0)
  return random.standard_normal((2, 5, 3, 8)).astype(np.float32)


@pytest.mark.parametrize("start", [0, 1000, 100_000])
def test_it_turns_each_pair_by_its_angle(vectors, start):
  position_T = start + np.arange(5)
  actual = rotate(vectors, position_T)
  for b in range(2):
    for h in range(3):
      np.testing.assert_allclose(
        actual[b, :, h],
        turned(vectors[b, :, h], position_T),
        # Frequencies are rounded to 2^-32 turns, an error of half that a token.
        atol=2e-6 + 8 * np.pi * 2**-33 * start,
      )


def test_scores_depend_on_the_distance_alone(vectors):
  """Angles are exact to the bit, at the start and beyond 2^31."""
  q, k = vectors, vectors[::-1]

  def scores(start):
    position_T = (start + np.arange(5)).astype(np.uint32)
    return jnp.einsum(
      "bthk,bshk->bhts", rotate(q, position_T), rotate(k, position_T)
    )

  first = scores(0)
  for start in (2**24 + 1, 89_999_987, 2**31 - 2, 2**32 - 2):
    np.testing.assert_allclose(scores(start), first, atol=2e-5)
  # The turns do change the scores.
  assert np.abs(first - jnp.einsum("bthk,bshk->bhts", q, k)).max() > 1


def test_lengths_stay_and_bfloat16_is_turned_in_float32(vectors):
  position_T = np.arange(5)
  np.testing.assert_allclose(
    np.linalg.norm(rotate(vectors, position_T), axis=-1),
    np.linalg.norm(vectors, axis=-1),
    rtol=1e-5,
  )
  rounded = vectors.astype(jnp.bfloat16)
  actual = rotate(rounded, position_T)
  assert actual.dtype == jnp.bfloat16
  exact = rotate(rounded.astype(np.float32), position_T)
  np.testing.assert_array_equal(actual, exact.astype(jnp.bfloat16))


def test_its_gradient_turns_back(vectors):
  position_T = 7 + np.arange(5)
  _, pull = jax.vjp(lambda x: rotate(x, position_T), vectors)
  (back,) = pull(rotate(vectors, position_T))
  np.testing.assert_allclose(back, vectors, atol=1e-5)
