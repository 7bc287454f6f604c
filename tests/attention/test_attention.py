"""Every implementation of attention agrees with the oracle on every case."""

import functools
import inspect
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_attention import masks
from adaptive_attention.attention import (
  attend,
  attend_ring,
  blocked,
  computed_pairs,
  dropout,
  walk,
)
from adaptive_attention.attention.ring import Ring, append, in_order
from adaptive_attention.masks import Mask, Wave
from tests import oracle
from tests.attention.cases import (
  CASES,
  SEED,
  Case,
  everywhere,
  inputs,
  mostly_blocked,
  relative_vectors,
)
from tests.pairs import in_turn

# What is special about these is so of others too; they are asked by hand.
COMBINED = (
  *("8192 spans 4096, period 4", "dense_seven", "dense_129", "memory_3"),
  *("span_at_a_distance", "first_key_beyond_memory", "stride_500"),
  *("stride_rounds", "stride_memory_part", "real_500", "relative_seven"),
  *("relative_few", "relative_bfloat16", "span_dropout", "wave_bfloat16"),
  *("wave_dropout", "grouped_dense", "segments_dense", "padding_bfloat16"),
  "series_memory_512",
)
# The reference is short, and each thing that it does is in one of these.
BY_REFERENCE = (
  *("dense_first_key", "span_seven", "span_beyond", "one_query"),
  *("first_key_in_memory", "stride_at_the_bounds", "stride_series"),
  *("wave_closed_and_off", "real_seven", "series_at_the_bounds"),
  *("relative_500", "wave_dropout", "span_bfloat16", "grouped_integer"),
  *("segments_integer", "padding"),
)


def is_by_hand(case, implementation):
  if implementation == "reference":
    return case.name not in BY_REFERENCE
  return case.name in COMBINED


all_cases = pytest.mark.parametrize(
  ("case", "implementation"),
  [
    pytest.param(
      *(case, implementation),
      marks=pytest.mark.every_case if is_by_hand(case, implementation) else (),
      id=f"{case.name}-{implementation}",
    )
    for case in CASES
    for implementation in ("blocked", "reference")
  ],
)


def exact_mask(case):
  """Returns the oracle's mask of the same float32 numbers as ours."""
  if case.span is None:
    return None
  span, period, ratio = (
    None if x is None else np.array(x, np.float32)
    for x in (case.span, case.period, case.ratio)
  )
  return oracle.Mask(
    span, case.ramp, period, ratio, case.harmonics, case.integer
  )


@functools.cache
def expected(case):
  """Returns the oracle's value and gradients of a case."""
  keep = None
  if case.dropout_rate:
    shape_BHTS = (case.B, case.H, case.T, case.S)
    kept_BHTS = oracle.dropout_keep(SEED, shape_BHTS, case.dropout_rate)
    keep = (kept_BHTS, case.dropout_rate)
  q, k, v, dout = inputs(case)
  return oracle.attention(
    *(q, k, v, exact_mask(case), dout),
    *(case.memory, case.first_key, keep, relative_vectors(case)),
    alike(case),
  )


def alike(case):
  """Returns (B, T, S) whether a pair lies in one segment, and no padding."""
  alike_BTS = np.ones((case.B, case.T, case.S), bool)
  if case.segments:
    ids_BS = case.segment_ids
    alike_BTS &= ids_BS[:, -case.T :, None] == ids_BS[:, None]
  if case.padding:
    alike_BTS &= case.key_mask[:, None]
  return alike_BTS


def differentiated(case, implementation):
  """Returns a function (q, k, v, mask, dout) -> out and gradients by name."""

  def run(q, k, v, mask, dout, ring=None):
    options = case.options | {"implementation": implementation}

    def call(q, k, v, mask, relative):
      if ring is None:
        return attend(q, k, v, mask, relative_RK=relative, **options)
      del options["memory"]
      return attend_ring(ring, q, k, v, mask, relative_RK=relative, **options)[
        0
      ]

    out, pull = jax.vjp(call, q, k, v, mask, relative_vectors(case))
    dq, dk, dv, dmask, drelative = pull(dout)
    result = {"out": out, "dq": dq, "dk": dk, "dv": dv}
    if case.relative:
      result["drelative"] = drelative
    if mask is not None:
      result["dspan"] = dmask.span
      if mask.wave is not None:
        result |= {"dperiod": dmask.wave.period, "dratio": dmask.wave.ratio}
    return result

  return run


