"""Fits arrays by name to a model: their names, shapes and settings, and masks.

A file need not hold spans and waves. Where it holds none and the model has
them, they start fully open, so that the model computes what the file's model
did.
"""

import dataclasses
import functools
from collections.abc import Mapping

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from adaptive_attention import weight_files
from adaptive_attention.config import ModelConfig, fixes_the_model, model_config
from adaptive_attention.mask_parameters import open_logits, parameter_names
from adaptive_attention.model import Transformer
from adaptive_attention.parameters import MASK_PARAMETERS
from adaptive_attention.weight_files import WeightsError


def adapted(params: Mapping, saved: Mapping, config: ModelConfig) -> dict:
  """Returns the parameters of a model with masks from those of one without.

  The model computes over `config.max_context_tokens` what it did: spans and
  waves that the given parameters lack are fully open, and those that they have
  stay as they are.

  Args:
    params: a tree of parameters.
    saved: the settings by name of the model that it is of; those that are
      missing have their defaults.
    config: the model's, which may differ in its masks.

  Raises:
    WeightsError: a setting that differs otherwise, masks that the model does
      not have, or bounds that let no mask be fully open.
  """
  theirs = _checked_settings(saved, config)
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  return _with_masks(fitted(flat, _paths(theirs, config), config), config)


def _paths(theirs: ModelConfig, config: ModelConfig):
  """Returns path -> (path, not transposed) of what both models have."""
  own = parameter_names(theirs.mask_bounds)
  return {
    path: (path, False)
    for path in shapes_of(config)
    if path.split("/")[-1] in own or path.split("/")[-1] not in MASK_PARAMETERS
  }


def _with_masks(tree, config: ModelConfig):
  """Returns the tree with fully open masks where it has none."""
  flat = flax.traverse_util.flatten_dict(tree, sep="/")
  missing = set(shapes_of(config)) - set(flat)
  if not missing:
    return tree
  try:
    logits = open_logits(config.mask_bounds, config.max_context_tokens)
  except ValueError as error:
    raise WeightsError(f"model.{error}") from error
  flat |= {path: logits[path.split("/")[-1]] for path in missing}
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def check_tied(output, tree):
  """Checks that an output layer, if there is one, is the embedding.

  Raises:
    WeightsError: it differs.
  """
  if output is None:
    return
  embedding = tree["embed"]["embedding"]
  output = weight_files.float_array("lm_head.weight", output)
  if output.shape != embedding.shape or not np.array_equal(
    output.astype(np.float32), embedding
  ):
    raise WeightsError(
      "lm_head.weight differs from wte.weight; expected an output layer tied "
      "to the embedding"
    )


def fitted(found, names, config):
  """Returns the model's tree of float32 parameters from arrays by name.

  Args:
    found: name -> array, as `weight_files.float_array` takes it.
    names: name -> (our path, whether the matrix is transposed), for each
      parameter of the model.
    config: the model's.

  Raises:
    WeightsError: a parameter is unknown or missing, or does not fit.
  """
  model = (
    f"a model with n_layer={config.n_layer}, attention={config.attention!r} "
    f"and bias={config.bias}"
  )
  for name in found:
    if name not in names:
      raise WeightsError(
        f"parameter {name!r} is unknown to {model}; choose the settings it was "
        "trained with"
      )
  shapes, flat = shapes_of(config), {}
  for name, (path, transpose) in names.items():
    if name not in found:
      raise WeightsError(
        f"parameter {name!r} is missing, which {model} has; give a whole file, "
        "or choose the settings it was trained with"
      )
    flat[path] = _leaf(name, found[name], shapes[path], transpose)
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def _leaf(name, value, shape, transpose) -> np.ndarray:
  """Returns one parameter as a float32 array of a given shape."""
  value = weight_files.float_array(name, value)
  expected = shape[::-1] if transpose else shape
  if value.shape != expected:
    transposed = " (transposed)" if value.shape == expected[::-1] else ""
    raise WeightsError(
      f"parameter {name!r} is {value.shape}{transposed} where the model's "
      f"settings ask for {expected}; choose the settings it was trained with"
    )
  with np.errstate(over="ignore"):  # what overflows is reported below
    leaf = np.array(value.T if transpose else value, np.float32, order="C")
  if not np.isfinite(leaf).all():
    raise WeightsError(
      f"parameter {name!r} has {np.sum(~np.isfinite(leaf)):,} numbers that are "
      "not finite in float32; give the parameters of an earlier step"
    )
  return leaf


@functools.cache
def shapes_of(config: ModelConfig) -> dict[str, tuple]:
  """Returns {path: shape} of all parameters of the model."""
  model = Transformer(config)
  variables = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  )
  flat = flax.traverse_util.flatten_dict(variables["params"], sep="/")
  return {path: leaf.shape for path, leaf in flat.items()}


# The settings of spans and of waves, which a model without them need not share.
_OF_SPANS = ("max_span", "ramp")
_OF_WAVES = (
  *("period", "period_min", "period_max"),
  *("ratio_min", "ratio_max", "harmonics"),
)
_KINDS = ("dense", "span", "span_wave")  # each has the masks of those before


def _checked_settings(saved, config) -> ModelConfig:
  """Returns the file's settings, once they fit `config` in all but masks.

  A setting that the file's metadata lack has its default.

  Raises:
    WeightsError: a setting that differs, or metadata that describe no model.
  """
  try:
    theirs = model_config(saved)
  except (TypeError, ValueError) as error:
    raise WeightsError(f"its metadata describe no model: {error}") from error
  free: tuple[str, ...] = ()
  if _KINDS.index(theirs.attention) < _KINDS.index(config.attention):
    free = ("attention", *_OF_WAVES)
    if theirs.attention == "dense":
      free += _OF_SPANS
  values = dataclasses.asdict(theirs)
  told, flags = [], []
  for field, ours in dataclasses.asdict(config).items():
    name, value = f"model.{field}", values[field]
    if fixes_the_model(name) and value != ours and field not in free:
      default = "" if field in saved else ", the default of what they lack"
      told.append(f"{name}={value!r} (not {ours!r}{default})")
      flags.append(f"--config.{name}={value}")
  if told:
    raise WeightsError(
      f"its settings ask for {', '.join(told)}; set {' '.join(flags)}"
    )
  return theirs
