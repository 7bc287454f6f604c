"""The Pallas kernels against the oracle: interpreted on a CPU, or on a device.

Numbers of the cases are held as those of all implementations are, and more
closely on cases of several blocks. What compilers say is in `test_compiled`.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.extend import core
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from adaptive_attention import attention
from adaptive_attention.attention import (
  attend,
  attend_ring,
  choice,
  pallas_gpu,
  pallas_tpu,
)
from adaptive_attention.attention.ring import Ring
from adaptive_attention.bench.cases import Case
from adaptive_attention.masks import Mask, Wave
from tests.attention.cases import CASES, inputs
from tests.attention.test_attention import (
  check,
  expected,
  heads_in_several_calls,
)
from tests.pairs import in_turn

BACKEND = jax.default_backend()
INTERPRETED = BACKEND == "cpu"
KERNELS = ("pallas_tpu", "pallas_gpu")
if not INTERPRETED:
  KERNELS = (f"pallas_{BACKEND}",)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="it is interpreted")
two_devices = pytest.mark.skipif(
  jax.device_count() < 2, reason="there is one device"
)
everywhere = pytest.mark.parametrize("kernel", KERNELS)
by_hand = pytest.mark.every_case

# What `LENGTHS` below does not bring. (Every case: see CONTRIBUTING.md.)
NAMES = (
  *("dense_dropout", "one_query", "first_key_last", "sharp"),
  *("stride_at_the_bounds", "wave_closed_and_off"),
  *("grouped", "grouped_integer"),
)
NAMED = {case.name: case for case in CASES if case.name in NAMES}
# Several blocks in each direction. 365 is a little less than the edge where a
# block becomes full, and so is 495 under a stride of 2. The last span hides
# nothing.
LONG = Case(
  "several blocks",
  700,
  700,
  span=(365.0, 495.0, 4000.0),
  period=(5.713, 2.037, 3.307),
  ratio=(-0.1037, 0.0813, 0.0531),
  H=3,
  K=32,
  B=2,
)
LENGTHS = (
  LONG._replace(name="spans", period=None, ratio=None),
  LONG._replace(name="wave", S=827, memory=50, first_key=17),
  LONG._replace(name="series, dropout", harmonics=5, dropout_rate=0.2),
  LONG._replace(
    name="integer, dropout",
    S=827,
    first_key=17,
    memory=127,
    integer=True,
    dropout_rate=0.1,
  ),
)
# The GPU's kernel computes its weights, and reads those of float32. The TPU's
# blocks, of 256 here, have two parts.
WAVE_BFLOAT16 = LENGTHS[1]._replace(name="wave, bfloat16", dtype="bfloat16")
CLOSELY = [
  ("pallas_tpu", LENGTHS[3]),
  ("pallas_tpu", WAVE_BFLOAT16._replace(T=300, S=427, dropout_rate=0.1)),
  ("pallas_gpu", LENGTHS[3]),
  ("pallas_gpu", WAVE_BFLOAT16),
]


def gradients(call, q, k, v, mask, dout):
  """Returns call(q, k, v, mask) and its gradients, by name."""
  out, pull = jax.vjp(call, q, k, v, mask)
  dq, dk, dv, dmask = pull(dout)
  result = {"out": out, "dq": dq, "dk": dk, "dv": dv}
  if mask is not None:
    result["dspan"] = dmask.span
    if mask.wave is not None:
      result |= {"dperiod": dmask.wave.period, "dratio": dmask.wave.ratio}
  return result


def run_function(kernel, case, interpret=INTERPRETED):
  """Returns a function of `arguments`: out and gradients by name."""
  call = functools.partial(
    attend, implementation=kernel, interpret=interpret, **case.options
  )
  return functools.partial(gradients, call)


def arguments(case):
  q, k, v, dout = inputs(case)
  return q, k, v, case.mask, dout


@pytest.mark.parametrize(
  ("case", "kernel"),
  in_turn(NAMED.values(), KERNELS),
  ids=lambda x: getattr(x, "name", x),
)
def test_value_and_gradients(case, kernel):
  found = jax.jit(run_function(kernel, case))(*arguments(case))
  check(found, expected(case), case)


@pytest.mark.every_case
@everywhere
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case(case, kernel):
  if not (case.relative or case.segments or case.padding):  # or it is refused
    test_value_and_gradients(case, kernel)


def check_closely(found, case):
  """5e-6 of the largest entry of float32, 1.5e-2 of bfloat16."""
  exact = expected(case)
  bound = 5e-6 if case.dtype == "float32" else 1.5e-2
  for name, value in found.items():
    reference = getattr(exact, name)
    error = np.abs(np.asarray(value, np.float64) - reference).max()
    assert error <= bound * np.abs(reference).max(), (name, error)


@pytest.mark.parametrize(
  ("kernel", "case"),
  [
    *((kernel, case) for kernel, case in CLOSELY if kernel in KERNELS),
    *(
      pytest.param(kernel, case, marks=by_hand)
      for kernel in KERNELS
      for case in LENGTHS
      if (kernel, case) not in CLOSELY
    ),
  ],
  ids=lambda x: getattr(x, "name", x),
)
def test_several_blocks_closely_and_the_same_bits_again(case, kernel):
  run = jax.jit(run_function(kernel, case)).lower(*arguments(case)).compile()
  first, again = run(*arguments(case)), run(*arguments(case))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  check_closely(first, case)


def on_a_device(test):
  """Interpreted it is of `every_case`."""
  return pytest.mark.every_case(test) if INTERPRETED else test


@on_a_device
@everywhere
@pytest.mark.parametrize("K", [16, 32, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", LENGTHS, ids=lambda case: case.name)
def test_any_width(case, dtype, K, kernel):
  """By products of all sizes, of which a tensor core has its own."""
  case = case._replace(K=K, dtype=dtype)
  found = jax.jit(run_function(kernel, case))(*arguments(case))
  check(found, expected(case), case)
  if dtype == "float32":
    check_closely(found, case)


@pytest.mark.every_case  # it is slow
@interpreted
def test_what_is_not_written_is_not_read():
  """InterpretParams fills memory of a TPU that nobody wrote with nan."""
  spans = 165.0, 295.0, 4000.0
  case = LENGTHS[3]._replace(T=300, S=427, span=spans, name="integer, nan")
  interpret = pltpu.InterpretParams()
  run = jax.jit(run_function("pallas_tpu", case, interpret))
  check_closely(run(*arguments(case)), case)


@pytest.mark.skipif("pallas_tpu" not in KERNELS, reason="it is of a TPU")
def test_two_passes_are_one(set_constant):
  """Of a head whose gradients do not fit into VMEM."""
  case = LENGTHS[3]._replace(T=300, S=427, name="integer, two passes")
  case = case._replace(span=(165.0, 295.0, 4000.0))
  set_constant(pallas_tpu, "MOST_VMEM_BYTES", 0)
  traced = jax.jit(run_function("pallas_tpu", case)).trace(*arguments(case))
  assert str(traced.jaxpr).count("pallas_call[") == 3  # forward, dq, dk and dv
  check_closely(traced.lower().compile()(*arguments(case)), case)


def kernel_results(jaxpr):
  """Yields the shape of each array that a kernel writes."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      yield from (x.aval.shape for x in equation.outvars)
    else:
      for inner in core.jaxprs_in_params(equation.params):
        yield from kernel_results(inner)