def compiled(case, implementation):
  """Compiles once for all cases that differ in numbers alone."""
  lengths = case.span, case.period, case.ratio
  span, period, ratio = (x and (1.0,) * len(x) for x in lengths)
  of_all = case._replace(
    name="", span=span, period=period, ratio=ratio, query_scale=1.0
  )
  return _compiled(of_all, implementation)


@functools.cache
def _compiled(case, implementation):
  q, k, v, dout = inputs(case)
  run = jax.jit(differentiated(case, implementation))
  return run.lower(q, k, v, case.mask, dout).compile()


def run(case, implementation):
  q, k, v, dout = inputs(case)
  return compiled(case, implementation)(q, k, v, case.mask, dout)


def check(actual, exact, case):
  """Compares value and gradients of one call with the oracle's.

  In float32 values may differ by 1e-5. Gradients may differ by 1e-4 of the
  largest entry and 16 roundings (2^-24 each) of the terms where these cancel.

  bfloat16 rounds by 2^-8. The inputs are exact and sums are float32, but the
  weights of a row and their gradients may each be rounded before they meet
  another array, and the result is rounded once.

  An entry that has no term at all, by the mask or as memory, is zero exactly.
  """
  for name, value in actual.items():
    rounded = name in ("out", "dq", "dk", "dv")
    assert value.dtype == (case.dtype if rounded else jnp.float32)
    value = np.asarray(value, np.float64)
    reference, scale = getattr(exact, name), exact.scale[name]
    assert value.shape == reference.shape
    np.testing.assert_array_equal(value[scale == 0], 0, err_msg=name)
    if case.dtype == "bfloat16":
      bound = 2**-8 * (2 * scale + np.abs(reference))
    elif name == "out":
      bound = 1e-5
    else:
      bound = 1e-4 * np.abs(reference).max() + 16 * 2**-24 * scale
    error = np.abs(value - reference)
    worst = np.unravel_index(np.argmax(error - bound), error.shape)
    assert (error <= bound).all(), (
      f"{case.name}: {name}{[int(i) for i in worst]} is {value[worst]}, "
      f"not {reference[worst]}; {(error > bound).sum()} entries are off"
    )


@all_cases
def test_value_and_gradients(case, implementation):
  check(run(case, implementation), expected(case), case)


@all_cases
def test_the_same_call_gives_the_same_bits(case, implementation):
  first, again = run(case, implementation), run(case, implementation)
  jax.tree.map(np.testing.assert_array_equal, first, again)


_IN_RINGS = (
  "memory_512",
  "first_key_beyond_memory",
  "stride_even",
  "wave_dropout",
  "relative_500",
  "span_bfloat16",
  "grouped_integer",
)


@mostly_blocked
@pytest.mark.parametrize(
  ("case", "turned"),
  in_turn([c for c in CASES if c.name in _IN_RINGS], [0.4, 0.95, 0.0]),
  ids=lambda x: getattr(x, "name", x),
)
def test_value_and_gradients_out_of_a_ring(case, implementation, turned):
  """The oldest position may stand in any row, among rows of other streams.

  That row need not be a multiple of T: new rows may go on from row 0.
  """
  q, k, v, dout = inputs(case)
  first_row = int(turned * case.S)
  older = case.S - case.T
  k_NSHK, v_NSHK = (
    jnp.pad(
      jnp.roll(
        jnp.concatenate([0 * x[:, older:] - 7.0, x[:, :older]], axis=1),
        first_row,
        axis=1,
      ),
      ((2, 1), (0, 0), (0, 0), (0, 0)),
      constant_values=jnp.nan,
    )
    for x in (k, v)
  )
  new = k[:, older:], v[:, older:]

  @jax.jit
  def from_ring(ring):
    return differentiated(case, implementation)(
      q, *new, case.mask, dout, ring=ring
    )

  exact = expected(case)
  newer = {name: getattr(exact, name)[:, older:] for name in ("dk", "dv")}
  scale = exact.scale | {name: exact.scale[name][:, older:] for name in newer}
  check(
    from_ring(Ring(k_NSHK, v_NSHK, first_row, 2)),
    exact._replace(**newer, scale=scale),
    case,
  )


