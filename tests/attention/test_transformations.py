"""All implementations agree under JAX's transformations and switches."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from adaptive_attention import masks
from adaptive_attention.attention import attend, attend_ring
from adaptive_attention.attention.ring import Ring
from adaptive_attention.masks import Mask, Wave
from tests.attention.cases import Case, everywhere, inputs, mostly_blocked
from tests.attention.test_attention import check, differentiated, expected

# There are two query blocks, and all options of `attend` at once.
B, T, S, H, K, MEMORY = 2, 70, 80, 2, 4, 7


@functools.cache
def arguments():
  """Returns q, k, v, spans, periods, ratios and vectors of distances."""
  random = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(random.standard_normal(shape), jnp.float32)

  # These are arrays even if the first call is traced.
  with jax.ensure_compile_time_eval():
    return (
      *(normal(B, T, H, K), normal(B, S, H, K), normal(B, S, H, K)),
      *(
        jnp.array(x, jnp.float32)
        for x in ((9.5, 60.25), (3.2, 4.1), (0.05, -0.11))
      ),
      normal(50, K),
    )


def mask_of(span_H, period_H, ratio_H, integer=True):
  return Mask(span_H, 8.0, Wave(period_H, ratio_H, integer=integer))


def attention(implementation, dropout_rate=0.3, integer=True):
  """Returns a function of one tuple, that of `arguments`."""

  def call(arguments):
    q, k, v, *lengths, relative_RK = arguments
    return attend(
      *(q, k, v, mask_of(*lengths, integer=integer)),
      memory=MEMORY,
      first_key=3,
      relative_RK=relative_RK,
      dropout_rate=dropout_rate,
      dropout_seed=np.uint32(5) if dropout_rate else None,
      implementation=implementation,
    )

  return call


def tangents():
  random = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: jnp.asarray(random.standard_normal(x.shape), jnp.float32),
    arguments(),
  )


def loss(call):
  """Returns a scalar function that is not linear in attention's output."""
  return lambda arguments: jnp.sum(jnp.sin(call(arguments)) ** 2)


def several():
  return jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), arguments())


def repeated(call):
  """Returns a function that adds the output to the queries, three times."""

  def total(arguments):
    def again(q, _):
      return q + call((q, *arguments[1:])), None

    return jnp.sum(jax.lax.scan(again, arguments[0], None, length=3)[0])

  return total


TRANSFORMED = {
  "jit": lambda call: jax.jit(call)(arguments()),
  "grad": lambda call: jax.jit(jax.grad(loss(call)))(arguments()),
  "grad, op by op": lambda call: jax.grad(loss(call))(arguments()),
  "Hessian-vector, forward over reverse": lambda call: jax.jit(
    lambda *x: jax.jvp(jax.grad(loss(call)), *x)[1]
  )((arguments(),), (tangents(),)),
  "hessian of spans": lambda call: jax.jit(
    jax.hessian(lambda s: loss(call)((*arguments()[:3], s, *arguments()[4:])))
  )(arguments()[3]),
  "vmap": lambda call: jax.jit(jax.vmap(call))(several()),
  "vmap of grad": lambda call: jax.jit(jax.vmap(jax.grad(loss(call))))(
    several()
  ),
  "checkpoint": lambda call: jax.jit(
    jax.grad(
      jax.checkpoint(loss(call), policy=jax.checkpoint_policies.dots_saveable)
    )
  )(arguments()),
  "scan": lambda call: jax.jit(jax.grad(repeated(call)))(arguments()),
}


# These are made of the others, which are asked each time.
COMPOSED = "grad, op by op", "hessian of spans", "vmap", "checkpoint"


def assert_alike(found, expected, rtol=1e-4):
  """Compares arrays up to a share of the largest entry of each."""
  for one, other in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    assert one.dtype == other.dtype
    most = np.abs(other).max()
    np.testing.assert_allclose(one, other, atol=rtol * most)


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[pytest.mark.every_case] * (name in COMPOSED))
    for name in TRANSFORMED
  ],
)
def test_blocked_is_transformed_as_the_reference_is(name):
  transformed = TRANSFORMED[name]
  exact = transformed(attention("reference"))
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(exact))
  assert_alike(transformed(attention("blocked")), exact)


