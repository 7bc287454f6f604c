"""Attention under learned masks on a TPU: Pallas kernels over a list of blocks.

`pallas_tpu_kernels` has the kernels, `pallas_tpu_item` what a step of their
grid knows, `pallas_tpu_layout` where rows stand, and `pallas_attend` what is
around both.
"""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from adaptive_attention.attention import (
  pallas_attend,
  pallas_tpu_kernels,
  walk,
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
  refusal_of_rows,
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
from adaptive_attention.attention.pallas_tpu_layout import (
  SUBLANES,
  Geometry,
  Layout,
  distances,
  table_shape,
)

_MIB = 1 << 20
_SMEM_BYTES = 1 * _MIB - (32 << 10)  # of 1 MiB, what items may take
_SCOPED_BYTES = 12 * _MIB  # of the 16 MiB of VMEM that a kernel has unasked
_MOST_VMEM_BYTES = 48 * _MIB  # that a kernel asks for


class Launch(NamedTuple):
  """Block sizes; and whether all gradients are made in one pass.

  Attributes:
    one_pass: None for as VMEM allows.
  """

  block_q: int
  block_k: int
  one_pass: bool | None = None

  @property
  def forward_blocks(self) -> tuple[int, int]:
    return self.block_q, self.block_k


def refusal(call) -> str:
  """Returns why a `choice.Call` is not served; "" if it is."""
  reason = refusal_of_rows(call)
  if reason:
    return reason
  reason = _excess(call)
  return f"{reason}; {_what_fits(call)}" if reason else ""


def _excess(call) -> str:
  """Returns what of a call is more than a TPU holds; "" if nothing is."""
  sizes = walk.Sizes(call.T, call.S, *launch(call)[:2], call.strided)
  of_call = f"for T={call.T}, S={call.S} and {call.H} heads"
  reason = walk_items.refusal(call.H, sizes)
  if reason:
    return f"its list of blocks {of_call} cannot be written, as {reason}"
  most = max(walk_items.most_items(call.H, sizes, rows) for rows in "qk")
  taken = walk_items.ITEM_BYTES * most
  if taken > _SMEM_BYTES:
    return f"its list of blocks {of_call} takes {taken} bytes of {_SMEM_BYTES}"
  taken = _table_bytes(sizes)
  if taken > _MOST_VMEM_BYTES:
    return (
      f"its log weights by distance {of_call} take {taken} bytes of "
      f"{_MOST_VMEM_BYTES}"
    )
  return ""


def _what_fits(call) -> str:
  """Returns what to change of a call that exceeds something."""
  older = _largest(call, lambda n: {"S": call.T + n}, 0, call.S - call.T)
  if older is not None:
    return f"S={call.T + older} would fit"
  T = _largest(call, lambda n: {"T": n, "S": n}, 1, call.T)
  if T is not None:
    return f"T={T} would fit"
  H = _largest(call, lambda n: {"H": n}, 1, call.H)
  return "fewer of each would fit" if H is None else f"H={H} would fit"


def _largest(call, changes, fits, exceeds):
  """Returns an n that fits while n + 1 does not; None if `fits` does not."""
  if _excess(call._replace(**changes(fits))):
    return None
  while exceeds - fits > 1:
    middle = (fits + exceeds) // 2
    if _excess(call._replace(**changes(middle))):
      exceeds = middle
    else:
      fits = middle
  return fits


def launch(call) -> Launch:
  """Returns the blocks of a `choice.Call`.

  512 x 512 takes the fewest bundles in each case that was counted (items times
  bundles of an item), as a step of the grid costs 300 bundles beside its
  products. Fewer queries or keys, or those of a residue class, would fill only
  a part of it, and the products of float32 and of wide heads spill at 512.
  """
  most = 512 if call.itemsize == 2 and call.K <= 128 else 256
  of_class = 8 if call.strided else 1  # the longest usual period

  def block_of(rows):
    block = LANES
    while block < most and 2 * block * of_class <= rows:
      block *= 2
    return block

  return Launch(block_of(call.T), block_of(call.S))


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

  def listed(self, heads, rows):
    """Returns (number of items, Scalars) of a walk sorted by `rows`."""
    items = walk_items.items(heads, self.geometry.sizes, rows)
    return items.count, scalars_of(items, heads, self.inputs, self.geometry)

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
    plan.listed(plan.heads, "q"),
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
  """Returns all gradients."""
  plan = _Plan(static, inputs)
  layout, K = plan.layout, plan.K
  given = [
    (layout.queries(inputs.q_BTHK), "qT"),
    (layout.keys(inputs.k_BSGK), "k"),
    (layout.keys(inputs.v_BSGK), "k"),
    (layout.queries(outputs.d_out_BTHK), "qT"),
    (layout.numbers(outputs.lse_BHT), "number"),
    (layout.numbers(outputs.mean_BHT), "number"),
    (plan.table(), "table"),
  ]
  one_pass = static.launch.one_pass
  if one_pass is None:
    one_pass = _vmem_bytes(plan, plan.struct("qT")) <= _MOST_VMEM_BYTES
  make = _in_one_pass if one_pass else _in_two_passes
  dqT, dk, dv, *d_table = make(plan, given)
  return Gradients(
    layout.from_queries(dqT, K),
    layout.from_keys(dk, K),
    layout.from_keys(dv, K),
    _of_lengths(plan, d_table),
  )


def _table_bytes(sizes):
  """Returns the VMEM that a head's gradient by distance takes, twice."""
  return 2 * 4 * math.prod(table_shape(sizes))


def _vmem_bytes(plan, *of_head):
  """Estimates the VMEM of a kernel that writes a head's arrays as a whole.

  These stand there twice. The rest is blocks and what the compiler spills, as
  its reports say.
  """
  written = sum(2 * 4 * x.size // (plan.B * plan.H) for x in of_head)
  table = _table_bytes(plan.geometry.sizes) if plan.static.masked else 0
  return written + table + 3 * _MIB


def _asked(needed):
  """Returns the VMEM to ask for; None for what a kernel has unasked."""
  return None if needed <= _SCOPED_BYTES else needed + _SCOPED_BYTES


def _table_struct(plan):
  """Returns what a kernel writes of the log weights, if it is wanted."""
  if not plan.static.masked:
    return []
  return [(plan.struct("table", jnp.float32), "head")]


def _in_one_pass(plan, given):
  """Returns (dqT, dk, dv, and the gradient of the table if it is wanted)."""
  static, k = plan.static, given[1][0]
  dtype = gradient_dtype(plan.inputs, static)
  sums = static.launch.block_k, k.shape[3]
  dk, dv, dqT, *d_table = plan.call(
    pallas_tpu_kernels.backward,
    plan.listed(plan.heads, "k"),
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


def _in_two_passes(plan, given):
  """Returns the same from a pass by queries and one by keys."""
  static, k = plan.static, given[1][0]
  dqT, *d_table = plan.call(
    pallas_tpu_kernels.dq,
    plan.listed(plan.heads, "q"),
    given,
    [(plan.struct("qT"), "qT"), *_table_struct(plan)],
    [(k.shape[3], static.launch.block_q)],
    _asked(_vmem_bytes(plan)),
  )
  # To this pass memory does not exist.
  dtype = gradient_dtype(plan.inputs, static)
  first_H = jnp.maximum(plan.heads.first, static.memory - static.older)
  sums = static.launch.block_k, k.shape[3]
  dk, dv = plan.call(
    pallas_tpu_kernels.dkv,
    plan.listed(plan.heads._replace(first=first_H), "k"),
    given,
    [(plan.struct("k", dtype), "k")] * 2,
    [sums, sums],
  )
  return dqT, dk, dv, *d_table


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