def test_a_ring_moves_only_what_is_new():
  random = np.random.default_rng(0)
  stream = random.standard_normal((2, 24, 3, 4)).astype(np.float32)
  ring = Ring(jnp.full((5, 12, 3, 4), np.nan), jnp.zeros((5, 12, 3, 4)), 0, 1)
  start = 0
  for T in (4, 4, 5, 1, 7, 3):
    new = stream[:, start : start + T]
    ring = append(ring, new, -new)
    start += T
  for array, sign in ((ring.k_NSHK, 1), (ring.v_NSHK, -1)):
    np.testing.assert_array_equal(
      in_order(array, ring, 2), sign * stream[:, 12:]
    )
  assert np.isnan(np.asarray(ring.k_NSHK)[[0, 3, 4]]).all()

  def total(new):
    return append(ring, new, new).k_NSHK[1:3].sum()

  assert not np.asarray(jax.grad(total)(stream[:, :4])).any()


def test_real_waves_of_the_cases_keep_away_from_ties():
  for case in CASES:
    if case.period is not None and not case.integer:
      assert oracle.tie_margin(exact_mask(case), range(case.S)) > 1e-4
  assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("harmonics", [None, 5])
def test_gradients_of_the_oracle_by_finite_differences(harmonics):
  random = np.random.default_rng(0)
  shapes = (3, 2, 2), (5, 2, 2), (5, 2, 2), (3, 2, 2)  # q, k, v, dout
  relative = random.standard_normal((4, 2))
  q, k, v, dout = (random.standard_normal((1, *shape)) for shape in shapes)
  lengths = np.array([[2.3, 1.1], [2.37, 5.63], [0.11, -0.09]])
  keep = random.random((1, 2, 3, 5)) > 0.3, 0.3

  def forward(q=q, k=k, v=v, lengths=lengths, relative=relative, **options):
    span, period, ratio = lengths
    mask = oracle.Mask(span, 3.0, period, ratio, harmonics)
    return oracle.attention(
      *(q, k, v, mask, dout),
      first_key=1,
      keep=keep,
      relative_RK=relative,
      **options,
    )

  exact = forward()
  for actual, name, x in (
    (exact.dq, "q", q),
    (exact.dk, "k", k),
    (exact.dv, "v", v),
    (exact.drelative, "relative", relative),
    (np.stack((exact.dspan, exact.dperiod, exact.dratio)), "lengths", lengths),
  ):
    differences = oracle.finite_difference(
      lambda x, name=name: (forward(**{name: x}).out * dout).sum(), x
    )
    assert np.abs(differences).max() > 0.1
    np.testing.assert_allclose(actual, differences, atol=1e-7)
  remembered = forward(memory=2)
  for name in ("dk", "dv"):
    all_keys, newer = getattr(exact, name), getattr(remembered, name)
    np.testing.assert_array_equal(newer[:, :2], 0)
    np.testing.assert_array_equal(newer[:, 2:], all_keys[:, 2:])


@mostly_blocked
@pytest.mark.parametrize(
  ("name", "changes"),
  [
    ("causal", {}),
    ("span", {"span": (2.5, 6.0), "ramp": 3.0}),
    (
      "wave",
      {
        "span": (9.0, 30.0),
        "ramp": 1.0,
        "period": (4.0, 3.0),
        "ratio": (-0.25, 0.0),
        "integer": True,
      },
    ),
    ("memory", {"span": (2.5, 30.0), "ramp": 3.0, "memory": 3}),
    ("first_key", {"span": (2.5, 30.0), "ramp": 3.0, "first_key": 6}),
  ],
  ids=lambda x: x if isinstance(x, str) else "",
)
def test_by_gradient_a_query_attends_to_its_open_keys_alone(
  name, changes, implementation
):
  """d out[t] / d v[s] is exactly zero, but where the pair (t, s) is open."""
  case = Case(name, 12, 15, B=2, K=2, **changes)
  q, k, v, _ = inputs(case)

  def one_number_a_query(q, k, v):
    out_BTHK = attend(
      q, k, v, case.mask, **case.options, implementation=implementation
    )
    return out_BTHK.sum(-1)

  reach = [
    np.abs(jacobian).max(-1) > 0
    for jacobian in jax.jit(jax.jacrev(one_number_a_query, (0, 1, 2)))(q, k, v)
  ]
  exact = exact_mask(case)
  expected_BTHBSH = np.zeros((2, 12, 2, 2, 15, 2), bool)
  for h in range(2):
    for t in range(12):
      for s in range(case.first_key, t + 4):
        if exact is None or oracle.is_open(exact, h, 3 + t - s):
          expected_BTHBSH[[0, 1], t, h, [0, 1], s, h] = True
  neighbours = expected_BTHBSH.sum((3, 4, 5)) > 1
  new = expected_BTHBSH.copy()
  new[..., : case.memory, :] = False
  # A key that is a query's only open one has the weight one, whatever it is.
  alone = new & neighbours[..., None, None, None]
  itself = np.eye(12, dtype=bool)[None, :, None, None, :, None]
  heads = np.eye(2, dtype=bool)
  itself = itself & heads[:, None, None, :, None, None]
  itself = itself & heads[None, None, :, None, None, :]
  np.testing.assert_array_equal(
    reach[0], itself & neighbours[..., None, None, None]
  )
  np.testing.assert_array_equal(reach[1], alone)
  np.testing.assert_array_equal(reach[2], new)