REFUSED = {
  "jvp": lambda call: jax.jvp(call, (arguments(),), (tangents(),)),
  "Hessian-vector, reverse over forward": lambda call: jax.grad(
    lambda x: jax.jvp(loss(call), (x,), (tangents(),))[1]
  )(arguments()),
  "grad of grad": lambda call: jax.grad(
    lambda x: jnp.sum(jax.grad(loss(call))(x)[0] ** 2)
  )(arguments()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_blocked_cannot_is_refused_and_not_zero(name):
  transformed = REFUSED[name]
  with pytest.raises((TypeError, ValueError, NotImplementedError)):
    jax.jit(lambda: transformed(attention("blocked"))).lower()
  jax.eval_shape(lambda: transformed(attention("reference")))


def from_ring(implementation, absent=0.0):
  """Returns a function of `arguments` whose older keys stand in a ring.

  Keys that do not exist yet hold `absent`.
  """
  random = np.random.default_rng(2)
  rows = random.standard_normal((2, B + 1, 2 * T, H, K)).astype(np.float32)
  rows[:, :, :9] = absent

  def call(arguments):
    q, k, v, *lengths, relative_RK = arguments
    new = k[:, -T:], v[:, -T:]
    out, _ = attend_ring(
      *(Ring(*rows, T, 1), q, *new, mask_of(*lengths)),
      first_key=9,
      relative_RK=relative_RK,
      implementation=implementation,
    )
    return out

  return call


def test_a_ring_has_no_second_derivatives_in_blocked():
  hessian_vector = TRANSFORMED["Hessian-vector, forward over reverse"]
  with pytest.raises(NotImplementedError, match="choose implementation='ref"):
    hessian_vector(from_ring("blocked"))
  exact = TRANSFORMED["grad"](from_ring("reference"))
  assert_alike(TRANSFORMED["grad"](from_ring("blocked")), exact)


SWITCHES = {
  "jax_enable_x64": lambda: jax.enable_x64(True),
  "jax_debug_nans": lambda: jax.debug_nans(True),
  "strict types and ranks": lambda: _both(
    jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise")
  ),
  "jax_default_matmul_precision": lambda: jax.default_matmul_precision(
    "highest"
  ),
}


@contextlib.contextmanager
def _both(one, other):
  with one, other:
    yield


@contextlib.contextmanager
def _all():
  with contextlib.ExitStack() as switches:
    for switch in SWITCHES.values():
      switches.enter_context(switch())
    yield


def value_and_gradients(call):
  out, pull = jax.vjp(call, arguments())
  return out, pull(jnp.ones_like(out))


@functools.cache
def plain(implementation, made):
  return jax.jit(lambda: value_and_gradients(made(implementation)))()


every_switch = pytest.mark.parametrize(
  "switch",
  [
    pytest.param(_all, id="all at once"),
    *(
      pytest.param(switch, id=name, marks=pytest.mark.every_case)
      for name, switch in SWITCHES.items()
    ),
  ],
)


@mostly_blocked
@pytest.mark.parametrize("made", [attention, from_ring])
@every_switch
def test_switches_change_nothing(switch, made, implementation):
  expected = plain(implementation, made)
  arguments()  # which are to be float32 under any switch
  with switch():
    found = jax.jit(lambda: value_and_gradients(made(implementation)))()
  # A precision may change the order of sums in products.
  assert_alike(found, expected, rtol=1e-6)


@every_switch
def test_switches_change_no_formula(switch):
  _, _, _, *lengths, _ = arguments()
  mask, distance = mask_of(*lengths, integer=False), np.arange(200)

  def formulas():
    return (
      masks.log_weight(mask, distance),
      masks.open_share(mask, 200),
      masks.penalty(mask),
      masks.span_weight(3, mask.span, 8.0),
      masks.triangle_wave(distance, mask.wave.period, 5),
    )

  expected = formulas()
  with switch():
    found = formulas()
  for one, other in zip(found, expected, strict=True):
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one, other)


def test_a_precision_is_that_of_the_call_in_the_backward_pass_too():
  """It is not the one that is set when the gradient is traced."""

  def text(precision):
    def run(q, k, v):
      with jax.default_matmul_precision(precision):
        return attend(q, k, v, None, implementation="blocked")

    q, k, v, *_ = arguments()
    k, v = k[:, -T:], v[:, -T:]
    return str(jax.make_jaxpr(lambda: jax.vjp(run, q, k, v)[1](q))())

  products = text("highest").count("dot_general")
  assert text("highest").count("Precision.HIGHEST") >= products > 0
  assert "HIGHEST" not in text(None)


@mostly_blocked
@pytest.mark.parametrize(
  "sharded", ["batch", pytest.param("heads", marks=pytest.mark.every_case)]
)
def test_inside_shard_map(implementation, sharded):
  """Its default checks are on. Shared arrays get all devices' gradients."""
  P = PartitionSpec
  by_batch = (P("d"),) * 3 + (P(),) * 4
  by_head = (P(None, None, "d"),) * 3 + (P("d"),) * 3 + (P(),)
  specs = by_batch if sharded == "batch" else by_head
  call = attention(implementation, dropout_rate=0.0)
  mapped = jax.shard_map(
    call,
    mesh=Mesh(np.array(jax.devices()[:2]), ("d",)),
    in_specs=(specs,),
    out_specs=specs[0],
  )
  assert_alike(
    jax.jit(lambda: value_and_gradients(mapped))(),
    jax.jit(lambda: value_and_gradients(call))(),
    rtol=1e-5,
  )


@pytest.mark.parametrize("spec", [("d",), (None, None, "d"), ()])
def test_along_explicit_axes_the_reference_serves(spec):
  """Arrays that are not dealt are for `blocked`, whatever the mesh."""
  mesh = Mesh(
    np.array(jax.devices()[:2]), ("d",), axis_types=(AxisType.Explicit,)
  )
  rows = NamedSharding(mesh, PartitionSpec(*spec))
  q, k, v = (jax.device_put(x[:2], rows) for x in arguments()[:3])

  def run(implementation=None):
    memory = k.shape[1] - q.shape[1]
    return attend(q, k, v, None, memory=memory, implementation=implementation)

  exact = run("reference")
  np.testing.assert_allclose(run(), exact, atol=1e-5)
  if spec:
    with pytest.raises(NotImplementedError, match=r"explicit mesh axes \(d\)"):
      run("blocked")
  else:
    np.testing.assert_allclose(run("blocked"), exact, atol=1e-5)


@mostly_blocked
@pytest.mark.parametrize(
  "absent", [np.nan, pytest.param(np.inf, marks=pytest.mark.every_case)]
)
@pytest.mark.parametrize("where", ["kv", "ring"])
def test_keys_that_do_not_exist_do_not_matter(implementation, where, absent):
  if where == "ring":
    call = from_ring(implementation, absent)
    spoiled = jax.jit(lambda: value_and_gradients(call))()
    clean = plain(implementation, from_ring)
  else:
    call = attention(implementation)

    def spoil(arguments):
      q, k, v, *rest = arguments
      k, v = (x.at[:, :3].set(absent) for x in (k, v))
      return call((q, k, v, *rest))

    spoiled = jax.jit(lambda: value_and_gradients(spoil))()
    clean = plain(implementation, attention)
  assert_alike(spoiled, clean, rtol=1e-6)


@mostly_blocked
@pytest.mark.parametrize(
  "integer", [True, pytest.param(False, marks=pytest.mark.every_case)]
)
def test_arrays_of_numpy_that_are_read_only(implementation, integer):
  arrays = [np.array(x) for x in arguments()]
  for array in arrays:
    array.flags.writeable = False
  call = attention(implementation, integer=integer)
  np.testing.assert_allclose(call(tuple(arrays)), call(arguments()), atol=1e-6)


@everywhere
def test_a_batch_of_none(implementation):
  q, k, v, *rest = arguments()
  none = (q[:0], k[:0], v[:0], *rest)

  @jax.jit
  def value_and_gradients(none):
    out, pull = jax.vjp(attention(implementation), none)
    return out, *pull(out)

  out, gradients = value_and_gradients(none)
  assert out.shape == (0, T, H, K)
  for gradient, array in zip(gradients, none, strict=True):
    assert gradient.shape == array.shape
    assert not np.any(gradient)


@pytest.mark.parametrize(
  "implementation",
  [pytest.param("blocked", marks=pytest.mark.every_case), "reference"],
)
def test_bfloat16_op_by_op(implementation):
  """Each operation runs by itself; XLA may then sum products in bfloat16."""
  case = Case("dense_bfloat16_batch", 96, 96, B=2, K=32, dtype="bfloat16")
  q, k, v, dout = inputs(case)
  with jax.disable_jit():
    found = differentiated(case, implementation)(q, k, v, None, dout)
  check(found, expected(case), case)
