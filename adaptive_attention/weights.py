"""Reads parameters of the published program, and reads and writes files.

The published program is a fork of nanoGPT, in PyTorch, with names and shapes of
its own: linear weights are (out, in), `wte` is also the output layer, `wpe`
holds the positions of the first layer, and `h.I.add_extra_pos_emb` holds those
that are added before layer I >= 1.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping

import flax.traverse_util

from adaptive_attention import gpt2, weight_files
from adaptive_attention.config import ModelConfig
from adaptive_attention.fitted import adapted, check_tied, fitted, shapes_of
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


def _published_shapes(config: ModelConfig) -> dict[str, tuple]:
  """Returns {their name: the shape of their array}, with an output layer."""
  ours = shapes_of(config)
  shapes = {
    name: ours[path][::-1] if transpose else ours[path]
    for name, (path, transpose) in _names(config).items()
  }
  return shapes | {"lm_head.weight": shapes["transformer.wte.weight"]}


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
  tree = fitted(found, names, config)
  check_tied(output, tree)
  return tree


def load(path: str | os.PathLike, config: ModelConfig) -> dict:
  """Returns the tree of float32 parameters that a file holds, in any dtype.

  Masks that the file lacks are fully open; see `adapted`.

  Args:
    path: a .safetensors that `save` wrote, a folder with a GPT-2 (see `gpt2`),
      or a file of the published program's parameters. The latter is an .npz
      with one array per parameter, named `param/NAME` or `NAME`, or a .pt
      checkpoint or state dict, which needs PyTorch and is read with
      weights_only=True.
    config: the model's.

  Raises:
    WeightsError: the file does not exist, is damaged or of another format, or
      holds a model of other settings; or as `from_nanogpt` does.
  """
  path = pathlib.Path(path)
  is_gpt2 = (path / "config.json").is_file()
  if not path.is_file() and not is_gpt2:
    wrong = "does not exist"
    if path.exists():
      wrong = "is not a file, and no folder with checkpoints or a config.json"
    raise WeightsError(f"init_from={path} {wrong}; give {_KINDS}")
  try:
    if is_gpt2:
      params, theirs = gpt2.read(path)
      return adapted(params, dataclasses.asdict(theirs), config)
    match path.suffix:
      case ".safetensors":
        return adapted(*weight_files.read_safetensors(path), config)
      case ".npz":
        shapes = _published_shapes(config)
        return from_nanogpt(weight_files.read_npz(path, shapes), config)
      case ".pt":
        return from_nanogpt(weight_files.read_torch(path), config)
  except WeightsError as error:
    raise WeightsError(f"init_from={path}: {error}") from error
  raise WeightsError(f"init_from={path} has an unknown suffix; give {_KINDS}")


_KINDS = (
  "a .safetensors, an .npz, a .pt, the folder of a run, or that of a GPT-2 "
  "(config.json and model.safetensors)"
)


def save(
  path: str | os.PathLike,
  params: Mapping,
  config: ModelConfig,
  step: int,
  **more: str,
) -> None:
  """Writes the parameters as safetensors, with the model's settings.

  Names are paths, as block_0/attention/qkv/kernel. The metadata hold `config`,
  the ModelConfig in JSON, `step`, and more texts if some are given. An existing
  file is replaced as a whole.

  Raises:
    OSError: the file cannot be written; the old content stays.
  """
  weight_files.write_arrays(
    path,
    flax.traverse_util.flatten_dict(params, sep="/"),
    {"config": json.dumps(dataclasses.asdict(config)), "step": str(step)}
    | more,
  )
