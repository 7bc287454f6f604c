"""Parameters in and out: of the published program, and as safetensors.

The published program is in PyTorch (a nanoGPT fork). Names and shapes are its
own: linear weights are (out, in), `wte` is also the output layer, `wpe` holds
the positions of the first block and `h.I.add_extra_pos_emb` those added before
block I >= 1.
"""

import dataclasses
import json
import pathlib
import re
import zipfile
from collections.abc import Mapping

import flax.traverse_util
import numpy as np
import safetensors
import safetensors.numpy

from adaptive_attention import logbook, settings
from adaptive_attention.model import ModelConfig


class WeightsError(ValueError):
  """A file or a set of parameters that cannot be read in."""


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
  """The model that the published program builds from these settings.

  Args:
    theirs: block_size, n_layer, n_head, n_embd, vocab_size, bias, softness
      (the ramp), span_reg, use_triangle_wave, period_min, period_max,
      harmonics, dropout; `T`, the length of one batch, says nothing of the
      model and is passed over. The largest span is block_size.

  Raises:
    WeightsError: an unknown setting, or one of the model's sizes missing.
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


def _names(config: ModelConfig):
  """Their name -> our path and whether the matrix is to be transposed."""
  if config.position != "learned":
    raise WeightsError(
      f"model.position={config.position!r} has no parameters in a published "
      "model; give model.position=learned"
    )
  names = {
    "transformer.wte.weight": ("embed/embedding", False),
    "transformer.wpe.weight": ("position_0", False),
    "transformer.ln_f.weight": ("norm/scale", False),
  }
  if config.bias:
    names["transformer.ln_f.bias"] = ("norm/bias", False)
  logits = {
    "dense": {},
    "span": {"span_params": "span_logit"},
    "span_wave": {
      "span_params": "span_logit",
      "triangle_wave.period_weight": "period_logit",
      "triangle_wave.ratio_weight": "ratio_logit",
    },
  }[config.attention]
  linear = {
    "attn.c_attn": "attention/qkv",
    "attn.c_proj": "attention/out",
    "mlp.c_fc": "mlp/up",
    "mlp.c_proj": "mlp/down",
  }
  norms = {"ln_1": "norm_1", "ln_2": "norm_2"}
  for i in range(config.n_layer):
    theirs, ours = f"transformer.h.{i}", f"block_{i}"
    if i:
      position = f"{theirs}.add_extra_pos_emb.pos_emb.weight"
      names[position] = (f"position_{i}", False)
    for name, path in logits.items():
      names[f"{theirs}.attn.{name}"] = (f"{ours}/attention/{path}", False)
    for name, path in linear.items():
      names[f"{theirs}.{name}.weight"] = (f"{ours}/{path}/kernel", True)
    for name, path in norms.items():
      names[f"{theirs}.{name}.weight"] = (f"{ours}/{path}/scale", False)
    if config.bias:
      for name, path in (linear | norms).items():
        names[f"{theirs}.{name}.bias"] = (f"{ours}/{path}/bias", False)
  return names


def _is_buffer(name, value):
  """Tables over pairs of positions, which we compute from the distance."""
  return bool(
    re.fullmatch(r"transformer\.h\.\d+\.attn\.\w+", name)
    and value.ndim >= 2
    and value.shape[-1] == value.shape[-2]
  )


def from_nanogpt(params: Mapping[str, np.ndarray], config: ModelConfig):
  """The parameter tree of `Transformer(config)` out of PyTorch's names.

  Buffers are passed over, and so is `lm_head.weight`, which is
  `transformer.wte.weight` again.

  Raises:
    WeightsError: an unknown or missing name, a shape that does not fit, or an
      output layer of its own.
  """
  names = _names(config)
  flat = {}
  for name, value in params.items():
    value = np.asarray(value)
    if name == "lm_head.weight":
      if not np.array_equal(value, params.get("transformer.wte.weight")):
        raise WeightsError(
          "lm_head.weight differs from transformer.wte.weight; expected an "
          "output layer tied to the embedding, as in the published program"
        )
    elif name in names:
      path, transpose = names[name]
      value = value.T if transpose else value
      flat[path] = np.array(value, np.float32, order="C")
    elif not _is_buffer(name, value):
      raise WeightsError(
        f"parameter {name!r} is unknown to a model with "
        f"n_layer={config.n_layer}, attention={config.attention!r} and "
        f"bias={config.bias}; choose the settings it was trained with"
      )
  for name, (path, _) in names.items():
    if path not in flat:
      raise WeightsError(
        f"parameter {name!r} is missing, which a model with "
        f"n_layer={config.n_layer}, attention={config.attention!r} and "
        f"bias={config.bias} has; choose the settings it was trained with"
      )
  _check_shapes(flat, config, {path: name for name, (path, _) in names.items()})
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def _check_shapes(flat, config, names):
  D = config.width
  ends = {
    "embed/embedding": (config.vocab_size, D),
    "qkv/kernel": (D, 3 * D),
    "out/kernel": (D, D),
    "up/kernel": (D, 4 * D),
    "down/kernel": (4 * D, D),
    "qkv/bias": (3 * D,),
    "up/bias": (4 * D,),
    "_logit": (config.n_head,),
  }
  for path, value in flat.items():
    expected = next((s for end, s in ends.items() if path.endswith(end)), (D,))
    if path.startswith("position_"):
      expected = (config.context_tokens, D)
    if value.shape != expected:
      raise WeightsError(
        f"parameter {names[path]!r} came out as {value.shape} where "
        f"the model's settings ask for {expected}; choose the settings it was "
        "trained with"
      )


def load(path, config: ModelConfig):
  """The parameter tree out of a file.

  Args:
    path: a .safetensors that `save` wrote; or the published program's
      parameters, an .npz with one array per parameter, `param/NAME` or `NAME`,
      or a .pt checkpoint or state dict (needs PyTorch; read with
      weights_only=True).

  Raises:
    WeightsError: a file that is missing, damaged or of another kind, a model of
      other settings, and everything that `from_nanogpt` raises.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise WeightsError(
      f"init_from={path} is no file; give a .safetensors, an .npz or a .pt"
    )
  match path.suffix:
    case ".safetensors":
      return _read_safetensors(path, config)
    case ".npz":
      params = _read_npz(path)
    case ".pt":
      params = _read_torch(path)
    case _:
      raise WeightsError(
        f"init_from={path} is of no known kind; give .safetensors, .npz, .pt"
      )
  return from_nanogpt(params, config)


