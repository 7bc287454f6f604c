"""What an accelerator is timed on: our kernels beside what others have there.

A kernel is over in less time than a launch of it takes. So a call makes many
rounds in one compiled loop. What a round gives is what the next one takes, so
that nothing can be moved out of the loop.
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adaptive_attention.attention import attend, choice
from adaptive_attention.bench import cases
from adaptive_attention.bench.cases import Case
from adaptive_attention.bench.timing import Runner
from adaptive_attention.training import console

CALL_SECONDS = 0.05  # about what the rounds of a call take together
_MOST_ROUNDS = 1000
_MOST_BLOCKS = 500  # that `blocked` is let walk, one after the other


class Attention(NamedTuple):
  """One of what is compared.

  Attributes:
    name: "ours", or whose it is and what it computes.
    run: (q, k, v, mask) -> out, all (B, T, H, K).
  """

  name: str
  run: Callable


def runners(case: Case, most_bytes: int) -> list[Runner]:
  """Makes the runners of a case: forward, and with all gradients.

  Args:
    case: of `cases.DEVICE_SHAPES`.
    most_bytes: the most that one array over all pairs may take.
  """
  found = [*_ours(case, most_bytes), *_dense(case, most_bytes)]
  return [
    in_rounds(case, attention, kind)
    for attention in found
    for kind in ("forward", "both")
  ]


def in_rounds(case: Case, attention: Attention, kind: str) -> Runner:
  """Makes the runner of one kind of work of an attention.

  Args:
    kind: "forward", or "both" for forward and all gradients.
  """
  q, k, v, _ = cases.inputs(case)
  start = time.perf_counter()
  run = _loop(attention.run, kind).lower(1, q, k, v, case.mask).compile()
  seconds = time.perf_counter() - start

  def call(rounds):
    jax.block_until_ready(run(rounds, q, k, v, case.mask))

  call(1)
  start = time.perf_counter()
  call(1)
  one = time.perf_counter() - start
  rounds = int(np.clip(CALL_SECONDS / one, 1, _MOST_ROUNDS))
  return Runner(
    *(case.name, attention.name, kind, lambda: call(rounds), seconds),
    run.memory_analysis().temp_size_in_bytes,
    times=rounds,
  )


def _loop(run, kind):
  """Returns jitted (rounds, q, k, v, mask) -> what the last round gives."""

  def both(q, k, v, mask):
    out, pull = jax.vjp(run, q, k, v, mask)
    dq, dk, dv, d_mask = pull(out)
    # Spans and periods stay what they are, and their gradients are computed.
    mask = jax.tree.map(lambda x, dx: x + 0.0 * dx, mask, d_mask)
    return dq, dk, dv, mask

  def forward(q, k, v, mask):
    return run(q, k, v, mask), k, v, mask

  one = both if kind == "both" else forward
  return jax.jit(
    lambda rounds, *arrays: lax.fori_loop(
      0, rounds, lambda _, arrays: one(*arrays), arrays
    )
  )


def _ours(case, most_bytes):
  """Yields our implementations that serve a case in reasonable time."""
  q, k, _, _ = jax.eval_shape(lambda: cases.inputs(case))
  call = choice.call_of(q, k, case.mask, None, 0, None)
  best = choice.chosen(call)
  console.say(f"{case.name}: ours is {best}")
  yield _implementation("ours", case, best.implementation)
  blocks = case.B * case.H * (case.T // choice.BLOCK) ** 2 // 2
  for name, left_out in (
    ("blocked", blocks > _MOST_BLOCKS and f"it walks up to {blocks:,} blocks"),
    ("reference", _too_much(case, most_bytes)),
  ):
    if name == best.implementation:
      continue
    if left_out:
      console.say(f"{case.name}: {name} is left out, as {left_out}")
    else:
      yield _implementation(name, case, name)


def _implementation(name, case, implementation):
  run = functools.partial(attend, implementation=implementation, **case.options)
  return Attention(name, run)


def _too_much(case, most_bytes) -> str:
  """Returns why all pairs of a case are not held in memory; "" if they are."""
  logits = 4 * case.B * case.H * case.T**2
  if logits <= most_bytes:
    return ""
  return f"its logits alone are {console.bytes_text(logits)}"


def _dense(case, most_bytes):
  """Yields what others have: all causal pairs, and a uniform sliding window."""
  window = uniform_reach(case)
  if jax.default_backend() == "tpu":
    yield Attention("splash dense", _splash(case, None))
    if window:
      yield Attention("splash window", _splash(case, window))
    return
  implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
  left_out = implementation == "xla" and _too_much(case, most_bytes)
  if left_out:
    console.say(f"{case.name}: jax dense is left out, as {left_out}")
    return
  yield Attention(f"{implementation} dense", _jax(implementation, None))
  if window:
    yield Attention(f"{implementation} window", _jax(implementation, window))


def uniform_reach(case: Case) -> int:
  """Returns the reach of all heads if it is one and without a wave, or 0."""
  if case.span is None or case.period is not None or len(set(case.span)) > 1:
    return 0
  reach = int(np.ceil(case.span[0] + case.ramp))
  return reach if reach < case.T else 0


def _jax(implementation, window):
  def run(q, k, v, mask):
    del mask
    return jax.nn.dot_product_attention(
      *(q, k, v),
      is_causal=True,
      local_window_size=window and (window - 1, 0),
      implementation=implementation,
    )

  return run


def _splash(case, window, interpret=False):
  """Returns jax's own kernel for TPUs, in the blocks that ours has."""
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as splash_masks,
  )

  T, block = case.T, min(512, case.T)
  one = splash_masks.CausalMask((T, T))
  if window:
    one = splash_masks.LocalMask((T, T), (window - 1, 0), 0)
  attention = kernel.make_splash_mha(
    splash_masks.MultiHeadMask([one] * case.H),
    block_sizes=kernel.BlockSizes(
      **dict.fromkeys(
        (
          *("block_q", "block_kv", "block_kv_compute"),
          *("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"),
          *("block_q_dq", "block_kv_dq"),
        ),
        block,
      )
    ),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )

  def run(q, k, v, mask):
    del mask
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q / np.sqrt(case.K), k, v))
    out = jax.vmap(attention)(q.astype(k.dtype), k, v)
    return jnp.swapaxes(out, 1, 2).astype(k.dtype)

  return run