@everywhere
@pytest.mark.parametrize("wave", [False, True])
def test_memory_costs_no_gradient(kernel, wave):
  """Of its keys nothing is written."""
  T, S, K = 128, 4096, 48
  q, k = (jax.ShapeDtypeStruct((1, n, 2, K), jnp.float32) for n in (T, S))
  length = jax.ShapeDtypeStruct((2,), jnp.float32)

  def loss(q, k, v, span, period, ratio):
    mask = Mask(span, 8.0, Wave(period, ratio, integer=True) if wave else None)
    options = {"memory": S - T, "implementation": kernel}
    return jnp.sum(attend(q, k, v, mask, interpret=INTERPRETED, **options))

  gradients = jax.grad(loss, range(6))
  jaxpr = jax.make_jaxpr(gradients)(q, k, k, *[length] * 3).jaxpr
  shapes = list(kernel_results(jaxpr))
  assert len(shapes) >= 5  # out, logsumexp, dq, dk, dv
  assert not [x for x in shapes if K in x and max(x) >= S]


@everywhere
def test_out_of_a_ring(kernel):
  """Rows go on from the last to the first, among those of other streams."""
  case = LENGTHS[3]._replace(T=300, S=427, memory=127, first_key=50)
  q, k, v, mask, dout = arguments(case)
  first_row, older = int(0.95 * case.S), case.S - case.T

  def rows(x):
    x = x.at[:, : case.first_key].set(jnp.nan)  # what does not exist yet
    x = jnp.concatenate([jnp.full_like(x[:, older:], 7.0), x[:, :older]], 1)
    others = (2, 1), (0, 0), (0, 0), (0, 0)
    return jnp.pad(
      jnp.roll(x, first_row, axis=1), others, constant_values=jnp.nan
    )

  def call(q, k, v, mask):
    ring = Ring(
      rows(arguments(case)[1]), rows(arguments(case)[2]), first_row, 2
    )
    options = {"implementation": kernel, "interpret": INTERPRETED}
    options |= case.options
    del options["memory"]
    return attend_ring(ring, q, k, v, mask, **options)[0]

  new = k[:, older:], v[:, older:]
  found = jax.jit(functools.partial(gradients, call))(q, *new, mask, dout)
  exact = expected(case)
  newer = {name: getattr(exact, name)[:, older:] for name in ("dk", "dv")}
  scale = exact.scale | {name: exact.scale[name][:, older:] for name in newer}
  check(found, exact._replace(**newer, scale=scale), case)


