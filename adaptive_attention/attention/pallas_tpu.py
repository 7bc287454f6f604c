"""Attention under learned masks on a TPU: Pallas kernels over a list of blocks.

`pallas_tpu_kernels` has the kernels, `pallas_tpu_item` what a step of their
grid knows, `pallas_tpu_layout` where rows stand, `pallas_tpu_launch` sizes of
blocks and what a TPU holds, and `pallas_attend` what is around all of them.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from adaptive_attention.attention import (
  pallas_attend,
  pallas_tpu_kernels,
  pallas_tpu_launch,
  walk_items,
)
from adaptive_attention.attention.pallas_attend import (
  Gradients,
  Inputs,
  Kernels,
  Outputs,
  Static,
  cost,
  gradient_dtype,
  heads_of,
  result,
  slopes_of,
  table_of,
)
from adaptive_attention.attention.pallas_tpu_item import (
  LANES,
  Scalars,
  place_of,
  scalars_of,
)
from adaptive_attention.attention.pallas_tpu_launch import (
  MOST_VMEM_BYTES,
  launch,
  table_bytes,
)
from adaptive_attention.attention.pallas_tpu_layout import (
  SUBLANES,
  Geometry,
  Layout,
  distances,
)

_MIB = 1 << 20
_SCOPED_BYTES = 12 * _MIB  # of the 16 MiB of VMEM that a kernel has unasked


def _geometry(static: Static) -> Geometry:
  return Geometry(static, static.launch.block_q, static.launch.block_k)


class _Plan:
  """What all kernels of a call need: the walk, rows, and lines of weights."""

  def __init__(self, static: Static, inputs: Inputs):
    self.static, self.inputs = static, inputs
    self.geometry = _geometry(static)
    self.heads = heads_of(inputs, static, self.geometry.sizes)
    self.layout = Layout(self.geometry, self.heads, inputs.first_row)
    self.K = inputs.q_BTHK.shape[3]
    self.B, self.H = inputs.q_BTHK.shape[0], len(inputs.head_H)

  def table(self):
    """Returns (H * lines, 1, length) the log weights by entry."""
    table_HLE = table_of(self.inputs, self.distances(), self.static.S)
    return table_HLE.reshape(-1, 1, self.geometry.length)

  def distances(self):
    return distances(self.heads.stride, self.geometry)

  def listed(self, rows):
    """Returns (number of items, Scalars) of a walk sorted by `rows`."""
    items = walk_items.items(self.heads, self.geometry.sizes, rows)
    scalars = scalars_of(items, self.heads, self.inputs, self.geometry)
    return items.count, scalars

  def struct(self, kind, dtype=None):
    """Returns shape and dtype of an array of rows, and its kind."""
    dtype = dtype or self.inputs.q_BTHK.dtype
    geometry, wide = self.geometry, self.K + -self.K % SUBLANES
    shape = {
      "qT": (wide, geometry.query_rows),
      "k": (geometry.key_rows, wide),
      "number": (1, geometry.query_rows),
      "table": (geometry.lines, 1, geometry.length),
    }[kind]
    return result(self.inputs, (self.B, self.H, *shape), dtype)

  def call(self, kernel, walked, given, found, scratch, vmem_bytes=None):
    """Calls a kernel for each stream and item.

    Args:
      kernel: of `pallas_tpu_kernels`.
      walked: what `listed` returns.
      given, found: (array, kind) of what is read, (shape, kind) of results.
      scratch: shapes of sums in float32.
      vmem_bytes: more VMEM than a kernel has unasked.
    """
    count, scalars = walked
    spec = functools.partial(_spec, self.geometry)
    return pl.pallas_call(
      functools.partial(kernel, self.geometry, self.K),
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(scalars),
        grid=(self.B, count),
        in_specs=[spec(x.shape, kind) for x, kind in given],
        out_specs=[spec(x.shape, kind) for x, kind in found],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
      ),
      out_shape=[x for x, _ in found],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"),
        vmem_limit_bytes=vmem_bytes,
      ),
      cost_estimate=cost(
        self.static,
        _PRODUCTS[kernel],
        [self.inputs.q_BTHK, *(x for x, _ in given)],
        [x for x, _ in found],
      ),
      interpret=self.static.interpret,
      name=f"adaptive_attention_{kernel.__name__}",
    )(*scalars, *(x for x, _ in given))


def _spec(geometry, shape, kind):
  """Returns the part of an array that an item (b, g) gets."""

  def at(index):
    """Index maps get the grid's indices and then what stands in SMEM."""
    return lambda b, g, *scalars: index(
      b, place_of(geometry, Scalars(*scalars), g)
    )

  match kind:
    case "qT" | "number":  # (B, H, K or 1, rows)
      block = None, None, shape[2], geometry.block_q
      return pl.BlockSpec(block, at(lambda b, it: (b, it.head, 0, it.q)))
    case "k":  # (B, H, rows, K)
      block = None, None, geometry.block_k, shape[3]
      return pl.BlockSpec(block, at(lambda b, it: (b, it.head, it.k, 0)))
    case "kT":  # (B, H, K, rows)
      block = None, None, shape[2], geometry.block_k
      return pl.BlockSpec(block, at(lambda b, it: (b, it.head, 0, it.k)))
    case "table":  # (H * lines, 1, length): a piece of a line
      block = 1, 1, geometry.block_q + geometry.block_k

      def piece(b, it):
        line = it.head * geometry.lines + it.line
        return line, 0, pl.multiple_of(it.start, LANES)

      return pl.BlockSpec(tuple(pl.Element(n) for n in block), at(piece))
    case "head":  # (B, H, ...)
      block = None, None, *shape[2:]
      rest = (0,) * (len(shape) - 2)
      return pl.BlockSpec(block, at(lambda b, it: (b, it.head, *rest)))