class Bar(NamedTuple):
  """What ours is to reach: at most so many times another median.

  Attributes:
    case: as it is named without its head width.
    others: names of runners, of which the first that ran counts.
    most: times.
    of: the case of the other, if it is another one.
  """

  case: str
  others: tuple[str, ...]
  most: float
  of: str = ""


_DENSE = ("cudnn dense", "splash dense")
BARS = (
  Bar("dense 2048", _DENSE, 1.3),
  Bar("dense 8192", _DENSE, 1.3),
  Bar("spans 2048", _DENSE, 0.5),
  Bar("spans 8192", _DENSE, 0.25),
  Bar("spans 2048", ("torch FlexAttention",), 0.8),
  Bar("spans 8192", ("torch FlexAttention",), 0.8),
  Bar("reach 256, 8192", ("cudnn window", "splash window"), 1.0),
  Bar("period 4, 8192", ("ours",), 0.4, of="no period, 8192"),
)


def bars(rows: list[dict]) -> list[dict]:
  """Returns what the rows of bench.json say of each bar.

  A bar without its rows is left out. Each has `case`, `of`, `times`, `most` and
  `met`, of forward and all gradients.
  """
  medians = {(row["case"], row["run"]): row["median_ms"] for row in rows}
  found = []
  for bar in BARS:
    for width in cases.DEVICE_WIDTHS:
      case = cases.on_device_name(bar.case, width)
      of = cases.on_device_name(bar.of, width) if bar.of else case
      ours = medians.get((case, "ours both"))
      other = next(
        (name for name in bar.others if (of, f"{name} both") in medians), None
      )
      if ours is None or other is None:
        continue
      times = ours / medians[of, f"{other} both"]
      name = f"{other} of {of}" if bar.of else other
      found.append(
        {
          "case": case,
          "of": name,
          "times": times,
          "most": bar.most,
          "met": times <= bar.most,
        }
      )
  return found


def bar_text(bar: dict) -> str:
  """Returns a line about a bar."""
  met = "met" if bar["met"] else "missed"
  return (
    f"{bar['case']:<26} ours both {bar['times']:.2f} x of {bar['of']}, "
    f"at most {bar['most']:g}: {met}"
  )
