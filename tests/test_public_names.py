"""The public names: all are there, each with a docstring of its own."""

import inspect
import re

import pytest

import adaptive_attention

NAMES = adaptive_attention.__all__
FUNCTIONS = [
  name
  for name in NAMES
  if inspect.isfunction(getattr(adaptive_attention, name))
]


def test_the_names_of_the_design_are_there():
  assert {*NAMES} >= {
    *("Mask", "Wave", "attend", "attend_ring", "AdaptiveSelfAttention"),
    *("ModelConfig", "Transformer", "WaveBounds", "generate", "init_cache"),
    *("init_memory", "mask_params", "regularizer"),
  }
  for name in NAMES:
    assert getattr(adaptive_attention, name).__module__.startswith(
      "adaptive_attention"
    )


@pytest.mark.parametrize("name", NAMES)
def test_each_has_a_docstring_of_its_own(name):
  text = inspect.getdoc(getattr(adaptive_attention, name))
  assert text and not text.startswith(f"{name}(")  # the default of dataclasses
  assert text.split("\n")[0].endswith((".", ":"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_name_their_arguments_and_errors(name):
  function = getattr(adaptive_attention, name)
  text = inspect.getdoc(function)
  assert re.search(r"Raises:", text), text
  parameters = inspect.signature(function).parameters
  for parameter in parameters:
    assert re.search(rf"\b{parameter}\b", text), f"{name} tells no {parameter}"