@everywhere
def test_open_masks_change_nothing(implementation):
  dense = Case("open", 64, 67, memory=3)
  masked = dense._replace(span=(67.0, 1e6), period=(8.0, 7.3), ratio=(0.5, 0.5))
  plain, adaptive = run(dense, implementation), run(masked, implementation)
  for name, value in plain.items():
    np.testing.assert_allclose(adaptive[name], value, atol=1e-5)
  for name in ("dspan", "dperiod", "dratio"):
    np.testing.assert_array_equal(adaptive[name], 0)


@everywhere
def test_new_lengths_do_not_compile_again(implementation):
  case = Case(
    "runtime",
    33,
    40,
    span=(3.5, 20.5),
    ramp=4.0,
    period=(3.3, 5.1),
    ratio=(0.07, -0.04),
    memory=7,
    dropout_rate=0.3,
  )
  q, k, v, dout = inputs(case)
  traces = []

  @jax.jit
  def loss(q, mask, first_key, seed):
    traces.append(seed)
    out = attend(
      *(q, k, v, mask),
      memory=7,
      first_key=first_key,
      dropout_rate=0.3,
      dropout_seed=seed,
      implementation=implementation,
    )
    return (out * dout).sum(), out

  gradient = jax.jit(jax.grad(loss, has_aux=True))
  for changed, seed in (
    (case, 1),
    (case._replace(span=(0.5, 33.5)), 1),
    (case._replace(period=(7.7, 2.2), ratio=(0.01, -0.02)), 1),
    (case._replace(first_key=21), 1),
    (case, 2**32 - 1),
  ):
    dq, out = gradient(q, changed.mask, changed.first_key, np.uint32(seed))
    exact = oracle.attention(
      *(q, k, v, exact_mask(changed), dout),
      memory=7,
      first_key=changed.first_key,
      keep=(oracle.dropout_keep(seed, (1, 2, 33, 40), 0.3), 0.3),
    )
    check({"out": out, "dq": dq}, exact, changed)
  assert len(traces) == 1
  assert gradient._cache_size() == 1


def test_without_a_name_the_best_that_serves_runs():
  case = Case("best", 33, 40, span=(3.5, 20.5))
  check(run(case, None), expected(case), case)


REAL = st.integers(0, 10**6).map(lambda n: (n + 0.3183) / 10**6)


@mostly_blocked
@hypothesis.settings(max_examples=10, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_any_case(implementation, data):
  def draw(strategy, low=0.0, high=1.0):
    return low + (high - low) * data.draw(strategy)

  def per_head(low, high):
    return tuple(draw(REAL, low, high) for _ in range(H))

  def one_of(*options):
    return data.draw(st.sampled_from(options))

  T, H = one_of(1, 2, 9, 70, 140), one_of(1, 2, 3)
  S = T + one_of(0, 1, 4, 150)
  waves = one_of(True, True, False)
  case = Case(
    "any",
    T,
    S,
    span=per_head(0, one_of(12, 100, 300)),
    ramp=one_of(0.5, 3.0, 32.0),
    period=per_head(2, 8) if waves else None,
    ratio=per_head(-0.25, 0.25) if waves else None,
    harmonics=one_of(None, 1, 5),
    integer=one_of(False, True),
    memory=data.draw(st.integers(0, S - T)),
    first_key=data.draw(st.integers(0, S)),
    dropout_rate=one_of(0.0, 0.3),
    B=one_of(1, 2),
    H=H,
    K=one_of(1, 4),
  )
  hypothesis.assume(oracle.tie_margin(exact_mask(case), range(S)) > 1e-4)
  check(run(case, implementation), expected(case), case)


@pytest.mark.parametrize("seed", [0, 1, SEED, 2**32 - 1])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.999])
def test_dropout_draws_the_bits_of_the_oracle(seed, rate):
  shape_BHTS = (2, 3, 17, 65)
  b, h, t, s = np.indices(shape_BHTS, sparse=True)
  x = s - (65 - 17)
  keep = jax.jit(dropout.keep, static_argnums=5)
  kept = keep(np.uint32(seed), b, h, t, x, rate)
  assert kept.dtype == bool
  np.testing.assert_array_equal(
    kept, oracle.dropout_keep(seed, shape_BHTS, rate)
  )
  if rate == 0:
    assert kept.all()
  # It is a pure function of the indices, so that any part can be drawn alone.
  part = keep(np.uint32(seed), 1, h, t[..., 5:9, :], x[..., 30:], rate)
  np.testing.assert_array_equal(part[0], kept[1][:, 5:9, 30:])
  # The number of older keys changes no draw.
  fewer = oracle.dropout_keep(seed, (2, 3, 17, 20), rate)
  np.testing.assert_array_equal(fewer, kept[..., 45:])


