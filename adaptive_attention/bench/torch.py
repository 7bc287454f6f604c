"""The runners of PyTorch's attention, to compare with."""

import functools
import time

import numpy as np

from adaptive_attention.bench.cases import BenchmarkError, Case, inputs
from adaptive_attention.bench.timing import Runner
from adaptive_attention.errors import first_line
from adaptive_attention.training import console


def runners(case: Case, most_bytes: int) -> list[Runner]:
  """Makes runners of dense causal attention, and of FlexAttention with spans.

  Args:
    case: a case without a memory.
    most_bytes: the most that one array over all pairs may take.

  Raises:
    BenchmarkError: PyTorch is not installed.
  """
  torch, flex_attention = _imported()
  q, k, v, dout = (
    torch.tensor(np.array(x)).transpose(1, 2).contiguous() for x in inputs(case)
  )
  dense = functools.partial(
    torch.nn.functional.scaled_dot_product_attention, is_causal=True
  )
  leaves = [x.clone().requires_grad_() for x in (q, k, v)]

  def forward():
    with torch.no_grad():
      dense(q, k, v)

  def both():
    torch.autograd.grad(dense(*leaves), leaves, dout)

  found = [
    Runner(case.name, "torch dense causal", "forward", forward),
    Runner(case.name, "torch dense causal", "both", both),
  ]
  if case.span is not None and case.period is None:
    found += _flex_runners(torch, flex_attention, case, (q, k, v), most_bytes)
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


def _flex_runners(torch, flex_attention, case, arrays, most_bytes):
  """Makes the runner of forward alone: on a CPU there is no backward pass."""
  # create_block_mask computes all pairs by 64-bit indices, several at a time.
  indices = 8 * case.H * case.T**2
  if indices > most_bytes:
    console.say(
      f"{case.name}: FlexAttention is left out, as its block mask needs "
      f"{console.bytes_text(indices)} of indices"
    )
    return []
  is_open, weighted = _flex_mask(torch, case)
  start = time.perf_counter()
  try:
    blocks = flex_attention.create_block_mask(
      is_open, None, case.H, case.T, case.T, device="cpu"
    )
    run = torch.compile(flex_attention.flex_attention)

    def forward():
      with torch.no_grad():
        run(*arrays, score_mod=weighted, block_mask=blocks)

    forward()
  except Exception as error:  # of a compiler that may be missing or refuse
    console.say(
      f"{case.name}: FlexAttention does not run here ({first_line(error)})"
    )
    return []
  seconds = time.perf_counter() - start
  return [Runner(case.name, "torch FlexAttention", "forward", forward, seconds)]


def _flex_mask(torch, case):
  """Returns (mask_mod, score_mod): open pairs, and log weights of the spans."""
  spans_H = torch.tensor(case.span)

  def is_open(b, h, t, s):
    return (t >= s) & (t - s < spans_H[h] + case.ramp)

  def weighted(score, b, h, t, s):
    weight = (spans_H[h] + case.ramp - (t - s)) / case.ramp
    return score + torch.log(torch.clamp(weight, 1e-6, 1.0))

  return is_open, weighted