def forward(static: Static, inputs: Inputs):
  """Returns (out_BTHK, lse_BHT)."""
  plan = _Plan(static, inputs)
  layout, block = plan.layout, static.launch.block_q
  qT = layout.queries(inputs.q_BTHK)
  outT, lse = plan.call(
    pallas_tpu_kernels.forward,
    plan.listed("q"),
    [
      (qT, "qT"),
      (layout.keys(inputs.k_BSGK), "k"),
      (jnp.swapaxes(layout.keys(inputs.v_BSGK), 2, 3), "kT"),
      (plan.table(), "table"),
    ],
    [(plan.struct("qT"), "qT"), (plan.struct("number", jnp.float32), "number")],
    [(1, block), (1, block), (qT.shape[2], block)],
  )
  return layout.from_queries(outT, plan.K), layout.from_numbers(lse)


def backward(static: Static, inputs: Inputs, outputs: Outputs) -> Gradients:
  """Returns all gradients.

  Those of memory are not wanted, and its rows would be most of what is written.
  So with a memory another pass is about the newer keys alone.
  """
  plan = _Plan(static, inputs)
  needed = _vmem_bytes(plan, plan.struct("qT"))
  if needed <= MOST_VMEM_BYTES and not static.memory:
    dqT, dk, dv, *d_table = _in_one_pass(plan, outputs)
    of_keys = plan.layout
  else:
    dqT, *d_table = _of_queries(plan, outputs)
    newer = _Plan(*_newer_keys(static, inputs))
    dk, dv = _of_keys(newer, outputs)
    of_keys = newer.layout
  return Gradients(
    plan.layout.from_queries(dqT, plan.K),
    of_keys.from_keys(dk, plan.K),
    of_keys.from_keys(dv, plan.K),
    _of_lengths(plan, d_table),
  )


def _newer_keys(static, inputs):
  """Returns (static, inputs) of the keys that are not memory."""
  memory, newer = static.memory, static.S - static.memory
  if not memory:
    return static, inputs
  if static.ring:
    row_N = (inputs.first_row + memory + jnp.arange(newer)) % static.S
    k, v = (x[:, row_N] for x in (inputs.k_BSGK, inputs.v_BSGK))
  else:
    k, v = (x[:, memory:] for x in (inputs.k_BSGK, inputs.v_BSGK))
  blocks = static.launch
  if newer < 2 * static.T:  # about as many keys as queries
    blocks = blocks._replace(block_k=blocks.block_q)
  static = static._replace(S=newer, memory=0, ring=False, launch=blocks)
  return static, inputs._replace(
    first_key=inputs.first_key - memory,
    first_row=jnp.zeros_like(inputs.first_row),
    k_BSGK=k,
    v_BSGK=v,
  )


