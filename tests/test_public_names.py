"""The public names: all are there, each with a docstring of its own."""

import dataclasses
import inspect
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import adaptive_attention

NAMES = adaptive_attention.__all__
FUNCTIONS = [
  name
  for name in NAMES
  if inspect.isfunction(getattr(adaptive_attention, name))
]
CLASSES = [name for name in NAMES if name not in FUNCTIONS]
CALLS = ["AdaptiveSelfAttention.__call__", "Transformer.__call__"]
OF_FLAX = {"parent", "name"}  # the fields of every module
REQUIRED = {
  "AdaptiveSelfAttention": {"num_heads": 1},
  "Mask": {"span": jnp.ones(1)},
  "State": {"layers": (), "tokens_read": 0},
  "Transformer": {"config": adaptive_attention.ModelConfig(n_layer=1)},
  "Wave": {"period": jnp.ones(1), "ratio": jnp.ones(1)},
}


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
  assert re.search(r"\b(tokens?|nats|bits)\b", text), "it tells no unit"


@pytest.mark.parametrize("name", FUNCTIONS + CALLS)
def test_functions_name_their_arguments_and_errors(name):
  owner, _, method = name.partition(".")
  function = getattr(adaptive_attention, owner)
  function = getattr(function, method) if method else function
  text = inspect.getdoc(function)
  assert re.search(r"Raises:", text), text
  for parameter in {*inspect.signature(function).parameters} - {"self"}:
    assert re.search(rf"\b{parameter}\b", text), f"{name} tells no {parameter}"


def fields(name):
  """Returns the names of a public class's own fields."""
  every = dataclasses.fields(getattr(adaptive_attention, name))
  return [field.name for field in every if field.name not in OF_FLAX]


def section(text, title):
  """Returns a section of a docstring; empty where there is none."""
  found = re.search(rf"^{title}:\n((?:(?:  .*)?\n)+)", text + "\n", re.M)
  return found[1] if found else ""


@pytest.mark.parametrize("name", CLASSES)
def test_classes_tell_each_of_their_fields(name):
  text = inspect.getdoc(getattr(adaptive_attention, name))
  lines = re.findall(r"^  ([\w, ]+):", section(text, "Attributes"), re.M)
  told = [field for line in lines for field in line.split(", ")]
  assert sorted(told) == sorted(fields(name))


def refuses(name, field, value):
  """Tells whether ValueError comes of a field, at the latest at the first call.

  A value of another type than the field's may give TypeError, which counts as
  nothing.
  """
  made = getattr(adaptive_attention, name)
  try:
    one = made(**REQUIRED.get(name, {}) | {field: value})
    if isinstance(one, nn.Module):
      jax.eval_shape(one.init, jax.random.key(0), jnp.ones((1, 2, 4)))
  except ValueError:
    return True
  except Exception:
    return False
  return False


@pytest.mark.parametrize("name", CLASSES)
def test_classes_that_refuse_a_field_say_so(name):
  text = inspect.getdoc(getattr(adaptive_attention, name))
  tried = itertools.product(fields(name), (-1, "none such"))
  refused = [field for field, value in tried if refuses(name, field, value)]
  assert bool(refused) == ("ValueError" in section(text, "Raises")), refused


def test_some_class_refuses_and_some_does_not():
  assert refuses("ModelConfig", "n_head", -1)
  assert refuses("AdaptiveSelfAttention", "num_heads", -1)
  assert not refuses("Mask", "ramp", -1)
