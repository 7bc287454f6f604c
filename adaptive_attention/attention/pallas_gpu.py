"""Attention under learned masks on a GPU: Pallas kernels through Triton.

Which blocks are computed is found in the kernels, from integers, so a change of
spans or periods recompiles nothing. `pallas_gpu_kernels` has the kernels, and
`pallas_attend` what is around both.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from adaptive_attention.attention import pallas_attend, pallas_gpu_kernels, walk
from adaptive_attention.attention.pallas_attend import (
  Gradients,
  Inputs,
  Kernels,
  Outputs,
  Static,
  cost,
  heads_of,
  refusal_of_rows,
  result,
  slopes_of,
  table_of,
)
from adaptive_attention.attention.pallas_gpu_head import Blocks, lead


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
# strides, whose addresses want more registers. Each is the largest that ptxas
# compiles for sm_80 and sm_90 without a spilled register, or with the fewest:
# products of bfloat16 run on tensor cores, those of float32 out of registers.
_LAUNCHES = {
  (2, 128): (
    Launch(Blocks(64, 64, 4), Blocks(64, 32, 4), Blocks(64, 64, 8)),
    Launch(Blocks(64, 64, 8), Blocks(32, 64, 4), Blocks(64, 32, 8)),
  ),
  (2, 256): (
    Launch(Blocks(64, 32, 8), Blocks(32, 32, 8), Blocks(32, 32, 8)),
    Launch(Blocks(32, 32, 8), Blocks(32, 16, 8), Blocks(32, 32, 8)),
  ),
  (4, 64): (
    Launch(Blocks(64, 32, 8), Blocks(32, 32, 4), Blocks(64, 32, 8)),
    Launch(Blocks(64, 32, 8), Blocks(32, 32, 4), Blocks(32, 32, 8)),
  ),
  (4, 128): (Launch(*[Blocks(32, 32, 8)] * 3),) * 2,
  (4, 256): (Launch(Blocks(32, 32, 8), Blocks(32, 16, 8), Blocks(32, 16, 8)),)
  * 2,
}


def launch(call) -> Launch:
  """Returns the blocks of a `choice.Call`; a short text has shorter ones."""
  widths = [K for itemsize, K in _LAUNCHES if itemsize == call.itemsize]
  width = min(K for K in widths if call.K <= K)
  chosen = _LAUNCHES[call.itemsize, width][call.strided]
  most = max(16, pl.next_power_of_2(call.T))
  return Launch(
    *(
      blocks._replace(
        block_q=min(blocks.block_q, most), block_k=min(blocks.block_k, most)
      )
      for blocks in chosen
    )
  )


def _heads(inputs: Inputs, static: Static, blocks: Blocks):
  """Returns (H, RESIDUES + MAX_STRIDE) the integers of `pallas_gpu_head`."""
  sizes = static.sizes(blocks.block_q, blocks.block_k)
  heads = heads_of(inputs, static, sizes)
  row_H = jnp.broadcast_to(inputs.first_row, inputs.head_H.shape)
  numbers = (
    *(heads.stride, heads.last, heads.full, heads.first),
    *(heads.residue_count, inputs.head_H, row_H),
  )
  return jnp.concatenate(
    [jnp.stack(numbers, axis=-1).astype(jnp.int32), heads.residues], axis=-1
  )


def _common(inputs: Inputs, static: Static, blocks: Blocks):
  """Returns what each kernel reads first: (array, kind) of each."""
  table_HL = table_of(inputs, _distances(inputs, static, blocks), static.S)
  return [
    (_heads(inputs, static, blocks), "head"),
    (inputs.stream_B, "stream"),
    (table_HL, "head"),
  ]


def _distances(inputs, static, blocks):
  """Returns (H, L) the distances of a table's entries; see `lead`."""
  beyond = lead(blocks, static.strided)
  distance_L = jnp.arange(-beyond, static.S + beyond, dtype=jnp.int32)
  return jnp.broadcast_to(distance_L, (len(inputs.head_H), len(distance_L)))