@pytest.mark.parametrize(
  "kernel",
  [
    pytest.param(name, marks=by_hand)
    if INTERPRETED and name == "pallas_tpu"
    else name
    for name in KERNELS
  ],
)
def test_heads_in_several_calls(kernel):
  heads_in_several_calls(kernel, interpret=INTERPRETED)


SMALL = Case(
  "small",
  *(70, 80, (9.5, 60.25)),
  ramp=8.0,
  period=(3.2, 4.1),
  ratio=(0.05, -0.11),
  memory=7,
  first_key=3,
  dropout_rate=0.3,
  B=2,
  K=16,
)


LENGTHS_OF = "span", "period", "ratio"
# Two heads of keys serve two heads each.
GROUPED = SMALL._replace(
  span=(9.5, 60.25, 30.5, 0.0),
  period=(3.2, 4.1, 2.5, 7.7),
  ratio=(0.05, -0.11, 0.1, 0.0),
  H=4,
  G=2,
)


def loss(kernel):
  """A function of (q, k, v, spans, periods, ratios): not linear in the output.

  "blocked" is what kernels are compared with.
  """

  def total(q, k, v, *lengths):
    return jnp.sum(jnp.sin(attended(kernel, q, k, v, *lengths)) ** 2)

  return total


def attended(kernel, q, k, v, span, period, ratio):
  return attend(
    *(q, k, v, Mask(span, 8.0, Wave(period, ratio))),
    **SMALL.options,
    implementation=kernel,
    interpret=INTERPRETED and kernel in KERNELS,
  )


def six(case=SMALL):
  q, k, v, mask, _ = arguments(case)
  return q, k, v, mask.span, mask.wave.period, mask.wave.ratio


def several():
  return [jnp.stack([x, 1.1 * x, 0.9 * x]) for x in six()]


def repeated(kernel):
  def total(q, *rest):
    def again(q, _):
      return q + attended(kernel, q, *rest), None

    return jnp.sum(jax.lax.scan(again, q, None, length=3)[0] ** 2)

  return total


