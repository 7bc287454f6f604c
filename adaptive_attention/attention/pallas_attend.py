"""What the Pallas implementations share: all that is around their kernels.

An implementation brings two functions, `Kernels`. Here they get a derivative,
run on each device for its own streams and heads, and serve under `vmap`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from adaptive_attention import masks
from adaptive_attention.attention import checks, dropout, walk
from adaptive_attention.attention.heads_and_segments import (
  group_size,
  summed_by_key_head,
)
from adaptive_attention.attention.on_devices import (
  dealt_like,
  on_devices,
  varying_alike,
)
from adaptive_attention.masks import Mask

# Below all logits, yet finite: exp(-inf - LOW) is zero.
LOW = -1e30


class Static(NamedTuple):
  """What is static of a call.

  Attributes:
    T, S, memory: queries, keys, and how many of these take no gradient.
    group: how many heads read one head of keys.
    masked: whether the lengths of the mask take a gradient.
    ring: whether keys stand in rows that are read round and round.
    launch: block sizes and what else the implementation chose.
    interpret: as in `attend`.
  """

  T: int
  S: int
  memory: int
  group: int
  masked: bool
  strided: bool
  ring: bool
  dropout_rate: float
  launch: tuple
  interpret: object

  @property
  def older(self) -> int:
    """How many keys stand before the first query."""
    return self.S - self.T

  def sizes(self, block_q, block_k) -> walk.Sizes:
    return walk.Sizes(self.T, self.S, block_q, block_k, self.strided)


class Inputs(NamedTuple):
  """What the kernels of a call read.

  Attributes:
    mask: spans and waves.
    head_H: the numbers of the heads, and
    stream_B: `dropout.stream_hash` of the streams. A device that has some of
      them draws as one that has all.
    first_key, first_row: as in `attend` and `Ring`.
    q_BTHK, k_BSGK, v_BSGK: queries, keys and values; see `attend` for G.
  """

  mask: Mask
  head_H: jax.Array
  stream_B: jax.Array
  first_key: jax.Array
  first_row: jax.Array
  q_BTHK: jax.Array
  k_BSGK: jax.Array
  v_BSGK: jax.Array


class Outputs(NamedTuple):
  """What the gradients need of the forward pass.

  Attributes:
    lse_BHT: log2 of the sum of the exponentials of a query, -LOW without an
      open key.
    mean_BHT: what softmax takes off: sum over K of d_out times out.
    d_out_BTHK: gradient of the output.
  """

  lse_BHT: jax.Array
  mean_BHT: jax.Array
  d_out_BTHK: jax.Array


class Gradients(NamedTuple):
  """What `Kernels.backward` gives; N = S - memory.

  Attributes:
    dq_BTHK, dk_BNHK, dv_BNHK: of queries, and of keys that are not memory; for
      each head that reads these keys.
    d_lengths_BHG: of the G lengths of a head, as `lengths_of` orders them, of
      each stream.
  """

  dq_BTHK: jax.Array
  dk_BNHK: jax.Array
  dv_BNHK: jax.Array
  d_lengths_BHG: jax.Array


class Kernels(NamedTuple):
  """An implementation.

  Attributes:
    name: as `attend` knows it.
    launch: choice.Call -> `Static.launch`.
    forward: (static, inputs) -> (out_BTHK, lse_BHT).
    backward: (static, inputs, outputs) -> Gradients.
  """

  name: str
  launch: Callable
  forward: Callable
  backward: Callable


def attend(
  kernels: Kernels,
  q_BTHK,
  k_BSGK,
  v_BSGK,
  mask,
  *,
  ring,
  memory,
  first_key,
  dropout_rate,
  dropout_seed,
  dropout_heads,
  interpret=False,
  call,
  launch=None,
):
  """The same as `reference.attend` without what is refused, by kernels.

  Args:
    call: a `choice.Call`, which is not refused.
    launch: how they are launched, if not by `kernels.launch`.
  """
  H = q_BTHK.shape[2]
  static = Static(
    call.T,
    call.S,
    memory,
    group_size(q_BTHK, k_BSGK),
    masked=mask is not None,
    strided=call.strided,
    ring=ring is not None,
    dropout_rate=dropout_rate,
    launch=launch or kernels.launch(call),
    interpret=interpret,
  )
  if mask is None:
    mask = Mask(jnp.full(H, float(call.S), jnp.float32), 1.0)
  seed = jnp.asarray(0 if dropout_seed is None else dropout_seed)
  seed = seed.astype(jnp.uint32)
  draws = seed, dropout_heads.astype(jnp.int32)
  arrays = mask, q_BTHK, k_BSGK, v_BSGK, ring, first_key, draws
  return _attend(kernels, static, *varying_alike(*arrays))


MOST_WIDTH = 256  # of a head


def refusal_of_rows(call) -> str:
  """Returns why no kernel serves a `choice.Call`; "" if one may."""
  if call.relative:
    return "its kernel has no vectors of distances (relative_RK)"
  if call.segments:
    return "its kernel has no segments (segment_ids, key_mask)"
  if call.K > MOST_WIDTH:
    return (
      f"its kernel serves heads up to a width of {MOST_WIDTH}, not {call.K}"
    )
  return ""


def table_of(inputs: Inputs, distance_HX, S: int):
  """Returns (H, X) log2 m + log2 w, -inf where there is no such distance.

  Args:
    distance_HX: distances, for each head its own; X may be several axes.
    S: one more than the largest distance that there is.
  """
  is_one = (distance_HX >= 0) & (distance_HX < S)
  table_HX = _log_weight(inputs.mask, distance_HX)
  return jnp.where(is_one, table_HX / np.log(2, dtype=np.float32), -jnp.inf)


# Of the mask of each head at its own distances.
_log_weight = jax.vmap(masks.log_weight)


def slopes_of(inputs: Inputs, distance_HX, S: int):
  """Returns G arrays (H, X), the derivatives of log m + log w by each length.

  They are zero where a pair is hidden, or where there is no such distance.
  """
  leaves, tree = jax.tree.flatten(inputs.mask)
  is_one = (distance_HX >= 0) & (distance_HX < S)

  def by(g):
    tangents = tuple(
      jnp.full(jnp.shape(x), float(i == g), x.dtype)
      for i, x in enumerate(leaves)
    )

    def table(*leaves):
      return _log_weight(jax.tree.unflatten(tree, leaves), distance_HX)

    slope_HX = jax.jvp(table, tuple(leaves), tangents)[1]
    return jnp.where(is_one & jnp.isfinite(slope_HX), slope_HX, 0.0)

  return [by(g) for g in range(len(leaves))]


def gradient_dtype(inputs: Inputs, static: Static):
  """Returns the dtype of `dk_BNHK`, which is summed over a group of heads."""
  return inputs.k_BSGK.dtype if static.group == 1 else jnp.float32


def result(inputs: Inputs, shape, dtype=jnp.float32):
  """Returns the shape and dtype of what a kernel writes.

  Under `jax.shard_map` it varies over the devices as the queries do.
  """
  of_queries = jax.typeof(inputs.q_BTHK).mat
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=of_queries)


def heads_of(inputs: Inputs, static: Static, sizes) -> walk.Heads:
  """Returns how the heads are walked in blocks of these sizes."""
  distance_S = jnp.arange(static.S, dtype=jnp.int32)
  table_HS = masks.log_weight(inputs.mask, distance_S)
  return walk.heads_of(inputs.mask, table_HS, inputs.first_key, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(kernels, static, mask, q, k, v, ring, first_key, draws):
  return _attend_forward(
    kernels, static, mask, q, k, v, ring, first_key, draws
  )[0]


def _attend_forward(kernels, static, mask, q, k, v, ring, first_key, draws):
  residuals = mask, q, k, v, ring, first_key, draws
  q = _differentiated_once(kernels, q)
  inputs = _inputs(mask, q, k, v, ring, first_key, draws)
  axes = (_axes_of(inputs, static),), ("bthk", "bht")
  out, lse = _on_devices(kernels, kernels.forward, static, (inputs,), *axes)
  return out, (residuals, out, lse)


def _attend_backward(kernels, static, residuals, d_out):
  (mask, q, k, v, ring, first_key, draws), out, lse = residuals
  d_out = _differentiated_once(kernels, jnp.asarray(d_out))
  # Or else XLA keeps what the forward pass has laid out until it is used again
  # here, of all layers at once.
  arrays = lax.optimization_barrier((q, k, v, ring, d_out))
  q, k, v, ring, d_out = arrays
  inputs = _inputs(mask, q, k, v, ring, first_key, draws)
  mean_BTH = jnp.sum(
    d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1
  )
  outputs = Outputs(lse, jnp.swapaxes(mean_BTH, 1, 2), d_out)
  gradients = _on_devices(
    *(kernels, kernels.backward, static, (inputs, outputs)),
    (_axes_of(inputs, static), Outputs("bht", "bht", "bthk")),
    ("bthk", "bnhk", "bnhk", "bhg"),
  )
  gradients = Gradients(*gradients)
  leaves, tree = jax.tree.flatten(mask)
  if static.masked:
    d_lengths_HG = jnp.sum(gradients.d_lengths_BHG, axis=0)
    d_mask = tree.unflatten(
      d_lengths_HG[:, g].astype(x.dtype) for g, x in enumerate(leaves)
    )
  else:
    d_mask = jax.tree.map(jnp.zeros_like, mask)
  before = k.shape[1] - gradients.dk_BNHK.shape[1]
  # Nothing flows to the older keys.
  dk, dv = (
    jnp.pad(
      summed_by_key_head(x_BNHK, k.shape[2]).astype(k.dtype),
      ((0, 0), (before, 0), (0, 0), (0, 0)),
    )
    for x_BNHK in (gradients.dk_BNHK, gradients.dv_BNHK)
  )
  none = (jax.tree.map(checks.no_gradient, x) for x in (ring, first_key, draws))
  found = d_mask, gradients.dq_BTHK, dk, dv
  return *jax.tree.map(dealt_like, found, (mask, q, k, v)), *none


_attend.defvjp(_attend_forward, _attend_backward)


def _differentiated_once(kernels, x):
  return checks.differentiated_once(
    x,
    f"implementation={kernels.name!r} has no second derivatives; choose "
    "implementation='reference' or 'blocked'",
  )


def _on_devices(kernels, function, static, args, axes, results):
  """Returns function(static, *args); see `on_devices`."""
  function = functools.partial(function, static)
  if not isinstance(static.interpret, bool):
    # InterpretParams keeps the order of its steps by effects, which no custom
    # partitioning carries.
    return function(*args)
  opaque = kernels.name == "pallas_tpu" and not static.interpret
  return on_devices(function, args, axes, results, static.group, opaque)


def _axes_of(inputs: Inputs, static: Static) -> Inputs:
  """Returns the axes of all arrays, as letters."""
  of_mask = jax.tree.map(lambda _: "h", inputs.mask)
  G = inputs.k_BSGK.shape[2]
  of_keys = "bshk" if static.group == 1 else "bsok" if G == 1 else "bsjk"
  return Inputs(of_mask, "h", "b", "", "", "bthk", of_keys, of_keys)


def _inputs(mask, q, k, v, ring, first_key, draws) -> Inputs:
  B = q.shape[0]
  first_row = jnp.int32(0)
  if ring is not None:
    k, v = (
      lax.dynamic_slice_in_dim(x, ring.batch, B) if x.shape[0] > B else x
      for x in (ring.k_NSHK, ring.v_NSHK)
    )
    first_row = jnp.asarray(ring.first_row, jnp.int32)
  seed, head_H = draws
  stream_B = dropout.stream_hash(seed, jnp.arange(B, dtype=jnp.int32))
  first_key = jnp.asarray(first_key, jnp.int32)
  return Inputs(mask, head_H, stream_B, first_key, first_row, q, k, v)


def cost(static: Static, products: int, given, found) -> pl.CostEstimate:
  """Returns an estimate for XLA's scheduler, of all causal pairs.

  What masks hide is known at run time alone, and an estimate is static.

  Args:
    products: how many products of a block are made.
    given, found: arrays of the kernel, the first of given being queries.
  """
  B, _, H, K = given[0].shape
  pairs = B * H * (static.T * (static.T + 1) // 2 + static.T * static.older)
  sizes = [x.size * jnp.dtype(x.dtype).itemsize for x in (*given, *found)]
  return pl.CostEstimate(2 * products * pairs * K, pairs, sum(sizes))