@pytest.fixture(scope="module")
def drawn():
  """Returns (seeds, B, H, T, S) which weights dropout leaves at rate 0.3."""
  b, h, t, s = np.indices((4, 4, 64, 256), sparse=True)
  seeds = (0, 1, 2, SEED, SEED + 1)
  keep = jax.jit(lambda seed: dropout.keep(seed, b, h, t, s, 0.3))
  return np.stack([keep(np.uint32(seed)) for seed in seeds])


def test_dropout_drops_its_share_everywhere(drawn):
  def check_share(of, axes):
    count = np.prod([of.shape[axis] for axis in axes])
    error = np.abs(of.mean(axes) - 0.7)
    assert error.max() < 4 * np.sqrt(0.3 * 0.7 / count)

  check_share(drawn, (0, 1, 2, 3, 4))
  check_share(drawn, (1, 2, 3, 4))
  for kept_BHTS in drawn:
    check_share(kept_BHTS, (1, 2, 3))
    check_share(kept_BHTS, (0, 2, 3))
    check_share(kept_BHTS, (0, 1, 3))
    check_share(kept_BHTS, (0, 1, 2))
  # A seed has 1024 rows. By chance the share of 1 row in 16,000 is more than 4
  # standard errors off, so that one of them may be.
  rows = np.abs(drawn.mean(-1) - 0.7) / np.sqrt(0.3 * 0.7 / 256)
  assert (rows > 4).sum() <= 1
  assert 0.9 < rows.std() / np.sqrt(1 - 2 / np.pi) < 1.1


def test_dropout_of_neighbours_and_seeds_is_unrelated(drawn):
  centred = (drawn - 0.7) / np.sqrt(0.3 * 0.7)
  for b, h, t, s in itertools.product((0, 1), (0, 1), (0, 1), (-1, 0, 1)):
    if (b, h, t) == (0, 0, 0) and s < 1:
      continue
    B, H, T, S = drawn.shape[1:]
    one = centred[:, : B - b, : H - h, : T - t, max(0, -s) : S - max(0, s)]
    other = centred[:, b:, h:, t:, max(0, s) : S + min(0, s)]
    product = one * other
    assert abs(product.mean()) < 4 / np.sqrt(product.size), (b, h, t, s)
  for one, other in itertools.combinations(centred, 2):
    assert abs((one * other).mean()) < 4 / np.sqrt(one.size)


def arguments(**changes):
  """Returns arguments of `attend` that fit each other, but for the changes."""
  keys = np.zeros((2, 7, 3, 4), np.float32)
  queries = keys[:, :5]
  span = np.ones(3, np.float32)
  return {"q": queries, "k": keys, "v": keys, "mask": Mask(span)} | changes


def call(q, k, v, mask, ring=None, **options):
  if ring is not None:
    return attend_ring(ring, q, k, v, mask, **options)[0]
  return attend(*map(jnp.asarray, (q, k, v)), mask, **options)


def test_arguments_that_fit():
  given = [arguments()]
  given += [arguments(ring=Ring(LONG, LONG, row), **NEW) for row in (0, 6)]
  for each in given:
    out = jax.eval_shape(functools.partial(call, **each))
    assert out.shape == (2, 5, 3, 4)


@pytest.mark.parametrize("function", [attend, attend_ring])
def test_what_follows_the_mask_has_a_name(function):
  parameters = list(inspect.signature(function).parameters.values())
  after = parameters[[x.name for x in parameters].index("mask") + 1 :]
  assert len(after) >= 5
  assert {x.kind for x in after} == {inspect.Parameter.KEYWORD_ONLY}