def mapped(kernel):
  one = jax.grad(loss(kernel), range(6))
  return jax.pmap(one)(*(x[:2] for x in several()))


TRANSFORMED = {
  "vmap": lambda f: jax.jit(jax.vmap(jax.grad(loss(f), range(6))))(*several()),
  "checkpoint": lambda f: jax.jit(jax.grad(jax.checkpoint(loss(f)), range(6)))(
    *six()
  ),
  "scan": lambda f: jax.jit(jax.grad(repeated(f), range(6)))(*six()),
  "pmap": mapped,
}


def assert_alike(found, exact, rtol=2e-5):
  """To a share of the largest entry of each array."""
  for one, other in zip(found, exact, strict=True):
    assert np.abs(other).max() > 0
    np.testing.assert_allclose(one, other, atol=rtol * np.abs(other).max())


# What surrounds a kernel is the same for both but under `vmap`, where a list of
# items is walked in turn, so by default each of the others meets one of them.
@pytest.mark.parametrize(
  ("name", "kernel"),
  [
    *(("vmap", kernel) for kernel in KERNELS),
    ("checkpoint", KERNELS[0]),
    ("scan", KERNELS[-1]),
    pytest.param("pmap", KERNELS[0], marks=two_devices),
    *(
      pytest.param(name, kernel, marks=[by_hand, two_devices])
      for name, kernel in [
        ("checkpoint", KERNELS[-1]),
        ("scan", KERNELS[0]),
        ("pmap", KERNELS[-1]),
      ]
      if len(KERNELS) > 1
    ),
  ],
)
def test_transformed(name, kernel):
  transformed = TRANSFORMED[name]
  assert_alike(transformed(kernel), transformed("blocked"))


def mesh_of(kind):
  return Mesh(np.array(jax.devices()[:2]), ("devices",), axis_types=(kind,))


DEALT = [
  (KERNELS[-1], 0, SMALL),
  (KERNELS[0], 2, SMALL),
  (KERNELS[-1], 2, GROUPED._replace(G=2)),
  (KERNELS[-1], 2, GROUPED._replace(G=1)),
]


@two_devices
@pytest.mark.parametrize(
  ("kind", "kernel", "axis", "case"),
  [
    *(
      pytest.param(AxisType.Auto, *dealt, marks=marks)
      for dealt, marks in zip(DEALT, [(), by_hand, (), by_hand], strict=True)
    ),
    *(
      pytest.param(AxisType.Explicit, *dealt, marks=marks)
      for dealt, marks in zip(DEALT, [by_hand, (), (), by_hand], strict=True)
    ),
  ],
)
def test_dealt_to_devices_it_is_what_one_computes(kind, kernel, axis, case):
  """Nothing is gathered, and dropout draws as on one device."""
  mesh = mesh_of(kind)
  spec = [None] * 4
  spec[axis] = "devices"
  rows = NamedSharding(mesh, PartitionSpec(*spec))
  lengths = NamedSharding(mesh, PartitionSpec("devices" if axis else None))
  inputs = six(case)
  whole = NamedSharding(mesh, PartitionSpec())  # of one head for all devices
  dealt = [
    jax.device_put(
      x, lengths if x.ndim == 1 else rows if x.shape[axis] > 1 else whole
    )
    for x in inputs
  ]
  run = jax.jit(jax.value_and_grad(loss(kernel), range(6)))
  with jax.set_mesh(mesh):
    compiled = run.lower(*dealt).compile()
  assert "all-gather" not in compiled.as_text()
  value, found = compiled(*dealt)
  assert found[0].sharding.is_equivalent_to(rows, 4)
  exact_value, exact = run(*inputs)
  np.testing.assert_allclose(value, exact_value, rtol=1e-5)
  assert_alike(found, exact)


# How q, keys and values, and lengths are dealt.
OWN_WAYS = [
  ((None, None, "devices"), (None, None, "devices"), None),
  (("devices",), (), None),
  ((None, "devices"), ("devices",), "devices"),
  ((), (None, None, "devices"), None),
]


