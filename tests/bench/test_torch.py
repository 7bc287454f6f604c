"""PyTorch is timed where it is, and left out by name where it is not."""

import sys
import types

import pytest

from adaptive_attention.bench import torch
from adaptive_attention.bench.cases import BenchmarkError, Case

SMALL = Case("small", 96, 96, span=(8.0, 8.0), ramp=4.0, B=2, K=16)


def test_without_it_the_error_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  for make in (torch.runners_on_gpu, lambda case: torch.runners(case, 1)):
    with pytest.raises(BenchmarkError, match="pip install torch"):
      make(SMALL)


def test_without_a_gpu_it_is_left_out_and_said(monkeypatch, capsys):
  cuda = types.SimpleNamespace(is_available=lambda: False)
  there = types.SimpleNamespace(cuda=cuda), None
  monkeypatch.setattr(torch, "_imported", lambda: there)
  assert torch.runners_on_gpu(SMALL) == []
  said = capsys.readouterr().out
  assert said == "small: PyTorch is left out, as it sees no GPU\n"


def test_flex_attention_is_for_spans_that_differ(monkeypatch, capsys):
  """It compiles for each mask, and five minutes are all there are."""
  made = []
  there = types.SimpleNamespace(
    cuda=types.SimpleNamespace(is_available=lambda: True),
    compiler=types.SimpleNamespace(reset=lambda: None),
    compile=lambda function: function,
    randn=lambda *_, **__: None,
    float32=None,
  )
  flex = types.SimpleNamespace(create_block_mask=None)
  monkeypatch.setattr(torch, "_imported", lambda: (there, flex))
  monkeypatch.setattr(
    torch, "_in_rounds", lambda torch, case, name, *_: made.append(name) or []
  )
  dense = "torch dense causal"
  for span, period, wanted in (
    ((8.0, 8.0), None, [dense]),
    ((8.0, 9.0), None, [dense, "torch FlexAttention"]),
    ((8.0, 9.0), (4.0, 4.0), [dense]),
    (None, None, [dense]),
  ):
    made.clear()
    torch.runners_on_gpu(SMALL._replace(span=span, period=period))
    assert made == wanted
  said = capsys.readouterr().out.splitlines()
  assert len(said) == 1
  assert "small: FlexAttention is left out, as it compiles for long" in said[0]


def fake(waits):
  cuda = types.SimpleNamespace(synchronize=lambda: waits.append(1))
  return types.SimpleNamespace(cuda=cuda)


def test_a_call_starts_all_rounds_and_waits_once():
  started, waits = [], []
  torch._call(fake(waits), lambda: started.append(len(waits)), 5)
  assert started == [0] * 5
  assert waits == [1]


def test_what_does_not_run_is_said(capsys):
  def make():
    raise RuntimeError("no compiler\nand where it was looked for")

  assert torch._in_rounds(fake([]), SMALL, "torch X", make, ()) == []
  said = capsys.readouterr().out
  assert said == "small: torch X forward does not run here (no compiler)\n"


def test_spans_are_those_of_the_case():
  """A pair is open up to the span and the ramp; weights fall along the ramp."""
  torch_itself = pytest.importorskip("torch")
  is_open, weighted = torch._flex_mask(torch_itself, SMALL, "cpu")
  t, s, head = (torch_itself.tensor(x) for x in (20, 9, 0))
  assert is_open(0, head, t, s)
  assert not is_open(0, head, t, s - 1)
  assert weighted(torch_itself.tensor(0.0), 0, head, t, s).exp() == 0.25
