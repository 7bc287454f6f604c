"""The attention that JAX itself has for accelerators, to compare with."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_attention.bench.cases import Case


def named(case: Case, backend: str) -> Iterable[tuple[str, str, Callable]]:
  """Yields (name, implementation, make) of what there is for a backend.

  `make()` returns (q, k, v, mask) -> out, which ignores the mask: of all causal
  pairs, and of a sliding window if the case is one.

  Args:
    backend: as `jax.default_backend()` names it.
  """
  windows = {"dense": 0}
  if uniform_reach(case):
    windows["window"] = uniform_reach(case)
  for name, window in windows.items():
    if backend == "tpu":
      yield f"splash {name}", "splash", lambda w=window: splash(case, w)
    one = "cudnn" if backend == "gpu" else "xla"
    yield f"{one} {name}", one, lambda w=window, one=one: of_jax(one, w)


def uniform_reach(case: Case) -> int:
  """Returns the reach that all heads share; 0 if they differ or have waves."""
  if case.span is None or case.period is not None or len(set(case.span)) > 1:
    return 0
  reach = int(np.ceil(case.span[0] + case.ramp))
  return reach if reach < case.T else 0


def of_jax(implementation: str, window: int):
  """Returns `jax.nn.dot_product_attention`; a window of 0 is none."""

  def run(q, k, v, mask):
    del mask
    return jax.nn.dot_product_attention(
      *(q, k, v),
      is_causal=True,
      local_window_size=(window - 1, 0) if window else None,
      implementation=implementation,
    )

  return run


def splash(case: Case, window: int, interpret=False):
  """Returns JAX's own kernel for TPUs, in blocks of at most 512.

  Its arrays are (H, T, K) of one stream, and queries come scaled.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  lengths, block = (case.T, case.T), min(512, case.T)
  one = masks.CausalMask(lengths)
  if window:
    one = masks.LocalMask(lengths, (window - 1, 0), 0)
  names = (
    *("block_q", "block_kv", "block_kv_compute"),
    *("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"),
    *("block_q_dq", "block_kv_dq"),
  )
  attention = kernel.make_splash_mha(
    masks.MultiHeadMask([one] * case.H),
    block_sizes=kernel.BlockSizes(**dict.fromkeys(names, block)),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )

  def run(q, k, v, mask):
    del mask
    scaled = (q / np.sqrt(case.K)).astype(q.dtype)
    out = jax.vmap(attention)(*(jnp.swapaxes(x, 1, 2) for x in (scaled, k, v)))
    return jnp.swapaxes(out, 1, 2).astype(q.dtype)

  return run
