"""Reads parameters of the published program, and reads and writes files.

The published program is a fork of nanoGPT, in PyTorch, with names and shapes of
its own: linear weights are (out, in), `wte` is also the output layer, `wpe`
holds the positions of the first layer, and `h.I.add_extra_pos_emb` holds those
that are added before layer I >= 1.
"""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Mapping

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from adaptive_attention import weight_files
from adaptive_attention.config import (
  ModelConfig,
  fixes_the_model,
  model_config,
)
from adaptive_attention.mask_parameters import open_logits, parameter_names
from adaptive_attention.model import Transformer
from adaptive_attention.parameters import MASK_PARAMETERS
from adaptive_attention.weight_files import WeightsError

_SETTINGS = {  # theirs -> ours
  "block_size": "context_tokens",
  "n_layer": "n_layer",
  "n_head": "n_head",
  "n_embd": "width",
  "vocab_size": "vocab_size",
  "softness": "ramp",
  "span_reg": "span_coef",
  "period_min": "period_min",
  "period_max": "period_max",
  "harmonics": "harmonics",
  "bias": "bias",
  "dropout": "dropout",
}


def config_from_nanogpt(theirs: Mapping) -> ModelConfig:
  """Returns the ModelConfig of the model that the published program builds.

  Args:
    theirs: its settings by name: block_size, n_layer, n_head, n_embd,
      vocab_size, bias, softness (the ramp), span_reg, use_triangle_wave,
      period_min, period_max, harmonics, dropout. `T`, the length of one batch,
      is ignored, as it does not belong to the model. The longest span is
      block_size.

  Raises:
    WeightsError: a setting is unknown, or one of the model's sizes is missing.
    ValueError: a setting that is not possible.
  """
  known = {*_SETTINGS, "use_triangle_wave", "T"}
  for name in theirs:
    if name not in known:
      raise WeightsError(
        f"setting {name!r} is unknown; expected some of "
        f"{', '.join(sorted(known))}"
      )
  for name in ("block_size", "n_layer", "n_head", "n_embd", "vocab_size"):
    if name not in theirs:
      raise WeightsError(f"setting {name!r} is missing; add it")
  fields = {
    ours: theirs[name] for name, ours in _SETTINGS.items() if name in theirs
  }
  wave = theirs.get("use_triangle_wave", False)
  return ModelConfig(
    **fields,
    attention="span_wave" if wave else "span",
    max_span=theirs["block_size"],
  )


def _names(config: ModelConfig) -> dict[str, tuple[str, bool]]:
  """Returns {their name: (our path, whether the matrix is transposed)}."""
  if config.position != "learned":
    raise WeightsError(
      f"model.position={config.position!r} has no parameters in a published "
      "model; give model.position=learned"
    )
  if config.n_kv_head != config.n_head:
    raise WeightsError(
      f"model.n_kv_head={config.n_kv_head} has no place in a published model, "
      f"whose layers have as many heads of keys as the {config.n_head} of "
      "queries; give model.n_kv_head=0"
    )
  names = {
    "transformer.wte.weight": ("embed/embedding", False),
    "transformer.wpe.weight": ("position_0", False),
    "transformer.ln_f.weight": ("norm/scale", False),
  }
  if config.bias:
    names["transformer.ln_f.bias"] = ("norm/bias", False)
  for i in range(config.n_layer):
    theirs, ours = f"transformer.h.{i}", f"block_{i}"
    if i:
      position = f"{theirs}.add_extra_pos_emb.pos_emb.weight"
      names[position] = (f"position_{i}", False)
    for name, (path, transpose) in _names_of_a_layer(config).items():
      names[f"{theirs}.{name}"] = (f"{ours}/{path}", transpose)
  return names


_LOGITS = {  # of each kind of attention
  "dense": {},
  "span": {"span_params": "span_logit"},
  "span_wave": {
    "span_params": "span_logit",
    "triangle_wave.period_weight": "period_logit",
    "triangle_wave.ratio_weight": "ratio_logit",
  },
}
_LINEAR = {
  "attn.c_attn": "attention/qkv",
  "attn.c_proj": "attention/out",
  "mlp.c_fc": "mlp/up",
  "mlp.c_proj": "mlp/down",
}
_NORMS = {"ln_1": "norm_1", "ln_2": "norm_2"}


def _names_of_a_layer(config):
  """Returns the same for one layer, without `h.I.` and `block_I/`."""
  names = {}
  for name, path in _LOGITS[config.attention].items():
    names[f"attn.{name}"] = (f"attention/{path}", False)
  for name, path in _LINEAR.items():
    names[f"{name}.weight"] = (f"{path}/kernel", True)
  for name, path in _NORMS.items():
    names[f"{name}.weight"] = (f"{path}/scale", False)
  if config.bias:
    for name, path in (_LINEAR | _NORMS).items():
      names[f"{name}.bias"] = (f"{path}/bias", False)
  return names


def _is_buffer(name, shape):
  """Returns whether it is a table over pairs of positions, which we compute."""
  return bool(
    re.fullmatch(r"transformer\.h\.\d+\.attn\.\w+", name)
    and len(shape) >= 2
    and shape[-1] == shape[-2]
  )