@two_devices
@pytest.mark.parametrize(
  ("ways", "kernel"),
  [
    *in_turn(OWN_WAYS[:2], KERNELS),
    *(
      pytest.param(ways, kernel, marks=by_hand)
      for ways in OWN_WAYS[2:]
      for kernel in KERNELS
    ),
  ],
)
def test_each_array_may_be_dealt_in_its_own_way(ways, kernel):
  """Its gradient is dealt as it is."""
  of_queries, of_keys, of_lengths = ways
  specs = of_queries, of_keys, of_keys, *[(of_lengths,)] * 3
  mesh = mesh_of(AxisType.Explicit)
  shardings = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs]
  arrays = [
    jax.device_put(*pair) for pair in zip(six(), shardings, strict=True)
  ]
  with jax.set_mesh(mesh):
    found = jax.jit(jax.grad(loss(kernel), range(6)))(*arrays)
  for gradient, sharding in zip(found, shardings, strict=True):
    assert gradient.sharding.is_equivalent_to(sharding, gradient.ndim)
  assert_alike(found, jax.jit(jax.grad(loss("blocked"), range(6)))(*six()))


# Which of q, k, v, span, period and ratio are mapped over along a dealt axis,
# and how often.
MAPPED = {
  "all": (slice(0, 6), 1),
  "queries": (slice(0, 1), 1),
  "lengths": (slice(3, 6), 1),
  "twice": (slice(0, 6), 2),
}


@two_devices
@pytest.mark.parametrize(
  ("which", "kernel"),
  [
    ("all", KERNELS[0]),
    ("queries", KERNELS[-1]),
    ("lengths", KERNELS[0]),
    ("twice", KERNELS[-1]),
    *(
      pytest.param(which, kernel, marks=by_hand)
      for which, kernel in [
        ("all", KERNELS[-1]),
        ("queries", KERNELS[0]),
        ("lengths", KERNELS[-1]),
        ("twice", KERNELS[0]),
      ]
      if len(KERNELS) > 1
    ),
  ],
)
def test_mapped_over_an_axis_that_is_dealt(which, kernel):
  """Each device maps over its own part, and nothing is gathered."""
  some, times = MAPPED[which]
  arrays, where = [*six()], [None] * 6
  arrays[some] = [jnp.stack([x, 1.1 * x]) for x in arrays[some]]
  where[some] = [0] * len(arrays[some])
  if times == 2:
    arrays = [jnp.stack([x, 0.9 * x]) for x in arrays]
  mesh = mesh_of(AxisType.Explicit)
  mapped, whole = (
    NamedSharding(mesh, PartitionSpec(*spec)) for spec in [("devices",), ()]
  )
  dealt = [
    jax.device_put(x, whole if axis is None else mapped)
    for x, axis in zip(arrays, where, strict=True)
  ]

  def gradients(kernel):
    run = jax.grad(loss(kernel), range(6))
    for _ in range(times):
      run = jax.vmap(run, where)
    return jax.jit(run)

  with jax.set_mesh(mesh):
    compiled = gradients(kernel).lower(*dealt).compile()
  assert "all-gather" not in compiled.as_text()
  found = compiled(*dealt)
  assert found[0].sharding.is_equivalent_to(mapped, found[0].ndim)
  assert_alike(found, gradients("blocked")(*arrays))


@two_devices
def test_heads_of_keys_that_cannot_be_dealt_evenly_are_brought_together():
  """There are three for two devices, and each computes all heads."""
  case = GROUPED._replace(
    **{x: getattr(GROUPED, x) + getattr(SMALL, x) for x in LENGTHS_OF}, H=6, G=3
  )
  heads = NamedSharding(
    mesh_of(AxisType.Auto), PartitionSpec(None, None, "devices")
  )
  q, *others = six(case)
  run = jax.jit(jax.value_and_grad(loss(KERNELS[-1]), range(6)))
  value, found = run(jax.device_put(q, heads), *others)
  exact_value, exact = run(q, *others)
  np.testing.assert_allclose(value, exact_value, rtol=1e-5)
  assert_alike(found, exact)