@mostly_blocked
def test_a_ring_that_is_read_on_and_on_is_a_stream(implementation):
  """Segments of any length give what the whole stream gives."""
  random = np.random.default_rng(3)
  q, k, v = random.standard_normal((3, 2, 22, 3, 4)).astype(np.float32)
  mask = Mask(np.float32([3.5, 6.25, 1.0]), 2.0)
  run = functools.partial(attend, implementation=implementation)
  whole = jax.jit(run)(q, k, v, mask)
  step = jax.jit(functools.partial(attend_ring, implementation=implementation))
  empty = np.full((3, 13, 3, 4), np.nan, np.float32)
  ring, start = Ring(empty, empty, 5, 1), 0
  for T in (4, 4, 1, 5, 3, 5):
    new = (x[:, start : start + T] for x in (q, k, v))
    out, ring = step(ring, *new, mask, first_key=max(13 - T - start, 0))
    np.testing.assert_allclose(out, whole[:, start : start + T], atol=1e-5)
    start += T


@mostly_blocked
def test_older_keys_change_no_draw(implementation):
  """Draws do not depend on older keys that are hidden or do not exist."""
  random = np.random.default_rng(4)
  q, k, v = random.standard_normal((3, 1, 90, 2, 4)).astype(np.float32)
  mask = Mask(np.float32([3.5, 20.25]), 2.0)
  options = {"dropout_rate": 0.4, "dropout_seed": 11}

  def last(first, **more):
    run = functools.partial(
      attend, **(options | more), implementation=implementation
    )
    return jax.jit(run)(q[:, 80:], k[:, first:], v[:, first:], mask)

  np.testing.assert_allclose(last(0), last(50), atol=1e-6)
  np.testing.assert_allclose(
    last(0, first_key=75), last(70, first_key=5), atol=1e-6
  )


def heads_in_several_calls(implementation, **options):
  """Checks that heads in calls of their own draw what they draw together."""
  random = np.random.default_rng(5)
  q, k, v, *rows = random.standard_normal((5, 2, 40, 4, 8)).astype(np.float32)
  new = q[:, :24], k[:, :24], v[:, :24]
  mask = Mask(np.float32([3.5, 20.25, 0.0, 33.0]), 2.0)

  def run(heads, **more):
    call = functools.partial(
      attend_ring,
      dropout_rate=0.4,
      dropout_seed=11,
      implementation=implementation,
      **options,
      **more,
    )
    ring = Ring(*(x[:, :, heads] for x in rows), 7)
    part = Mask(mask.span[heads], mask.ramp)
    return jax.jit(call)(ring, *(x[:, :, heads] for x in new), part)[0]

  whole = run([0, 1, 2, 3])
  for heads in ([2, 0], [3, 1]):
    found = run(heads, dropout_heads=np.array(heads))
    np.testing.assert_allclose(found, whole[:, :, heads], atol=1e-6)
  assert np.abs(run([2, 0]) - whole[:, :, [2, 0]]).max() > 0.1


@mostly_blocked
def test_heads_may_come_in_several_calls(implementation):
  heads_in_several_calls(implementation)


def test_pairs_that_are_computed():
  mask = Mask(np.float32([0.0, 1e4]), 1.0)
  for implementation in (None, "blocked"):
    pairs = computed_pairs(mask, 130, 130, implementation=implementation)
    assert pairs.dtype == np.int64
    np.testing.assert_array_equal(pairs, [3 * 64**2, 6 * 64**2])
  np.testing.assert_array_equal(
    computed_pairs(mask, 130, 200, implementation="reference"), [26000] * 2
  )
  with pytest.raises(ValueError, match="fastest"):
    computed_pairs(mask, 130, 130, implementation="fastest")
  with pytest.raises(ValueError, match="S=129"):
    computed_pairs(mask, 130, 129)


