"""Reads and writes GPT-2 in the layout of the Hugging Face libraries.

A folder holds `config.json`, with the sizes, and `model.safetensors`, whose
names are transformer.wte.weight, transformer.h.0.attn.c_attn.weight, and so on;
the prefix may be absent. Kernels are (in, out), as ours are. The output layer
is the embedding.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from adaptive_attention import weight_files
from adaptive_attention.atomic_write import atomic_write
from adaptive_attention.config import ModelConfig
from adaptive_attention.fitted import check_tied, fitted
from adaptive_attention.mask_parameters import mask_params
from adaptive_attention.weight_files import WeightsError

_PREFIX = "transformer."
_SIZES = {  # theirs -> ours
  "n_layer": "n_layer",
  "n_head": "n_head",
  "n_embd": "width",
  "n_positions": "context_tokens",
  "vocab_size": "vocab_size",
}
# Settings that we do not have, with the value that we compute by, which is also
# the one that a file means if it lacks them.
_FIXED = {
  "model_type": "gpt2",
  "layer_norm_epsilon": 1e-5,
  "scale_attn_weights": True,
  "scale_attn_by_inverse_layer_idx": False,
  "add_cross_attention": False,
  "tie_word_embeddings": True,
}
_LAYER = {  # theirs -> ours
  "ln_1.weight": "norm_1/scale",
  "ln_1.bias": "norm_1/bias",
  "attn.c_attn.weight": "attention/qkv/kernel",
  "attn.c_attn.bias": "attention/qkv/bias",
  "attn.c_proj.weight": "attention/out/kernel",
  "attn.c_proj.bias": "attention/out/bias",
  "ln_2.weight": "norm_2/scale",
  "ln_2.bias": "norm_2/bias",
  "mlp.c_fc.weight": "mlp/up/kernel",
  "mlp.c_fc.bias": "mlp/up/bias",
  "mlp.c_proj.weight": "mlp/down/kernel",
  "mlp.c_proj.bias": "mlp/down/bias",
}
_BUFFERS = (".attn.bias", ".attn.masked_bias")  # tables over pairs of positions


def config_from_gpt2(theirs: Mapping[str, Any]) -> ModelConfig:
  """Returns the ModelConfig, without masks, of the settings in a config.json.

  Raises:
    WeightsError: a size is missing, or a setting asks for what the model here
      does not compute.
    ValueError: a size that is not possible.
  """
  for name, value in _FIXED.items():
    if theirs.get(name, value) != value:
      raise WeightsError(
        f"setting {name}={theirs[name]!r} is not served; expected {value!r}"
      )
  for name in _SIZES:
    if name not in theirs:
      raise WeightsError(f"setting {name!r} is missing; add it")
  width, inner = theirs["n_embd"], theirs.get("n_inner")
  if inner not in (None, 4 * width):
    raise WeightsError(
      f"setting n_inner={inner} is not served; expected 4 n_embd = {4 * width}"
    )
  gelu = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "erf"}
  activation = theirs.get("activation_function", "gelu_new")
  if activation not in gelu:
    raise WeightsError(
      f"setting activation_function={activation!r} is not served; expected one "
      f"of {', '.join(gelu)}"
    )
  return ModelConfig(
    **{ours: theirs[name] for name, ours in _SIZES.items()},
    attention="dense",
    position="learned_once",
    bias=True,
    gelu=gelu[activation],
  )


def _names(config: ModelConfig) -> dict[str, str]:
  """Returns {their name, without the prefix: our path}."""
  names = {
    "wte.weight": "embed/embedding",
    "wpe.weight": "position_0",
    "ln_f.weight": "norm/scale",
    "ln_f.bias": "norm/bias",
  }
  for i in range(config.n_layer):
    for name, path in _LAYER.items():
      names[f"h.{i}.{name}"] = f"block_{i}/{path}"
  return names


def from_gpt2(arrays: Mapping[str, Any], config: ModelConfig) -> dict:
  """Returns the tree of float32 parameters from arrays by their names.

  Args:
    arrays: name -> array of NumPy, JAX or PyTorch.
    config: as `config_from_gpt2` makes it.

  Raises:
    WeightsError: a name is unknown or missing, an array does not fit, or the
      output layer is not the embedding.
  """
  found = {str(n).removeprefix(_PREFIX): x for n, x in arrays.items()}
  found = {n: x for n, x in found.items() if not n.endswith(_BUFFERS)}
  output = found.pop("lm_head.weight", None)
  names = {name: (path, False) for name, path in _names(config).items()}
  tree = fitted(found, names, config)
  check_tied(output, tree)
  return tree


def read(folder: pathlib.Path) -> tuple[dict, ModelConfig]:
  """Returns (parameters, settings) of a folder with a GPT-2.

  Raises:
    WeightsError: a file is missing or damaged; or as `from_gpt2` does.
  """
  try:
    theirs = json.loads((folder / "config.json").read_text())
    config = config_from_gpt2(dict(theirs))
  except (ValueError, TypeError) as error:
    raise WeightsError(f"config.json describes no GPT-2: {error}") from error
  path = folder / "model.safetensors"
  if not path.is_file():
    raise WeightsError(
      "model.safetensors does not exist; save the model as one such file"
    )
  return from_gpt2(weight_files.read_arrays(path), config), config


def write(folder: pathlib.Path, params: Mapping, config: ModelConfig):
  """Writes a model into a folder: config.json, model.safetensors, spans.json.

  Parameters are written in the dtype that they have. The last file holds what
  GPT-2 does not know: for each layer each head's span and reach in tokens, and
  its period and ratio where there is a wave. Programs that do not read it
  compute without masks.

  Raises:
    WeightsError: the model has parts that GPT-2 does not have.
    OSError: a file cannot be written.
  """
  for name, expected in (
    ("position", "learned_once"),
    ("bias", True),
    ("n_kv_head", config.n_head),
  ):
    if getattr(config, name) != expected:
      raise WeightsError(
        f"model.{name}={getattr(config, name)!r} has no place in a GPT-2; it "
        f"needs {expected!r}"
      )
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  arrays = {
    _PREFIX + name: np.asarray(flat[path])
    for name, path in _names(config).items()
  }
  theirs = _FIXED | {
    **{name: getattr(config, ours) for name, ours in _SIZES.items()},
    "architectures": ["GPT2LMHeadModel"],
    "torch_dtype": str(arrays[f"{_PREFIX}wte.weight"].dtype),
    "activation_function": "gelu_new" if config.gelu == "tanh" else "gelu",
  }
  folder.mkdir(parents=True, exist_ok=True)
  weight_files.write_arrays(
    folder / "model.safetensors", arrays, {"format": "pt"}
  )
  for name, content in (("config", theirs), ("spans", spans(params, config))):
    text = json.dumps(content, indent=2) + "\n"
    atomic_write(folder / f"{name}.json", text.encode())


def spans(params: Mapping, config: ModelConfig) -> dict[str, Any]:
  """Returns what the heads learned, by layer and head, as JSON takes it."""
  layers = []
  for mask in mask_params(params, config):
    lengths = {"span": mask.span}
    if mask.wave is not None:
      lengths |= {"period": mask.wave.period, "ratio": mask.wave.ratio}
    layers.append(
      {name: np.asarray(x, float).tolist() for name, x in lengths.items()}
    )
  waves = config.attention == "span_wave"
  return {
    "attention": config.attention,
    "ramp": config.ramp,
    "harmonics": config.harmonics if waves else None,
    "integer_periods": waves and config.period == "integer",
    "layers": layers,
  }