@two_devices
def test_inside_shard_map(kernel=KERNELS[-1]):
  """Each device has a stream, and all have the same masks."""
  mesh = mesh_of(AxisType.Auto)
  specs = (PartitionSpec("devices"),) * 3 + (PartitionSpec(),) * 3
  arrays = [jnp.concatenate([x[:1]] * 2) for x in six()[:3]] + [*six()[3:]]

  def total(*arrays):
    out = jax.shard_map(
      functools.partial(attended, kernel),
      mesh=mesh,
      in_specs=specs,
      out_specs=specs[0],
      check_vma=False,  # of what is interpreted, not of a kernel
    )(*arrays)
    return jnp.sum(jnp.sin(out[:1]) ** 2)

  found = jax.jit(jax.grad(total, range(6)))(*arrays)
  one = [x[:1] for x in arrays[:3]] + arrays[3:]
  exact = jax.jit(jax.grad(loss("blocked"), range(6)))(*one)
  assert_alike([x[:1] for x in found[:3]] + [*found[3:]], exact)


@pytest.mark.parametrize(
  "kernel",
  [
    KERNELS[-1],
    *(pytest.param(k, marks=by_hand) for k in KERNELS[:-1]),
  ],
)
def test_new_lengths_do_not_trace_again(kernel):
  traces = []

  def gradient(implementation):
    def loss(q, k, v, span, period, ratio, first_key):
      traces.append(implementation)
      out = attend(
        *(q, k, v, Mask(span, 8.0, Wave(period, ratio, integer=True))),
        first_key=first_key,
        implementation=implementation,
        interpret=INTERPRETED and implementation == kernel,
      )
      return jnp.sum(out**2)

    return jax.jit(jax.grad(loss))

  one, other = gradient(kernel), gradient("blocked")
  q, k, v, span, period, ratio = six()
  for changed in (
    (span, period, ratio, 3),
    (span / 3, period, ratio, 3),
    (span, 2 * period, ratio, 3),
    (span, period, ratio, 70),
  ):
    assert_alike([one(q, k, v, *changed)], [other(q, k, v, *changed)])
  assert traces.count(kernel) == 1


def call_with(**changes):
  x = jax.ShapeDtypeStruct((1, 8, 2, changes.pop("K", 16)), jnp.float32)
  options = {"implementation": "pallas_gpu", "interpret": True} | changes
  T = options.pop("T", 8)
  x = jax.ShapeDtypeStruct((1, T, *x.shape[2:]), x.dtype)
  return jax.eval_shape(lambda q: attend(q, q, q, None, **options), x)


@interpreted
@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"interpret": False}, "capability 8.0 or later and the device is cpu"),
    (
      {"interpret": False, "implementation": "pallas_tpu"},
      "TPU v5e or later and the device is cpu",
    ),
    ({"relative_RK": np.zeros((3, 16), np.float32)}, "relative_RK"),
    ({"K": 257}, "width of 256, not 257"),
    ({"K": 257, "implementation": "pallas_tpu"}, "width of 256, not 257"),
    ({"T": 1 << 17, "implementation": "pallas_tpu"}, "; T="),
  ],
)
def test_what_a_kernel_cannot_is_refused_by_name(changes, named):
  with pytest.raises(NotImplementedError, match="does not serve here") as error:
    call_with(**changes)
  assert named in str(error.value)
  assert "\n" not in str(error.value)


def call_of(T, S, H, strided=False):
  return choice.Call(1, T, S, H, K=64, itemsize=2, strided=strided)