def _given(plan, outputs):
  """Returns what kernels of gradients read."""
  inputs, layout = plan.inputs, plan.layout
  return [
    (layout.queries(inputs.q_BTHK), "qT"),
    (layout.keys(inputs.k_BSGK), "k"),
    (layout.keys(inputs.v_BSGK), "k"),
    (layout.queries(outputs.d_out_BTHK), "qT"),
    (layout.numbers(outputs.lse_BHT), "number"),
    (layout.numbers(outputs.mean_BHT), "number"),
    (plan.table(), "table"),
  ]


def _vmem_bytes(plan, *of_head):
  """Estimates the VMEM of a kernel that writes a head's arrays as a whole.

  These stand there twice. The rest is blocks and what the compiler spills, as
  its reports say.
  """
  written = sum(2 * 4 * x.size // (plan.B * plan.H) for x in of_head)
  table = table_bytes(plan.geometry.sizes) if plan.static.masked else 0
  return written + table + 3 * _MIB


def _asked(needed):
  """Returns the VMEM to ask for; None for what a kernel has unasked."""
  return None if needed <= _SCOPED_BYTES else needed + _SCOPED_BYTES


def _table_struct(plan):
  """Returns what a kernel writes of the log weights, if it is wanted."""
  if not plan.static.masked:
    return []
  return [(plan.struct("table", jnp.float32), "head")]


def _in_one_pass(plan, outputs):
  """Returns (dqT, dk, dv, and the gradient of the table if it is wanted)."""
  dtype = gradient_dtype(plan.inputs, plan.static)
  given = _given(plan, outputs)
  sums = plan.static.launch.block_k, given[1][0].shape[3]
  dk, dv, dqT, *d_table = plan.call(
    pallas_tpu_kernels.backward,
    plan.listed("k"),
    given,
    [
      *[(plan.struct("k", dtype), "k")] * 2,
      (plan.struct("qT", jnp.float32), "head"),
      *_table_struct(plan),
    ],
    [sums, sums],
    _asked(_vmem_bytes(plan, plan.struct("qT"))),
  )
  dqT = (dqT / plan.K**0.5).astype(plan.inputs.q_BTHK.dtype)
  return dqT, dk, dv, *d_table


def _of_queries(plan, outputs):
  """Returns (dqT, and the gradient of the table if it is wanted)."""
  given = _given(plan, outputs)
  return plan.call(
    pallas_tpu_kernels.dq,
    plan.listed("q"),
    given,
    [(plan.struct("qT"), "qT"), *_table_struct(plan)],
    [(given[1][0].shape[3], plan.static.launch.block_q)],
    _asked(_vmem_bytes(plan)),
  )


def _of_keys(plan, outputs):
  """Returns (dk, dv)."""
  dtype = gradient_dtype(plan.inputs, plan.static)
  given = _given(plan, outputs)
  sums = plan.static.launch.block_k, given[1][0].shape[3]
  return plan.call(
    pallas_tpu_kernels.dkv,
    plan.listed("k"),
    given,
    [(plan.struct("k", dtype), "k")] * 2,
    [sums, sums],
  )


def _of_lengths(plan, d_table):
  """Returns d_lengths_BHG out of the gradients of the lines' entries."""
  if not d_table:
    return jnp.zeros((plan.B, plan.H, 0), jnp.float32)
  slopes = slopes_of(plan.inputs, plan.distances(), plan.static.S)
  shares = [
    jnp.sum(d_table[0][:, :, :, 0] * slope_HLE, axis=(2, 3))
    for slope_HLE in slopes
  ]
  return jnp.stack(shares, axis=-1)


_PRODUCTS = {
  pallas_tpu_kernels.forward: 2,
  pallas_tpu_kernels.dq: 3,
  pallas_tpu_kernels.dkv: 4,
  pallas_tpu_kernels.backward: 5,
}
attend = functools.partial(
  pallas_attend.attend, Kernels("pallas_tpu", launch, forward, backward)
)
refusal = pallas_tpu_launch.refusal  # which `choice` asks of each kernel