def forward(static: Static, inputs: Inputs):
  """Returns (out_BTHK, lse_BHT)."""
  blocks = static.launch.forward
  q_BTHK = inputs.q_BTHK
  B, T, H, _ = q_BTHK.shape
  arrays = q_BTHK, inputs.k_BSHK, inputs.v_BSHK
  return _call(
    *(pallas_gpu_kernels.forward, static, blocks),
    walk.row_count(static.sizes(blocks.block_q, blocks.block_k), "q"),
    [*_common(inputs, static, blocks), *((x, "rows") for x in arrays)],
    [
      (result(inputs, q_BTHK.shape, q_BTHK.dtype), "rows"),
      (result(inputs, (B, H, T), jnp.float32), "line"),
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
    (outputs.lse_BHT, "line"),
    (outputs.mean_BHT, "line"),
  ]


def _dq(static, inputs, outputs):
  """Returns (dq_BTHK, d_lengths_BHG)."""
  blocks = static.launch.dq
  q_BTHK = inputs.q_BTHK
  B, _, H, _ = q_BTHK.shape
  programs = walk.row_count(static.sizes(blocks.block_q, blocks.block_k), "q")
  given = _common(inputs, static, blocks)
  given += [(inputs.k_BSHK, "rows"), (inputs.v_BSHK, "rows")]
  given += _of_queries(inputs, outputs)
  found = [(result(inputs, q_BTHK.shape, q_BTHK.dtype), "rows")]
  if static.masked:
    distance_HL = _distances(inputs, static, blocks)
    slopes_HGL = jnp.stack(slopes_of(inputs, distance_HL, static.S), axis=1)
    given.append((slopes_HGL, "head"))
    shares = B, H, programs, slopes_HGL.shape[1]
    found.append((result(inputs, shares, jnp.float32), "share"))
  dq, *shares = _call(
    *(pallas_gpu_kernels.dq, static, blocks, programs, given, found),
    "adaptive_attention_dq",
  )
  if not shares:
    return dq, jnp.zeros((B, H, 0), jnp.float32)
  return dq, jnp.sum(shares[0], axis=2)


def _dkv(static, inputs, outputs):
  """Returns (dk_BNHK, dv_BNHK)."""
  blocks = static.launch.dkv
  B, S, H, K = inputs.k_BSHK.shape
  newer = static.sizes(blocks.block_q, blocks.block_k)
  newer = newer._replace(S=S - static.memory)
  shape = B, S - static.memory, H, K
  found = result(inputs, shape, inputs.k_BSHK.dtype), "rows"
  return _call(
    *(pallas_gpu_kernels.dkv, static, blocks, walk.row_count(newer, "k")),
    [
      *_common(inputs, static, blocks),
      *((x, "rows") for x in (inputs.k_BSHK, inputs.v_BSHK)),
      *_of_queries(inputs, outputs),
    ],
    [found, found],
    "adaptive_attention_dkv",
  )


def _call(kernel, static, blocks, programs, given, found, name):
  """Calls a kernel for each program of each stream and head.

  Args:
    kernel: of `pallas_gpu_kernels`.
    programs: how many blocks a head can have.
    given, found: (array, kind) of what is read, (shape, kind) of results.
    name: for profilers.
  """
  B, H = next(x.shape for x, kind in given if kind == "rows")[::2]
  return pl.pallas_call(
    functools.partial(kernel, static, blocks),
    grid=(programs, B, H),
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
  """Returns the part of an array that a program (i, b, h) gets."""
  match kind:
    case "head":  # (H, ...)
      block = None, *shape[1:]
      return pl.BlockSpec(block, lambda i, b, h: (h, *(0,) * (len(shape) - 1)))
    case "stream":  # (B,)
      return pl.BlockSpec((1,), lambda i, b, h: (b,))
    case "rows":  # (B, S, H, K)
      block = None, shape[1], None, shape[3]
      return pl.BlockSpec(block, lambda i, b, h: (b, 0, h, 0))
    case "line":  # (B, H, T)
      return pl.BlockSpec((None, None, shape[2]), lambda i, b, h: (b, h, 0))
    case "share":  # (B, H, programs, G)
      block = None, None, None, shape[3]
      return pl.BlockSpec(block, lambda i, b, h: (b, h, i, 0))


_PRODUCTS = {
  pallas_gpu_kernels.forward: 2,
  pallas_gpu_kernels.dq: 3,
  pallas_gpu_kernels.dkv: 4,
}
attend = functools.partial(
  pallas_attend.attend, Kernels("pallas_gpu", launch, forward, backward)
)