THREE = np.ones(3, np.float32)
FOUR = np.ones(4, np.float32)
LONG = np.zeros((2, 8, 3, 4), np.float32)
NEW = {"k": LONG[:, :5], "v": LONG[:, :5]}


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"implementation": "fastest"}, "fastest"),
    ({"implementation": ""}, "''"),
    ({"q": LONG}, "8"),
    ({"q": LONG[0]}, "(8, 3, 4)"),
    ({"k": LONG[0], "v": LONG[0]}, "(8, 3, 4)"),
    ({"k": LONG}, "(2, 8, 3, 4)"),
    ({"v": LONG}, "(2, 8, 3, 4)"),
    ({"k": LONG[:1], "v": LONG[:1]}, "(1, 8, 3, 4)"),
    ({"k": LONG[:, :, :2], "v": LONG[:, :, :2]}, "(2, 8, 2, 4)"),
    ({"k": LONG[:, :, :0], "v": LONG[:, :, :0]}, "(2, 8, 0, 4)"),
    ({"segment_ids": np.zeros((2, 5), np.int32)}, "(2, 5)"),
    ({"segment_ids": np.zeros((2, 7), np.float32)}, "float32"),
    ({"key_mask": np.zeros((1, 7), bool)}, "(1, 7)"),
    ({"key_mask": np.zeros((2, 7), np.int32)}, "int32"),
    ({"k": LONG[..., :2], "v": LONG[..., :2]}, "(2, 8, 3, 2)"),
    ({"q": LONG[:, :0]}, "(2, 0, 3, 4)"),
    ({"q": LONG[:, :5].astype(jnp.bfloat16)}, "bfloat16"),
    ({"v": LONG[:, :7].astype(np.int32)}, "int32"),
    ({x: LONG[:, :7].astype(np.float16) for x in "qkv"}, "float16"),
    ({"memory": 3}, "3"),
    ({"memory": -1}, "-1"),
    ({"memory": 1.0}, "1.0"),
    ({"first_key": 1.5}, "1.5"),
    ({"first_key": np.zeros(2, int)}, "0"),
    ({"dropout_rate": 1.0, "dropout_seed": 0}, "1.0"),
    ({"dropout_rate": -0.1, "dropout_seed": 0}, "-0.1"),
    ({"dropout_rate": np.nan, "dropout_seed": 0}, "nan"),
    ({"dropout_rate": 0.25}, "0.25"),
    ({"interpret": True}, "interpret=True"),
    ({"interpret": True, "implementation": "reference"}, "'reference'"),
    ({"ring": Ring(LONG, LONG)}, "7 keys"),
    ({"ring": Ring(LONG[0], LONG[0]), **NEW}, "(8, 3, 4)"),
    ({"ring": Ring(LONG, LONG.astype(jnp.bfloat16)), **NEW}, "bfloat16"),
    ({"ring": Ring(LONG, LONG, 1.5), **NEW}, "first_row=1.5"),
    ({"ring": Ring(LONG, LONG, 0, np.zeros(2, int)), **NEW}, "batch=[0 0]"),
    ({"ring": Ring(LONG, LONG), "first_key": 0.5, **NEW}, "first_key=0.5"),
    ({"ring": Ring(LONG, LONG[:1]), **NEW}, "(1, 8, 3, 4)"),
    ({"ring": Ring(LONG[:1], LONG[:1]), **NEW}, "(1, 8, 3, 4)"),
    ({"ring": Ring(LONG[:, :4], LONG[:, :4]), **NEW}, "(2, 4, 3, 4)"),
    ({"ring": Ring(LONG[..., :2], LONG[..., :2]), **NEW}, "(2, 8, 3, 2)"),
    ({"ring": Ring(LONG[:, :, :1], LONG[:, :, :1]), **NEW}, "(2, 8, 1, 4)"),
    (
      {"ring": Ring(LONG, LONG), "dropout_heads": np.arange(2), **NEW},
      "int32[2] must be one integer for each of the 3 heads",
    ),
    (
      {"ring": Ring(LONG, LONG), "dropout_heads": np.ones(3), **NEW},
      "dropout_heads float32[3]",
    ),
    ({"relative_RK": LONG[0]}, "(8, 3, 4)"),
    ({"relative_RK": LONG[0, :, :, 0]}, "(8, 3)"),
    ({"mask": Mask(FOUR)}, "(4,)"),
    ({"mask": Mask(np.float32(1))}, "()"),
    ({"mask": Mask(THREE, wave=Wave(FOUR, THREE))}, "(4,)"),
    ({"mask": Mask(THREE, wave=Wave(THREE, FOUR))}, "(4,)"),
    ({"mask": Mask(THREE, ramp=0.0)}, "0.0"),
    ({"mask": Mask(THREE, ramp=-2.0)}, "-2.0"),
    ({"mask": Mask(THREE, wave=Wave(THREE, THREE, harmonics=0))}, "0"),
    ({"mask": Mask(THREE, wave=Wave(THREE, THREE, 10**9))}, "1000000000"),
  ],
  ids=lambda x: x if isinstance(x, str) else "",
)
def test_arguments_that_do_not_fit_are_named(changes, named):
  with pytest.raises(ValueError) as error:
    call(**arguments(**changes))
  message = str(error.value)
  assert named in message
  assert "\n" not in message


