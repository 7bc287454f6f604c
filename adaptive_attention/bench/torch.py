"""The runners of PyTorch's attention, to compare with."""

import functools
import time

import numpy as np

from adaptive_attention.bench import rounds
from adaptive_attention.bench.cases import BenchmarkError, Case, inputs
from adaptive_attention.bench.timing import Runner
from adaptive_attention.errors import first_line
from adaptive_attention.training import console

_DENSE, _FLEX = "torch dense causal", "torch FlexAttention"


def runners(case: Case, most_bytes: int) -> list[Runner]:
  """Makes runners of dense causal attention, and of FlexAttention with spans.

  They run on the CPU, where FlexAttention has no backward pass.

  Args:
    case: a case without a memory.
    most_bytes: the most that one array over all pairs may take.

  Raises:
    BenchmarkError: PyTorch is not installed.
  """
  torch, flex_attention = _imported()
  arrays = tuple(
    torch.tensor(np.array(x)).transpose(1, 2).contiguous() for x in inputs(case)
  )
  works = _works(torch, _dense(torch), arrays)
  found = [Runner(case.name, _DENSE, *work) for work in works.items()]
  if not _has_flex(case):
    return found
  # create_block_mask computes all pairs by 64-bit indices, several at a time.
  indices = 8 * case.H * case.T**2
  if indices > most_bytes:
    console.say(
      f"{case.name}: FlexAttention is left out, as its block mask needs "
      f"{console.bytes_text(indices)} of indices"
    )
    return found
  start = time.perf_counter()
  try:
    make_blocks = flex_attention.create_block_mask
    run = _flex(torch, flex_attention, make_blocks, case, "cpu")
    forward = _works(torch, run, arrays)["forward"]
    forward()
  except Exception as error:  # of a compiler that may be missing or refuse
    console.say(_does_not_run(case, "FlexAttention", error))
    return found
  seconds = time.perf_counter() - start
  return [*found, Runner(case.name, _FLEX, "forward", forward, seconds)]


def runners_on_gpu(case: Case) -> list[Runner]:
  """Makes the same runners on the GPU, in rounds, with all gradients.

  Where PyTorch sees no GPU there are none, and a line says so.

  Raises:
    BenchmarkError: PyTorch is not installed.
  """
  torch, flex_attention = _imported()
  if not torch.cuda.is_available():
    console.say(f"{case.name}: PyTorch is left out, as it sees no GPU")
    return []
  shape = (case.B, case.H, case.T, case.K)
  dtype = getattr(torch, case.dtype)
  arrays = tuple(
    torch.randn(shape, device="cuda", dtype=dtype) for _ in range(4)
  )
  found = _in_rounds(torch, case, _DENSE, lambda: _dense(torch), arrays)
  if _has_flex(case) and len(set(case.span)) == 1:
    console.say(
      f"{case.name}: FlexAttention is left out, as it compiles for long and "
      "all heads have one span, which a window serves"
    )
  elif _has_flex(case):
    # Each mask is compiled for itself: a limit of PyTorch's on how often one
    # function is compiled, and lengths left open, would make it slow.
    torch.compiler.reset()
    make_blocks = torch.compile(flex_attention.create_block_mask)
    make = functools.partial(
      _flex, torch, flex_attention, make_blocks, case, "cuda"
    )
    found += _in_rounds(torch, case, _FLEX, make, arrays)
  return found


def _imported():
  """Returns the modules torch and flex_attention."""
  try:
    import torch
    from torch.nn.attention import flex_attention
  except ImportError as error:
    raise BenchmarkError(
      "config.bench.compare=torch needs PyTorch; pip install torch, or leave "
      "it empty"
    ) from error
  return torch, flex_attention


def _has_flex(case):
  return case.span is not None and case.period is None


def _does_not_run(case, name, error):
  return f"{case.name}: {name} does not run here ({first_line(error)})"


def _dense(torch):
  return functools.partial(
    torch.nn.functional.scaled_dot_product_attention, is_causal=True
  )


def _works(torch, run, arrays):
  """Returns by kind of work a function that does it once."""
  *given, dout = arrays
  leaves = [x.clone().requires_grad_() for x in given]

  def forward():
    with torch.no_grad():
      run(*given)

  def both():
    torch.autograd.grad(run(*leaves), leaves, dout)

  return {"forward": forward, "both": both}


def _in_rounds(torch, case, name, make, arrays):
  """Makes the runners of what `make` gives, or says why it does not run."""
  found, kind = [], "forward"
  start = time.perf_counter()
  try:
    works = _works(torch, make(), arrays)
    for kind, work in works.items():
      call = functools.partial(_call, torch, work)
      call(1)
      seconds = time.perf_counter() - start
      count = rounds.rounds_for(functools.partial(_seconds, call))
      found.append(
        Runner(
          *(case.name, name, kind, functools.partial(call, count), seconds),
          times=count,
          one_round=functools.partial(call, 1),
        )
      )
      start = time.perf_counter()
  except Exception as error:  # of a compiler that may be missing or refuse
    console.say(_does_not_run(case, f"{name} {kind}", error))
  return found


def _call(torch, work, count):
  """Starts the work so many times, and waits once for all of it."""
  for _ in range(count):
    work()
  torch.cuda.synchronize()


def _seconds(call, count):
  start = time.perf_counter()
  call(count)
  return time.perf_counter() - start


def _flex(torch, flex_attention, make_blocks, case, device):
  """Returns compiled FlexAttention under the spans of a case."""
  is_open, weighted = _flex_mask(torch, case, device)
  blocks = make_blocks(is_open, None, case.H, case.T, case.T, device=device)
  # On a CPU it is compiled as it always was there.
  options = {} if device == "cpu" else {"dynamic": False}
  return functools.partial(
    torch.compile(flex_attention.flex_attention, **options),
    score_mod=weighted,
    block_mask=blocks,
  )


def _flex_mask(torch, case, device):
  """Returns (mask_mod, score_mod): open pairs, and log weights of the spans."""
  spans_H = torch.tensor(case.span, device=device)

  def is_open(b, h, t, s):
    return (t >= s) & (t - s < spans_H[h] + case.ramp)

  def weighted(score, b, h, t, s):
    weight = (spans_H[h] + case.ramp - (t - s)) / case.ramp
    return score + torch.log(torch.clamp(weight, 1e-6, 1.0))

  return is_open, weighted
