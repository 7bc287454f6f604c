"""Attention under learned masks on a GPU: Pallas kernels through Triton.

Which blocks are computed is found in the kernels, from integers, so a change of
spans or periods recompiles nothing. `pallas_gpu_kernels` has the kernels, and
`pallas_attend` what is around both.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from adaptive_attention.attention import (
  pallas_attend,
  pallas_gpu_kernels,
  pallas_gpu_weights,
  walk,
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
)
from adaptive_attention.attention.pallas_gpu_head import Blocks, beyond


class Launch(NamedTuple):
  """How each kernel is launched."""

  forward: Blocks
  dq: Blocks
  dkv: Blocks

  @property
  def forward_blocks(self) -> tuple[int, int]:
    return self.forward.block_q, self.forward.block_k


def refusal(call) -> str:
  """Returns why a `choice.Call` is not served; "" if it is."""
  return refusal_of_rows(call)


# (bytes of a number, the largest width) -> launches of a band, and under
# strides, whose addresses want more registers. They took the least time on an
# H100 of those that were tried (see RESULTS.md); float32 of more than 128 was
# not timed, and has the largest blocks that spill no registers. Four warps hold
# a block of 64 queries, and several such programs share a multiprocessor. Three
# stages read ahead of a product, where shared memory has room for them.
_LAUNCHES = {
  (2, 64): (
    Launch(Blocks(64, 64, 4, 3), Blocks(64, 32, 4, 3), Blocks(64, 64, 4, 3)),
    Launch(Blocks(64, 32, 4, 3), Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3)),
  ),
  (2, 128): (
    Launch(Blocks(64, 64, 4, 3), Blocks(64, 32, 4, 3), Blocks(64, 64, 4)),
    Launch(Blocks(64, 64, 4), Blocks(64, 32, 4, 3), Blocks(32, 64, 4, 3)),
  ),
  (2, 256): (
    Launch(Blocks(64, 32, 4), Blocks(64, 16, 4), Blocks(32, 32, 4)),
    Launch(*[Blocks(32, 32, 4)] * 3),
  ),
  (4, 128): (Launch(*[Blocks(32, 32, 4)] * 3),) * 2,
  (4, 256): (Launch(*[Blocks(16, 16, 4)] * 3),) * 2,
}


def launch(call) -> Launch:
  """Returns the blocks of a `choice.Call`, shorter ones where rows are few."""
  widths = [K for itemsize, K in _LAUNCHES if itemsize == call.itemsize]
  width = min(K for K in widths if call.K <= K)
  chosen = _LAUNCHES[call.itemsize, width][call.strided]
  most_q, most_k = (max(16, pl.next_power_of_2(n)) for n in (call.T, call.S))
  return Launch(
    *(
      blocks._replace(
        block_q=min(blocks.block_q, most_q), block_k=min(blocks.block_k, most_k)
      )
      for blocks in chosen
    )
  )


def _heads(inputs: Inputs, static: Static, blocks: Blocks):
  """Returns (H, RESIDUES + MAX_STRIDE) the integers of `pallas_gpu_head`.

  Programs begin in this order of heads: what takes longest is not left over at
  the end.
  """
  sizes = static.sizes(blocks.block_q, blocks.block_k)
  heads = heads_of(inputs, static, sizes)
  place_H = jnp.arange(len(inputs.head_H), dtype=jnp.int32)
  row_H = jnp.broadcast_to(inputs.first_row, place_H.shape)
  numbers = (
    *(heads.stride, heads.last, heads.full, heads.first),
    *(heads.residue_count, place_H, inputs.head_H, row_H),
  )
  ints_HI = jnp.concatenate(
    [jnp.stack(numbers, axis=-1).astype(jnp.int32), heads.residues], axis=-1
  )
  if not static.masked:
    return ints_HI
  work_H = heads.residue_count * (heads.last + 1) // heads.stride
  return ints_HI[jnp.argsort(-work_H)]


def _common(inputs: Inputs, static: Static, blocks: Blocks, slopes=False):
  """Returns (arrays, weights_of): what each kernel reads first.

  Args:
    slopes: whether slopes of the log weights are read too.
  """
  q_BTHK, mask = inputs.q_BTHK, inputs.mask
  kind = pallas_gpu_weights.kind_of(mask, q_BTHK.dtype.itemsize)
  rows = beyond(blocks, static.strided)
  arrays = [
    (_heads(inputs, static, blocks), "head"),
    (inputs.stream_B, "stream"),
  ]
  arrays += [(x, "heads") for x in kind.arrays(inputs, static, rows, slopes)]
  # A kernel must hold no array, and reads what is static alone of the mask.
  static_mask = jax.tree.map(lambda _: None, mask)
  return arrays, functools.partial(kind, static, static_mask, rows)


def forward(static: Static, inputs: Inputs):
  """Returns (out_BTHK, lse_BHT)."""
  blocks = static.launch.forward
  q_BTHK = inputs.q_BTHK
  B, T, H, _ = q_BTHK.shape
  given, weights_of = _common(inputs, static, blocks)
  given += [(x, "rows") for x in (q_BTHK, inputs.k_BSGK, inputs.v_BSGK)]
  return _call(
    *(pallas_gpu_kernels.forward, static, blocks, weights_of),
    walk.row_count(static.sizes(blocks.block_q, blocks.block_k), "q"),
    given,
    [
      (result(inputs, q_BTHK.shape, q_BTHK.dtype), "rows"),
      (result(inputs, (B, H, T), jnp.float32), "numbers"),
    ],
    "adaptive_attention_forward",
  )


def backward(static: Static, inputs: Inputs, outputs: Outputs) -> Gradients:
  """Returns all gradients."""
  dq, d_lengths_BHG = _dq(static, inputs, outputs)
  return Gradients(dq, *_dkv(static, inputs, outputs), d_lengths_BHG)


def _of_queries(inputs, outputs):
  return [
    (inputs.q_BTHK, "rows"),
    (outputs.d_out_BTHK, "rows"),
    (outputs.lse_BHT, "numbers"),
    (outputs.mean_BHT, "numbers"),
  ]


def _dq(static, inputs, outputs):
  """Returns (dq_BTHK, d_lengths_BHG)."""
  blocks = static.launch.dq
  q_BTHK = inputs.q_BTHK
  B, _, H, _ = q_BTHK.shape
  programs = walk.row_count(static.sizes(blocks.block_q, blocks.block_k), "q")
  given, weights_of = _common(inputs, static, blocks, static.masked)
  given += [(inputs.k_BSGK, "rows"), (inputs.v_BSGK, "rows")]
  given += _of_queries(inputs, outputs)
  found = [(result(inputs, q_BTHK.shape, q_BTHK.dtype), "rows")]
  if static.masked:
    shares = B, H, programs, len(jax.tree.leaves(inputs.mask))
    found.append((result(inputs, shares, jnp.float32), "numbers"))
  dq, *shares = _call(
    *(pallas_gpu_kernels.dq, static, blocks, weights_of, programs),
    *(given, found, "adaptive_attention_dq"),
  )
  if not shares:
    return dq, jnp.zeros((B, H, 0), jnp.float32)
  return dq, jnp.sum(shares[0], axis=2)


def _dkv(static, inputs, outputs):
  """Returns (dk_BNHK, dv_BNHK)."""
  blocks = static.launch.dkv
  B, S, _, K = inputs.k_BSGK.shape
  H = inputs.q_BTHK.shape[2]
  newer = static.sizes(blocks.block_q, blocks.block_k)
  newer = newer._replace(S=S - static.memory)
  shape = B, S - static.memory, H, K
  found = result(inputs, shape, gradient_dtype(inputs, static)), "rows"
  given, weights_of = _common(inputs, static, blocks)
  given += [(x, "rows") for x in (inputs.k_BSGK, inputs.v_BSGK)]
  given += _of_queries(inputs, outputs)
  return _call(
    *(pallas_gpu_kernels.dkv, static, blocks, weights_of),
    *(walk.row_count(newer, "k"), given, [found, found]),
    "adaptive_attention_dkv",
  )


def _call(kernel, static, blocks, weights_of, programs, given, found, name):
  """Calls a kernel for each program of each stream and head.

  Args:
    kernel, static, blocks, weights_of: of `pallas_gpu_kernels`.
    programs: how many blocks a head can have.
    given, found: (array, kind) of what is read, (shape, kind) of results.
    name: for profilers.
  """
  stream_B, heads_HI = given[1][0], given[0][0]
  return pl.pallas_call(
    functools.partial(kernel, static, blocks, weights_of),
    grid=(programs, len(stream_B), len(heads_HI)),
    in_specs=[_spec(x.shape, kind) for x, kind in given],
    out_specs=[_spec(x.shape, kind) for x, kind in found],
    out_shape=[x for x, _ in found],
    compiler_params=plgpu.CompilerParams(
      num_warps=blocks.warps, num_stages=blocks.stages
    ),
    cost_estimate=cost(
      static,
      _PRODUCTS[kernel],
      [x for x, kind in given if kind == "rows"],
      [x for x, _ in found],
    ),
    interpret=static.interpret,
    name=name,
  )(*(x for x, _ in given))


def _spec(shape, kind):
  """Returns the part of an array that a program (i, b, place in order) gets."""
  match kind:
    case "head":  # (H, ...) in the order of programs
      block = None, *shape[1:]
      return pl.BlockSpec(block, lambda i, b, h: (h, *(0,) * (len(shape) - 1)))
    case "heads":  # (H, ...) of all heads, in their own order
      return pl.BlockSpec(shape, lambda i, b, h: (0,) * len(shape))
    case "stream":  # (B,)
      return pl.BlockSpec((1,), lambda i, b, h: (b,))
    case "rows" | "numbers":  # (B, S, H, K), and others (B, ...)
      block = None, *shape[1:]
      return pl.BlockSpec(block, lambda i, b, h: (b, *(0,) * (len(shape) - 1)))


_PRODUCTS = {
  pallas_gpu_kernels.forward: 2,
  pallas_gpu_kernels.dq: 3,
  pallas_gpu_kernels.dkv: 4,
}
attend = functools.partial(
  pallas_attend.attend, Kernels("pallas_gpu", launch, forward, backward)
)
