"""The formulas of the masks and their gradients agree with the oracle."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_attention import masks
from adaptive_attention.mask_parameters import to_length
from adaptive_attention.masks import Mask, Wave
from tests import oracle

# No distance here comes nearer than 1e-3 to where a slope jumps.
SPAN = (0.25, 11.5, 31.75, 90.25, 1e6)
PERIOD = (2.013, 3.307, 4.61, 6.191, 7.987)
RATIO = (-0.25, 0.071, 0.25, -0.047, 0.0)
DISTANCE = range(64)
KINDS = tuple(itertools.product((None, 5), (False, True)))
EPSILON = np.finfo(np.float32).eps

# The tests take half the time with functions that are compiled whole.
span_weight = jax.jit(masks.span_weight, static_argnums=2)
triangle_wave = jax.jit(masks.triangle_wave, static_argnums=2)
wave_weight = jax.jit(masks.wave_weight)
is_open = jax.jit(masks.is_open)
log_weight = jax.jit(masks.log_weight)
open_share = jax.jit(masks.open_share, static_argnums=1)
open_fraction = jax.jit(masks.open_fraction)
penalty_and_gradient = jax.jit(jax.value_and_grad(masks.penalty))


def both(span, ramp, period=None, ratio=None, harmonics=None, integer=False):
  """Returns (our mask, the oracle's mask) of the same float32 numbers."""
  span, period, ratio = (
    None if x is None else np.array(x, np.float32)
    for x in (span, period, ratio)
  )
  wave = None
  if period is not None:
    wave = Wave(period, ratio, harmonics=harmonics, integer=integer)
  return (
    Mask(span, ramp=ramp, wave=wave),
    oracle.Mask(span, ramp, period, ratio, harmonics, integer),
  )


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def pair(request):
  """Returns (our mask, the oracle's mask) with a wave of every kind."""
  return both(SPAN, 32.0, PERIOD, RATIO, *request.param)


def table(function, heads, distances):
  """Returns (H, d, ...) the values of function(h, d)."""
  return np.array([[function(h, d) for d in distances] for h in range(heads)])


def slopes(function, mask):
  """Returns (H, d, 3) the slopes of function(mask), (H, d), by z, P and r.

  A head's values must depend on its own z, P and r alone.
  """
  jacobian = jax.jit(jax.jacobian(function))(mask)
  heads = range(len(mask.span))
  parts = [jacobian.span]
  if mask.wave is not None:
    parts += [jacobian.wave.period, jacobian.wave.ratio]
  for part in parts:
    for h, other in itertools.permutations(heads, 2):
      np.testing.assert_array_equal(part[h, :, other], 0)
  return np.stack(
    [np.array([part[h, :, h] for h in heads]) for part in parts], axis=-1
  )


def test_span_weight():
  mask, exact = both((0.0, *SPAN[1:]), 32.0)
  expected = table(lambda h, d: oracle.weights(exact, h, d)[0], 5, range(200))
  actual = span_weight(np.arange(200), mask.span, mask.ramp)
  np.testing.assert_allclose(actual, expected, atol=4 * EPSILON)


@pytest.mark.parametrize("ramp", [0.25, 1.0, 3.0, 100.0])
def test_span_weight_of_other_ramps(ramp):
  span = np.array([0.0, 2.5, 40.125], np.float32)
  actual = span_weight(np.arange(160), span, ramp)
  expected = table(
    lambda h, d: oracle.span_weight(d, float(span[h]), ramp), 3, range(160)
  )
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("harmonics", [None, 1, 2, 5, 9])
def test_triangle_wave(harmonics):
  period = np.array(PERIOD, np.float32)
  actual = triangle_wave(np.arange(64), period, harmonics)
  expected = table(
    lambda h, d: oracle.triangle(d, float(period[h]), harmonics), 5, DISTANCE
  )
  np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_the_series_tends_to_the_exact_wave():
  period = np.array(PERIOD, np.float32)
  exact = triangle_wave(np.arange(64), period)
  # The rest of the series is at most 2 P / pi^2 sum 1/k^2 < P / 5K.
  for harmonics in (9, 99):
    series = triangle_wave(np.arange(64), period, harmonics)
    assert np.abs(series - exact).max() < 8 / (5 * harmonics)


def test_wave_weight(pair):
  mask, exact = pair
  expected = table(lambda h, d: oracle.weights(exact, h, d)[1], 5, DISTANCE)
  actual = wave_weight(np.arange(64), mask.wave)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("harmonics", [None, 5])
def test_a_wave_keeps_its_phase_at_far_distances(harmonics, jit):
  """By d = 8191 a wave of period 2 has turned 4096 times.

  The distance from d to the nearest crest is a float32 number or nearly so, and
  can be computed without loss. What remains is the rounding of tri itself and
  of the angles 2 pi k rest / P, at most 5 pi.
  """
  distance = np.arange(8000, 8192)
  period = np.linspace(2, 8, 40, dtype=np.float32)[1:] - np.float32(0.0123)
  function = triangle_wave if jit else masks.triangle_wave
  expected = table(
    lambda h, d: oracle.triangle(d, float(period[h]), harmonics),
    len(period),
    distance,
  )
  actual = function(distance, period, harmonics)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_a_span_keeps_its_end_at_far_distances():
  span = np.array([8000.377, 8190.123], np.float32)
  distance = np.arange(7990, 8240)
  expected = table(
    lambda h, d: oracle.span_weight(d, float(span[h]), 32.0), 2, distance
  )
  # z + R may be rounded once, to half a unit in the last place of 8222.
  np.testing.assert_allclose(
    span_weight(distance, span, 32.0), expected, rtol=0, atol=2**-11 / 32
  )


def test_open_pairs_and_their_log_weight(pair):
  mask, exact = pair
  expected = table(lambda h, d: oracle.is_open(exact, h, d), 5, range(160))
  assert 0 < expected.mean() < 1
  actual = is_open(mask, np.arange(160))
  assert actual.dtype == bool
  np.testing.assert_array_equal(actual, expected)
  log = log_weight(mask, np.arange(160))
  assert log.dtype == jnp.float32
  np.testing.assert_array_equal(log == -np.inf, ~expected)
  product = table(
    lambda h, d: math.prod(oracle.weights(exact, h, d)), 5, range(160)
  )
  np.testing.assert_allclose(np.exp(log), product * expected, atol=1e-5)


def test_a_weight_of_a_millionth_is_hidden():
  # At d = 2 and P = 4 the wave's weight is 4 r - 1/2: it is made `weight`.
  weight = np.array([0.0, 0.9e-6, 1.2e-6, 1e-4])
  mask, exact = both([9.0] * 4, 4.0, [4.0] * 4, 0.125 + weight / 4)
  assert [oracle.is_open(exact, h, 2) for h in range(4)] == [0, 0, 1, 1]
  assert is_open(mask, 2).tolist() == [0, 0, 1, 1]
  log = log_weight(mask, 2)
  assert (log[:2] == -np.inf).all()
  # float32 resolves 1e-6 beside 1/2 to 6e-8.
  np.testing.assert_allclose(np.exp(log[2:]), weight[2:], rtol=0, atol=6e-8)


@pytest.mark.parametrize("shape", [(), (2, 1, 5)])
def test_a_distance_of_any_shape(shape):
  mask, _ = both(SPAN, 32.0, PERIOD, RATIO)
  distance = np.arange(math.prod(shape)).reshape(shape)
  for function in (
    log_weight,
    is_open,
    lambda mask, d: span_weight(d, mask.span, mask.ramp),
    lambda mask, d: wave_weight(d, mask.wave),
    lambda mask, d: triangle_wave(d, mask.wave.period),
  ):
    result = function(mask, distance)
    assert result.shape == (5, *shape)
    flat = function(mask, distance.ravel())
    np.testing.assert_array_equal(result, flat.reshape(result.shape))


def test_slopes_of_the_oracle_by_finite_differences():
  for harmonics in (None, 1, 5):
    _, exact = both(SPAN, 32.0, PERIOD, RATIO, harmonics)
    assert oracle.tie_margin(exact, DISTANCE) > 1e-3
    for h, d in itertools.product(range(4), DISTANCE):
      span, period, _, ratio = exact.head(h)

      def weight(x, d=d, harmonics=harmonics):
        return oracle.wave_weight(d, x[0], x[1], harmonics)

      def logarithm(x, d=d, harmonics=harmonics):
        mask = oracle.Mask((x[0],), 32.0, (x[1],), (x[2],), harmonics)
        return oracle.log_weight(mask, 0, d)

      def still(x, d=d, period=period, harmonics=harmonics):
        return oracle.clip(
          oracle.unclipped_wave(d, period, x[0], x[1], harmonics)
        )

      np.testing.assert_allclose(
        oracle.wave_slopes(d, period, ratio, harmonics, False),
        oracle.finite_difference(weight, [period, ratio]),
        atol=1e-6,
      )
      # An integer period moves the height of the wave, and not its phase.
      np.testing.assert_allclose(
        oracle.wave_slopes(d, period, ratio, harmonics, True),
        oracle.finite_difference(still, [period, ratio]),
        atol=1e-6,
      )
      if oracle.is_open(exact, h, d):
        np.testing.assert_allclose(
          oracle.log_weight_slopes(exact, h, d),
          oracle.finite_difference(logarithm, [span, period, ratio]),
          rtol=1e-4,
          atol=1e-6,
        )


def test_gradients_of_span_weight():
  mask, exact = both(SPAN, 32.0)
  actual = slopes(
    lambda mask: span_weight(np.arange(64), mask.span, mask.ramp), mask
  )
  raw = table(lambda h, d: 1 + (exact.span[h] - d) / 32, 5, DISTANCE)
  inside = (raw >= 0) & (raw <= 1)
  np.testing.assert_allclose(actual[..., 0], inside / 32, atol=1e-8)


def test_gradients_of_wave_weight(pair):
  mask, exact = pair
  actual = slopes(lambda mask: wave_weight(np.arange(64), mask.wave), mask)

  def expected(h, d):
    _, period, _, ratio = exact.head(h)
    return oracle.wave_slopes(d, period, ratio, exact.harmonics, exact.integer)

  np.testing.assert_array_equal(actual[..., 0], 0)
  np.testing.assert_allclose(
    actual[..., 1:], table(expected, 5, DISTANCE), rtol=1e-4, atol=1e-4
  )


def finite_log_weight(mask, distance):
  log = log_weight(mask, distance)
  return jnp.where(log > -jnp.inf, log, 0.0)


def test_gradients_of_log_weight(pair):
  mask, exact = pair
  actual = slopes(lambda mask: finite_log_weight(mask, np.arange(64)), mask)
  expected = table(
    lambda h, d: oracle.log_weight_slopes(exact, h, d), 5, DISTANCE
  )
  np.testing.assert_array_equal(actual == 0, expected == 0)
  # An error of 1e-5 in w, as above, changes the slope by a share of 1e-5 / w.
  w = table(lambda h, d: max(oracle.weights(exact, h, d)[1], 1e-3), 5, DISTANCE)
  bound = 1e-4 + (1e-4 + 1e-5 / w[..., None]) * np.abs(expected)
  error = np.abs(actual - expected)
  assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize("harmonics", [None, 5])
def test_a_rounded_period_passes_its_gradient_through(harmonics):
  distance = np.arange(400)
  ratio = np.array([0.1, -0.1, 0.01], np.float32)
  near = np.array([2.6, 4.45, 7.2], np.float32)
  whole = np.array([3.0, 4.0, 7.0], np.float32)

  def weight(period, integer):
    wave = Wave(period, ratio, harmonics=harmonics, integer=integer)
    return wave_weight(distance, wave)

  by_its_period = jax.jit(jax.jacobian(weight), static_argnums=1)
  rounded = weight(near, True)
  np.testing.assert_array_equal(rounded, weight(whole, True))
  np.testing.assert_array_equal(rounded, weight(whole, False))
  by_period = by_its_period(near, True).sum(-1)
  np.testing.assert_array_equal(by_period, by_its_period(whole, True).sum(-1))
  # It is the same in every period of the wave: no term grows with the distance.
  for h, period in enumerate((3, 4, 7)):
    np.testing.assert_allclose(
      by_period[h, period:], by_period[h, :-period], atol=1e-5
    )
  if harmonics is None:
    inside = (rounded > 0) & (rounded < 1)
    expected = np.where(inside, 0.25 + ratio[:, None], 0)
    np.testing.assert_allclose(by_period, expected, atol=1e-6)
  # The gradient of a real period does grow, by about one a period.
  assert np.abs(by_its_period(near, False).sum(-1)).max() > 30


def test_the_ends_of_a_clip_belong_to_its_slope():
  """The slope is one on all of [0, 1], as in torch.clamp; zero where hidden."""
  mask, _ = both([8.0], 16.0)
  by_span = slopes(
    lambda mask: span_weight(np.arange(30), mask.span, mask.ramp), mask
  )
  # m = 1 at d = 8 and m = 0 at d = 24.
  expected = [1 / 16 if 8 <= d <= 24 else 0 for d in range(30)]
  np.testing.assert_array_equal(by_span[0, :, 0], expected)
  by_span = slopes(lambda mask: finite_log_weight(mask, np.arange(30)), mask)
  np.testing.assert_array_equal(by_span[0, 8, 0], 1 / 16)
  np.testing.assert_array_equal(by_span[0, 24:, 0], 0)

  # w = 1, 0, 1, 0: every distance is at an end of the clip.
  mask, _ = both([50.0], 16.0, [2.0], [0.0], integer=True)
  distance = np.arange(4)
  actual = slopes(lambda mask: wave_weight(distance, mask.wave), mask)
  np.testing.assert_array_equal(actual[0, :, 1], [0.25] * 4)
  np.testing.assert_array_equal(actual[0, :, 2], [2.0] * 4)
  actual = slopes(lambda mask: finite_log_weight(mask, distance), mask)
  np.testing.assert_array_equal(actual[0, :, 1], [0.25, 0, 0.25, 0])
  np.testing.assert_array_equal(actual[0, :, 2], [2.0, 0, 2.0, 0])


@pytest.mark.parametrize("integer", [False, True])
def test_penalty_and_open_fraction(integer):
  # u is below and above one, and 1/2 + P r - A below and above zero.
  span = [0.0, 11.5, 31.75, 90.25, 1e3, 5.0]
  period = [2.013, 3.307, 4.61, 6.191, 7.987, 7.6]
  ratio = [-0.25, 0.07, 0.25, -0.047, 0.24, 0.5]
  mask, exact = both(span, 32.0, period, ratio, integer=integer)
  heads = np.array([exact.head(h) for h in range(6)])[:, [0, 1, 3]]
  expected = [oracle.open_fraction(p, r) for _, p, r in heads]
  assert min(expected) < 1 < max(expected)
  np.testing.assert_allclose(open_fraction(mask.wave), expected, rtol=1e-5)
  value, gradient = penalty_and_gradient(mask)
  assert value.shape == ()
  np.testing.assert_allclose(value, oracle.penalty(exact), rtol=1e-5)
  actual = (gradient.span, gradient.wave.period, gradient.wave.ratio)
  expected = oracle.penalty_slopes(exact)
  # r - 1/4 and 1/2 + P r cancel to a few roundings of one, times z + R, over H.
  for h, z in enumerate(span):
    np.testing.assert_allclose(
      np.stack(actual, -1)[h],
      expected[h],
      rtol=1e-5,
      atol=4 * EPSILON * (z + 32) / 6,
    )
  differences = oracle.finite_difference(
    lambda x: oracle.penalty(oracle.Mask(x[:, 0], 32.0, x[:, 1], x[:, 2])),
    heads,
  )
  np.testing.assert_allclose(expected, differences, rtol=1e-6, atol=1e-6)


def test_open_fraction_has_no_step_where_the_wave_opens_fully():
  for period in (2.0, 3.3, 8.0):
    ratio = 0.25 - 0.5 / period + np.array([-1e-4, 0.0, 1e-4])  # u = 1
    wave = Wave(np.full(3, period, np.float32), ratio.astype(np.float32))
    fraction = open_fraction(wave)
    np.testing.assert_allclose(fraction, 1, atol=1e-3)
    assert fraction[0] < fraction[1] < fraction[2]


def test_penalty_without_a_wave_is_the_mean_span():
  mask, exact = both(SPAN[:4], 32.0)
  value, gradient = penalty_and_gradient(mask)
  np.testing.assert_allclose(value, oracle.penalty(exact), rtol=1e-6)
  np.testing.assert_allclose(
    gradient.span, oracle.penalty_slopes(exact)[:, 0], rtol=1e-6
  )
  assert gradient.wave is None


def test_open_share_counts_distances(pair):
  for mask, exact in (pair, both((0.0, *SPAN[1:]), 0.5)):
    for length in (1, 129):
      expected = [oracle.open_share(exact, h, length) for h in range(5)]
      actual = open_share(mask, length)
      assert actual.shape == (5,)
      np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_open_share_of_strides_and_spans():
  # One distance in four, one in eight, and a wave that is fully open.
  mask, _ = both(
    [200.0] * 3, 8.0, [4.0, 8.0, 8.0], [-0.25, -0.25, 0.5], integer=True
  )
  shares = open_share(mask, 160)
  np.testing.assert_allclose(shares, [1 / 4, 1 / 8, 1])
  mask, _ = both([0.0, 3.0, 1e9], 0.5)
  np.testing.assert_allclose(open_share(mask, 100), [0.01, 0.04, 1.0])


@pytest.mark.parametrize(("harmonics", "integer"), KINDS)
def test_gradients_are_finite_where_weights_are_zero(harmonics, integer):
  """Hidden pairs bring no 0 / 0 into a gradient."""
  mask, _ = both(
    (0.0, 0.0, 1e9, 8191.0, 12.0),
    0.5,
    (2.0, 4.0, 8.0, 7.0, 5.0),
    (0.0, -0.25, -0.75, -1.0, 0.25),  # heads 2 and 3 hide everything
    harmonics,
    integer,
  )
  distance = np.array([0, 1, 2, 3, 11, 12, 13, 511, 8190, 8191])
  open_heads = is_open(mask, distance).any(-1)
  assert open_heads.tolist() == [1, 1, 0, 0, 1]
  for function in (
    lambda mask: jnp.exp(log_weight(mask, distance)).sum(),
    lambda mask: finite_log_weight(mask, distance).sum(),
  ):
    for leaf in jax.tree.leaves(jax.jit(jax.grad(function))(mask)):
      assert np.isfinite(leaf).all()
      np.testing.assert_array_equal(leaf[2:4], 0)
  for function in (
    lambda mask: wave_weight(distance, mask.wave).sum(),
    masks.penalty,
  ):
    for leaf in jax.tree.leaves(jax.jit(jax.grad(function))(mask)):
      assert np.isfinite(leaf).all()


def test_masks_are_pytrees():
  mask, _ = both(SPAN, 32.0, PERIOD, RATIO, 5, True)
  assert len(jax.tree.leaves(mask)) == 3
  assert len(jax.tree.leaves(both(SPAN, 32.0)[0])) == 1
  doubled = jax.tree.map(lambda x: 2 * x, mask)
  np.testing.assert_array_equal(doubled.wave.period, 2 * mask.wave.period)
  structure = jax.tree.structure(mask)
  assert structure == jax.tree.structure(doubled)
  # All that is static is part of the structure.
  for other in (
    both(SPAN, 16.0, PERIOD, RATIO, 5, True),
    both(SPAN, 32.0, PERIOD, RATIO, 3, True),
    both(SPAN, 32.0, PERIOD, RATIO, 5, False),
  ):
    assert structure != jax.tree.structure(other[0])
  assert Mask(2.0) == Mask(2.0, ramp=32.0, wave=None)
  assert Wave(1, 2) == Wave(1, 2, harmonics=None, integer=False)


def test_new_values_do_not_compile_again():
  traces = []

  @jax.jit
  def traced(mask):
    traces.append(mask)
    return masks.log_weight(mask, jnp.arange(64))

  mask, _ = both(SPAN, 32.0, PERIOD, RATIO)
  for factor in (1.0, 0.5, 0.25):
    changed = jax.tree.map(lambda x, factor=factor: x * factor, mask)
    np.testing.assert_allclose(
      np.exp(traced(changed)),
      np.exp(log_weight(changed, np.arange(64))),
      atol=1e-5,
    )
  assert len(traces) == 1
  traced(both(SPAN, 16.0, PERIOD, RATIO)[0])
  assert len(traces) == 2


def test_vmap_over_layers():
  layers = [
    both(SPAN, 32.0, PERIOD, RATIO, 5)[0],
    both(SPAN[::-1], 32.0, PERIOD[::-1], RATIO[::-1], 5)[0],
  ]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
  distance = np.arange(64)
  for function in (
    lambda mask: jnp.exp(log_weight(mask, distance)),
    lambda mask: open_share(mask, 64),
    masks.penalty,
    jax.grad(masks.penalty),
  ):
    together = jax.jit(jax.vmap(function))(stacked)
    for i, mask in enumerate(layers):
      jax.tree.map(
        lambda a, b, i=i: np.testing.assert_allclose(
          a[i], b, rtol=1e-5, atol=1e-5
        ),
        together,
        jax.jit(function)(mask),
      )


def test_bounded_parameters():
  logit = np.array([-100.0, 0.0, 1.5, 100.0], np.float32)
  expected = 2 + 6 / (1 + np.exp(-logit.astype(np.float64)))
  np.testing.assert_allclose(to_length(logit, 2, 8), expected, rtol=1e-6)


# The steps are such that hardly any distance meets an end of a clip.
HEADS = st.lists(
  st.tuples(
    st.integers(0, 300).map(lambda n: n / 7 + 0.0137),
    st.integers(0, 95).map(lambda n: 2 + (n + 0.3183) / 16),
    st.integers(0, 99).map(lambda n: (n - 49.783) / 200),
  ),
  min_size=3,
  max_size=3,
)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
  HEADS, st.sampled_from([0.5, 3.0, 32.0]), *map(st.sampled_from, zip(*KINDS))
)
def test_any_mask(heads, ramp, harmonics, integer):
  span, period, ratio = zip(*heads)
  mask, exact = both(span, ramp, period, ratio, harmonics, integer)
  distance = np.arange(48)
  m = span_weight(distance, mask.span, ramp)
  w = wave_weight(distance, mask.wave)
  expected = table(lambda h, d: oracle.weights(exact, h, d), 3, distance)
  np.testing.assert_allclose(np.stack((m, w), -1), expected, atol=1e-5)
  assert (np.diff(m) <= 0).all()
  if integer:
    for h, p in enumerate(np.round(np.float32(period)).astype(int)):
      np.testing.assert_allclose(w[h, p:], w[h, :-p], atol=1e-5)
  hypothesis.assume(
    np.abs(expected.min(-1) - 1e-6)[expected.min(-1) > 0].min() > 1e-5
  )
  np.testing.assert_array_equal(
    is_open(mask, distance), expected.min(-1) > 1e-6
  )