@pytest.mark.parametrize("kind", [np.float32, np.array, jnp.float32])
def test_a_number_that_is_static_may_be_of_any_kind(kind):
  ones = np.ones((2, 7, 3, 4), np.float32)
  given = arguments(v=ones, implementation="reference", dropout_seed=3)
  wave = Wave(2 * THREE, -0.25 * THREE, integer=True)
  plain = call(**given | {"mask": Mask(THREE, 3.0, wave)}, dropout_rate=0.5)
  assert np.ptp(plain) > 0.5
  wave = Wave(2 * THREE, -0.25 * THREE, integer=np.array(True))
  given["mask"] = Mask(THREE, kind(3.0), wave)
  found = call(**given, dropout_rate=kind(0.5))
  np.testing.assert_array_equal(found, plain)


def test_a_mask_keeps_the_numbers_that_it_was_made_of():
  """An array that changes is not what tells traced programs apart."""
  keys = np.random.default_rng(0).standard_normal((2, 7, 3, 4))
  given = arguments(k=keys.astype(np.float32), v=keys.astype(np.float32))
  ramp = np.array(1.5)
  mask = Mask(THREE, ramp)
  first = call(**given | {"mask": mask})
  is_open = masks.is_open(mask, np.arange(60))
  ramp[()] = 32.0
  np.testing.assert_array_equal(call(**given | {"mask": mask}), first)
  np.testing.assert_array_equal(masks.is_open(mask, np.arange(60)), is_open)
  wide = Mask(THREE, 32.0)
  assert np.abs(first - call(**given | {"mask": wide})).max() > 0.01
  assert not np.array_equal(masks.is_open(wide, np.arange(60)), is_open)


@pytest.mark.parametrize("name", ["dropout_rate", "ramp"])
def test_a_number_that_is_static_is_not_traced(name):
  def traced(x):
    if name == "ramp":
      return call(**arguments(mask=Mask(THREE, x)))
    return call(**arguments(dropout_rate=x, dropout_seed=3))

  with pytest.raises(ValueError, match=f"{name} is a .*; expected one number"):
    jax.jit(traced)(0.5)
  for other in ("0.5", 10**400, [0.5]):
    with pytest.raises(ValueError, match=f"{name} is a .*; expected one"):
      traced(other)


@pytest.mark.parametrize("wave", [False, True])
def test_blocked_memory_is_linear_in_the_length(wave):
  """Temporary bytes, forward and backward, are compared at T and 4 T."""

  def temporary(T):
    case = Case(
      "linear", T, T, (T / 2, 10.0), period=(4.0, 3.0), ratio=(-0.2, 0.1)
    )
    if not wave:
      case = case._replace(period=None, ratio=None)
    else:
      case = case._replace(integer=True)
    memory = compiled(case, "blocked").memory_analysis()
    return memory.temp_size_in_bytes

  assert temporary(4096) <= 4.2 * temporary(1024)


@pytest.mark.parametrize(
  "memory", [pytest.param(0, marks=pytest.mark.every_case), 700]
)
def test_band_and_stride_are_equal(memory, set_constant):
  """The result is the same whichever of them the cost model picks."""
  case = Case(
    "band or stride",
    600,
    600 + memory,
    (500.0, 40.0, 1e4, 0.0),
    period=(4.0, 3.0, 8.0, 2.0),
    ratio=(-0.2, -0.1, 0.1, 0.0),
    integer=True,
    memory=memory,
    dropout_rate=0.2,
    H=4,
  )
  sizes = blocked.sizes_of(case.mask, case.T, case.S)
  results, strides = [], []
  for cost in (0.0, 1e9):
    set_constant(walk, "_STRIDE_COST", cost)
    heads, _ = jax.jit(lambda mask: blocked.prepared(mask, 0, sizes))(case.mask)
    strides.append([int(P) for P in heads.stride])
    q, k, v, dout = inputs(case)
    results.append(
      jax.jit(differentiated(case, "blocked"))(q, k, v, case.mask, dout)
    )
  assert strides == [[4, 3, 8, 2], [1, 1, 1, 1]]
  # The same pairs are summed in another order.
  assert not np.array_equal(results[0]["out"], results[1]["out"])
  for name, value in results[0].items():
    scale = np.abs(results[1][name]).max()
    np.testing.assert_allclose(
      value, results[1][name], atol=2e-5 * scale, err_msg=name
    )
