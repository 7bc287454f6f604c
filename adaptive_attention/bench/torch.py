"""The runners of PyTorch's attention, to compare with."""

import functools
import time

import numpy as np

from adaptive_attention.bench.cases import BenchmarkError, Case, inputs
from adaptive_attention.bench.timing import Runner
from adaptive_attention.errors import first_line
from adaptive_attention.training import console

_ROUNDS = 20  # of a call on a GPU, where a launch takes longer than a kernel


def runners(case: Case, most_bytes: int) -> list[Runner]:
  """Makes runners of dense causal attention, and of FlexAttention with spans.

  They run on the GPU if PyTorch sees one.

  Args:
    case: a case without a memory.
    most_bytes: the most that one array over all pairs may take.

  Raises:
    BenchmarkError: PyTorch is not installed.
  """
  torch, flex_attention = _imported()
  device = "cuda" if torch.cuda.is_available() else "cpu"
  arrays = tuple(
    torch.tensor(np.array(x, np.float32))
    .to(device, getattr(torch, case.dtype))
    .transpose(1, 2)
    .contiguous()
    for x in inputs(case)
  )
  dense = functools.partial(
    torch.nn.functional.scaled_dot_product_attention, is_causal=True
  )
  found = _runners(torch, case, "torch dense causal", dense, arrays)
  if case.span is not None and case.period is None:
    found += _flex_runners(torch, flex_attention, case, arrays, most_bytes)
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


def _runners(torch, case, name, attention, arrays, seconds=None, both=True):
  """Makes the runners of forward, and of forward with all gradients."""
  *given, dout = arrays
  leaves = [x.clone().requires_grad_() for x in given]
  on_gpu = dout.device.type == "cuda"
  rounds = _ROUNDS if on_gpu else 1

  def forward():
    with torch.no_grad():
      attention(*given)

  def gradients():
    torch.autograd.grad(attention(*leaves), leaves, dout)

  def in_rounds(one):
    def call():
      for _ in range(rounds):
        one()
      if on_gpu:
        torch.cuda.synchronize()

    return call

  kinds = {"forward": forward} | ({"both": gradients} if both else {})
  return [
    Runner(case.name, name, kind, in_rounds(one), seconds, times=rounds)
    for kind, one in kinds.items()
  ]


def _flex_runners(torch, flex_attention, case, arrays, most_bytes):
  """Makes the runners of FlexAttention: on a CPU it has no backward pass."""
  # create_block_mask computes all pairs by 64-bit indices, several at a time.
  indices = 8 * case.H * case.T**2
  if indices > most_bytes:
    console.say(
      f"{case.name}: FlexAttention is left out, as its block mask needs "
      f"{console.bytes_text(indices)} of indices"
    )
    return []
  device = arrays[0].device.type
  is_open, weighted = _flex_mask(torch, case, device)
  start = time.perf_counter()
  try:
    blocks = flex_attention.create_block_mask(
      is_open, None, case.H, case.T, case.T, device=device
    )
    run = functools.partial(
      torch.compile(flex_attention.flex_attention),
      score_mod=weighted,
      block_mask=blocks,
    )
    with torch.no_grad():
      run(*arrays[:3])
  except Exception as error:  # of a compiler that may be missing or refuse
    console.say(
      f"{case.name}: FlexAttention does not run here ({first_line(error)})"
    )
    return []
  seconds = time.perf_counter() - start
  name, both = "torch FlexAttention", device == "cuda"
  return _runners(torch, case, name, run, arrays, seconds, both)


def _flex_mask(torch, case, device):
  """Returns (mask_mod, score_mod): open pairs, and log weights of the spans."""
  spans_H = torch.tensor(case.span, device=device)

  def is_open(b, h, t, s):
    return (t >= s) & (t - s < spans_H[h] + case.ramp)

  def weighted(score, b, h, t, s):
    weight = (spans_H[h] + case.ramp - (t - s)) / case.ramp
    return score + torch.log(torch.clamp(weight, 1e-6, 1.0))

  return is_open, weighted
