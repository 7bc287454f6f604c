"""Times attention on an accelerator: our kernels beside those of others."""

import concurrent.futures
import functools
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adaptive_attention import accounting, attention
from adaptive_attention.attention import attend, choice
from adaptive_attention.bench import others, rounds
from adaptive_attention.bench.cases import Case
from adaptive_attention.bench.timing import Runner
from adaptive_attention.errors import first_line
from adaptive_attention.training import console

SECONDS = (
  300.0  # for all cases, with compiling; fewer repeats if they need more
)
# `blocked` is timed on a device where it computes at most so many blocks, one
# after the other. A block takes about ten launches, so that these take about
# 0.1 s forward.
MOST_BLOCKS = 2_000
_PAIRS_SHARE = 1 / 16  # of a device's memory, for one array over all pairs


class Attention(NamedTuple):
  """One of what is compared.

  Attributes:
    name: "ours", or whose it is and what it computes.
    run: (q, k, v, mask) -> out, all (B, T, H, K).
    counts: further entries of its rows.
  """

  name: str
  run: Callable
  counts: dict | None = None


def runners(case: Case, most_bytes: int) -> list[Runner]:
  """Makes the runners of a case: forward, and with all gradients.

  What does not exist, refuses or needs too much is left out, and a line says
  why.

  Args:
    most_bytes: the most that one array over all pairs may take, on a device
      that does not tell its memory.
  """
  most_bytes = _most_bytes(most_bytes)
  found = [*ours(case, most_bytes), *of_others(case, most_bytes)]
  return in_rounds(case, found)


def in_rounds(case: Case, attentions: Iterable[Attention]) -> list[Runner]:
  """Makes the runners of attentions; all are compiled at the same time."""
  arrays = (*_inputs(case), case.mask)
  wanted = [(one, kind) for one in attentions for kind in ("forward", "both")]
  lowered = [
    _or_said(case, one, kind, _lowered, arrays) for one, kind in wanted
  ]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    compiling = [
      x and pool.submit(_or_said, case, *work, _compiled, x)
      for work, x in zip(wanted, lowered, strict=True)
    ]
  found = [x and x.result() for x in compiling]
  made = [
    x and _or_said(case, *work, _runner, case, arrays, *x)
    for work, x in zip(wanted, found, strict=True)
  ]
  return [runner for runner in made if runner is not None]


def _or_said(case, one, kind, function, *args):
  """Returns function(one, kind, *args), or None with a line of its error."""
  try:
    return function(one, kind, *args)
  except Exception as error:  # of compilers and kernels that are not ours
    console.say(
      f"{case.name}: {one.name} {kind} is left out, as it does not run here "
      f"({first_line(error)})"
    )
    return None


def _lowered(one, kind, arrays):
  return rounds.loop(one.run, kind).lower(1, *arrays)


def _compiled(one, kind, lowered):
  start = time.perf_counter()
  return lowered.compile(), time.perf_counter() - start


def _runner(one, kind, case, arrays, run, compile_seconds):
  """Makes the runner of a compiled loop, in as many rounds as a call takes."""

  def call(count):
    jax.block_until_ready(run(count, *arrays))

  def seconds_of(count):
    start = time.perf_counter()
    call(count)
    return time.perf_counter() - start

  call(1)
  count = rounds.rounds_for(seconds_of)
  return Runner(
    *(case.name, one.name, kind, lambda: call(count), compile_seconds),
    run.memory_analysis().temp_size_in_bytes,
    counts=one.counts,
    times=count,
    one_round=lambda: call(1),
  )


def _inputs(case):
  """Makes (q, k, v, dout) on the device, which is faster than to send them."""
  shape = (case.B, case.T, case.H, case.K)
  keys = jax.random.split(jax.random.key(0), 4)
  make = jax.jit(lambda key: jax.random.normal(key, shape, case.dtype))
  return tuple(make(key) for key in keys)


def ours(case: Case, most_bytes: int) -> Iterable[Attention]:
  """Yields our implementations that serve a case in reasonable time."""
  shape = jax.ShapeDtypeStruct((case.B, case.T, case.H, case.K), case.dtype)
  call = choice.call_of(shape, shape, mask=case.mask, memory=case.memory)
  best = choice.chosen(call)
  console.say(f"{case.name}: ours is {best}")
  blocks = blocks_in_turn(case)
  left_out = {
    "blocked": f"it walks {blocks:,} blocks in turn"
    if blocks > MOST_BLOCKS
    else "",
    "reference": _too_much(case, most_bytes),
  }
  for name in dict.fromkeys((best.implementation, *left_out)):
    shown = "ours" if name == best.implementation else name
    if left_out.get(name):
      console.say(f"{case.name}: {shown} is left out, as {left_out[name]}")
      continue
    runs = best if shown == "ours" else choice.chosen(call, name)
    run = functools.partial(attend, implementation=name, **case.options)
    yield Attention(shown, run, _counts(case, runs))


def blocks_in_turn(case: Case) -> int:
  """Returns how many blocks `blocked` walks forward, of all heads."""
  if case.mask is None:
    n = -(-case.T // choice.BLOCK)
    return case.H * n * (n + 1) // 2
  pairs_H = attention.computed_pairs(
    case.mask, case.T, case.T, implementation="blocked"
  )
  return int(pairs_H.sum()) // choice.BLOCK**2


def _counts(case, runs: choice.Choice):
  """Says what runs in which blocks, and counts open and computed pairs."""
  counts = {"attention": str(runs)}
  if case.mask is None:
    return counts
  sizes = {"head_width": case.K, "dtype": jnp.dtype(case.dtype)}
  computed_H = accounting.computed_pairs(
    case.mask, case.T, runs.implementation, **sizes
  )
  opened_H = accounting.open_pairs(case.mask, case.T)
  return counts | {
    "open_pairs": int(opened_H.sum()),
    "computed_pairs": int(computed_H.sum()),
  }


def of_others(case: Case, most_bytes: int) -> Iterable[Attention]:
  """Yields what JAX has on this device, where it fits."""
  too_much = _too_much(case, most_bytes)
  for name, implementation, make in others.named(case, jax.default_backend()):
    if implementation == "xla" and too_much:
      console.say(f"{case.name}: {name} is left out, as {too_much}")
      continue
    try:
      yield Attention(name, make())
    except Exception as error:  # of what this version of JAX may not have
      console.say(
        f"{case.name}: {name} is left out, as it cannot be made here "
        f"({first_line(error)})"
      )


def _too_much(case, most_bytes) -> str:
  """Returns why all pairs of a case are not held in memory; "" if they are."""
  logits = 4 * case.B * case.H * case.T**2
  if logits <= most_bytes:
    return ""
  return f"its logits alone are {console.bytes_text(logits)}"


def _most_bytes(otherwise: int) -> int:
  """Returns the most that one array over all pairs may take here."""
  stats = jax.local_devices()[0].memory_stats() or {}
  limit = stats.get("bytes_limit")
  return otherwise if limit is None else int(_PAIRS_SHARE * limit)