def from_nanogpt(params: Mapping, config: ModelConfig) -> dict:
  """Returns the parameters of `Transformer(config)` from the published names.

  Buffers are ignored. `lm_head.weight` must equal `transformer.wte.weight`.

  Args:
    params: name -> array of NumPy, JAX or PyTorch, of any floating-point dtype.
    config: the model's; its position must be "learned".

  Returns:
    The tree of float32 parameters.

  Raises:
    WeightsError: the model has other positions, a name is unknown or missing, a
      shape does not fit, values are no floating-point numbers or not finite in
      float32, or the output layer is not tied to the embedding.
  """
  names = _names(config)
  found = {
    str(name): value
    for name, value in params.items()
    if name in names or not _is_buffer(str(name), getattr(value, "shape", ()))
  }
  output = found.pop("lm_head.weight", None)
  tree = _tree(found, names, config)
  if output is not None and not np.array_equal(
    weight_files.float_array("lm_head.weight", output).astype(np.float32),
    tree["embed"]["embedding"],
  ):
    raise WeightsError(
      "lm_head.weight differs from transformer.wte.weight; expected an "
      "output layer tied to the embedding, as in the published program"
    )
  return tree


def _tree(found, names, config):
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
  shapes, flat = _shapes(config), {}
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
def _shapes(config: ModelConfig) -> dict[str, tuple]:
  """Returns {path: shape} of all parameters of the model."""
  model = Transformer(config)
  variables = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  )
  flat = flax.traverse_util.flatten_dict(variables["params"], sep="/")
  return {path: leaf.shape for path, leaf in flat.items()}


def adapted(params: Mapping, saved: Mapping, config: ModelConfig) -> dict:
  """Returns the parameters of a model with masks from those of one without.

  What it computes over `config.max_context_tokens` stays the same: masks that
  the given parameters lack are fully open. Others stay as they are.

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
  return _with_masks(_tree(flat, _paths(theirs, config), config), config)


def _paths(theirs: ModelConfig, config: ModelConfig):
  """Returns the parameters that both models have, as `_tree` takes names."""
  own = parameter_names(theirs.mask_bounds)
  return {
    path: (path, False)
    for path in _shapes(config)
    if path.split("/")[-1] in own or path.split("/")[-1] not in MASK_PARAMETERS
  }


def _with_masks(tree, config: ModelConfig):
  """Returns the tree with fully open masks where it has none."""
  missing = set(_shapes(config)) - set(
    flax.traverse_util.flatten_dict(tree, sep="/")
  )
  if not missing:
    return tree
  try:
    logits = open_logits(config.mask_bounds, config.max_context_tokens)
  except ValueError as error:
    raise WeightsError(f"model.{error}") from error
  flat = flax.traverse_util.flatten_dict(tree, sep="/")
  flat |= {path: logits[path.split("/")[-1]] for path in missing}
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def load(path: str | os.PathLike, config: ModelConfig) -> dict:
  """Returns the tree of float32 parameters that a file holds, in any dtype.

  Masks that the file lacks are fully open; see `adapted`.

  Args:
    path: a .safetensors that `save` wrote, or a file of the published program's
      parameters. The latter is an .npz with one array per parameter, named
      `param/NAME` or `NAME`, or a .pt checkpoint or state dict, which needs
      PyTorch and is read with weights_only=True.
    config: the model's.

  Raises:
    WeightsError: the file does not exist, is damaged or of another format, or
      holds a model of other settings; or as `from_nanogpt` does.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    wrong = "is not a file" if path.exists() else "does not exist"
    raise WeightsError(
      f"init_from={path} {wrong}; give a .safetensors, an .npz or a .pt"
    )
  try:
    match path.suffix:
      case ".safetensors":
        return adapted(*weight_files.read_safetensors(path), config)
      case ".npz":
        return from_nanogpt(weight_files.read_npz(path), config)
      case ".pt":
        return from_nanogpt(weight_files.read_torch(path), config)
  except WeightsError as error:
    raise WeightsError(f"init_from={path}: {error}") from error
  raise WeightsError(
    f"init_from={path} has an unknown suffix; give a .safetensors, an .npz or "
    "a .pt"
  )


def save(
  path: str | os.PathLike, params: Mapping, config: ModelConfig, step: int
) -> None:
  """Writes the parameters as safetensors, with the model's settings.

  Names are paths, as block_0/attention/qkv/kernel. The metadata hold `config`,
  the ModelConfig in JSON, and `step`. An existing file is replaced as a whole.

  Raises:
    OSError: the file cannot be written; the old content stays.
  """
  weight_files.write_safetensors(
    path,
    flax.traverse_util.flatten_dict(params, sep="/"),
    dataclasses.asdict(config),
    step,
  )


# The settings of spans and of waves, which a model without them need not share.
_OF_SPANS = ("max_span", "ramp")
_OF_WAVES = (
  *("period", "period_min", "period_max"),
  *("ratio_min", "ratio_max", "harmonics"),
)
_KINDS = ("dense", "span", "span_wave")  # each has the masks of those before


def _checked_settings(saved, config) -> ModelConfig:
  """Returns the file's settings, whose model but for masks is that of `config`.

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
  for field, ours in dataclasses.asdict(config).items():
    name, value = f"model.{field}", values[field]
    if fixes_the_model(name) and value != ours and field not in free:
      holds = "it holds a model with" if field in saved else "its metadata lack"
      default = "" if field in saved else ", which is the default"
      raise WeightsError(
        f"{holds} {name}={value!r}{default}, not {ours!r}; set "
        f"--config.{name}={value}"
      )
  return theirs