def save(path, params, config: ModelConfig, step: int):
  """Writes the parameters as safetensors, the model's settings in its metadata.

  Names are paths, as block_0/attention/qkv/kernel; the metadata has `config`, a
  JSON of `ModelConfig`, and `step`. A file that was there is replaced whole.
  """
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  content = safetensors.numpy.save(
    {name: np.ascontiguousarray(value) for name, value in flat.items()},
    metadata={
      "config": json.dumps(dataclasses.asdict(config)),
      "step": str(step),
    },
  )
  logbook.write_bytes(path, content)


def _read_safetensors(path, config):
  try:
    with safetensors.safe_open(path, "np") as file:
      saved = json.loads((file.metadata() or {})["config"])
      flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
    reason = str(error) or type(error).__name__
    raise WeightsError(
      f"init_from={path} cannot be read ({reason}); give a file that "
      "--mode=export wrote"
    ) from error
  changed = settings.changes(
    {"model": saved}, {"model": dataclasses.asdict(config)}
  )
  for name, (old, new) in changed.items():
    if settings.fixes_the_model(name):
      raise WeightsError(
        f"init_from={path} holds a model with {name}={old!r}, not {new!r}; set "
        f"--config.{name}={old}"
      )
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def _read_npz(path):
  try:
    with np.load(path, allow_pickle=False) as file:
      named = any(name.startswith("param/") for name in file.files)
      return {
        name.removeprefix("param/"): file[name]
        for name in file.files
        if name.startswith("param/") or not named
      }
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
    raise WeightsError(
      f"init_from={path} cannot be read ({error}); give a file that "
      "numpy.savez wrote"
    ) from error


def _read_torch(path):
  try:
    import torch
  except ImportError as error:
    raise WeightsError(
      f"init_from={path} needs PyTorch to be read; pip install torch, or save "
      "the parameters as .npz"
    ) from error
  try:
    state = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:  # torch raises its own kinds, of many modules
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise WeightsError(
      f"init_from={path} cannot be read ({reason}); give a checkpoint that "
      "holds only tensors and plain values"
    ) from error
  state = state.get("model", state) if isinstance(state, Mapping) else {}
  params = {
    name.removeprefix("_orig_mod."): value.float().numpy()
    for name, value in state.items()
    if isinstance(value, torch.Tensor)
  }
  if not params:
    raise WeightsError(f"init_from={path} holds no tensors; give a state dict")
  return params