@pytest.mark.parametrize(
  ("call", "reason", "changed"),
  [
    (call_of(100_000, 100_000, 8), "list of blocks", "T"),
    (call_of(2**17, 2**17, 8, strided=True), "list of blocks", "T"),
    (call_of(2**30, 2**31 - 1, 8), "can name", "T"),
    (call_of(512, 512 + 2**23, 8), "list of blocks", "S"),
    (call_of(1, 2**25, 1), "can name", "S"),
    (call_of(512, 512 + 2**18, 1, strided=True), "by distance", "S"),
    (call_of(1, 1, 70_000), "can name", "H"),
    (call_of(100_000, 100_000, 100_000), "can name", "H"),
  ],
)
def test_what_exceeds_a_tpu_is_told_with_what_would_fit(call, reason, changed):
  told = pallas_tpu.refusal(call)
  most = int(re.fullmatch(rf".*{reason}.*; {changed}=(\d+) would fit", told)[1])

  def refusal(n):
    changes = {changed: n} | ({"S": n} if changed == "T" else {})
    return pallas_tpu.refusal(call._replace(**changes))

  assert 1 <= most < getattr(call, changed)
  assert not refusal(most)
  assert refusal(most + 1)


@pytest.mark.parametrize("module", [pallas_gpu, pallas_tpu])
def test_blocks_are_as_long_as_their_rows_allow(module):
  def blocks(T, S):
    return module.launch(call_of(T, S, 8)).forward_blocks

  long_q, long_k = blocks(8192, 8192)
  short_q, short_k = blocks(1, 1)
  assert short_q < long_q
  assert short_k < long_k
  assert blocks(1, 8192) == (short_q, long_k)


@everywhere
def test_a_second_derivative_is_refused(kernel):
  with pytest.raises(NotImplementedError, match="no second derivatives"):
    jax.jvp(jax.grad(loss(kernel)), six(), six())


class Device:
  """What a choice asks of a device."""

  def __init__(self, platform, kind, capability=None):
    self.platform, self.device_kind = platform, kind
    if capability:
      self.compute_capability = capability


CALL = choice.Call(B=1, T=512, S=512, H=8, K=64, itemsize=2, strided=True)


@pytest.mark.parametrize(
  ("device", "changes", "chosen", "reason"),
  [
    (Device("cpu", "cpu"), {}, "blocked", ""),
    (Device("tpu", "TPU v5 lite"), {}, "pallas_tpu", ""),
    (Device("tpu", "TPU v6 lite"), {}, "pallas_tpu", ""),
    (Device("tpu", "TPU v4"), {}, "reference", "the device is TPU v4"),
    (Device("tpu", "TPU v4"), {"T": 8192, "S": 8192}, "blocked", "TPU v4"),
    (Device("gpu", "NVIDIA H100", "9.0"), {}, "pallas_gpu", ""),
    (Device("gpu", "NVIDIA A100", "8.0"), {}, "pallas_gpu", ""),
    (Device("gpu", "Tesla V100", "7.0"), {}, "reference", "Tesla V100"),
    (Device("gpu", "AMD MI300", "gfx942"), {}, "reference", "AMD MI300"),
    (
      Device("gpu", "NVIDIA H100", "9.0"),
      {"relative": True},
      "reference",
      "relative_RK",
    ),
    (Device("tpu", "TPU v5 lite"), {"K": 512}, "reference", "not 512"),
    (Device("metal", "M3"), {}, "reference", "no kernel for the device M3"),
  ],
)
def test_the_best_that_serves(device, changes, chosen, reason, monkeypatch):
  monkeypatch.setattr(choice, "device", lambda: device)
  found = choice.chosen(CALL._replace(**changes))
  assert found.implementation == chosen
  assert reason in found.reason
  assert bool(found.reason) == bool(reason)
  text = str(found)
  assert text.startswith(chosen)
  assert reason in text
  if chosen.startswith("pallas"):
    assert " x " in text


def test_the_pairs_of_a_kernel_are_counted_in_its_blocks():
  mask = Mask(np.float32([0.0, 1e4]), 1.0)
  pairs = attention.computed_pairs(
    mask, 700, 700, implementation="pallas_gpu", head_width=128
  )
  np.testing.assert_array_equal(pairs, [n * 32**2 for n in (22, 253)])
