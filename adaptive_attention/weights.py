"""Parameters in and out: of the published program, and as safetensors.

The published program is in PyTorch (a nanoGPT fork). Names and shapes are its
own: linear weights are (out, in), `wte` is also the output layer, `wpe` holds
the positions of the first block and `h.I.add_extra_pos_emb` those added before
block I >= 1.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Mapping

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from adaptive_attention.config import (
  ModelConfig,
  fixes_the_model,
  model_config,
)
from adaptive_attention.errors import Error
from adaptive_attention.model import Transformer


class WeightsError(Error, ValueError):
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


def _is_buffer(name, shape):
  """Tables over pairs of positions, which we compute from the distance."""
  return bool(
    re.fullmatch(r"transformer\.h\.\d+\.attn\.\w+", name)
    and len(shape) >= 2
    and shape[-1] == shape[-2]
  )


def from_nanogpt(params: Mapping, config: ModelConfig):
  """The parameter tree of `Transformer(config)`, float32, by PyTorch's names.

  Buffers are passed over, and so is `lm_head.weight`, which is
  `transformer.wte.weight` again.

  Args:
    params: name -> array, of numpy, jax or PyTorch and any floating-point kind.
    config: the model's.

  Raises:
    WeightsError: an unknown or missing name, a shape that does not fit, what is
      no floating-point number or not finite, or an output layer of its own.
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
    _array("lm_head.weight", output).astype(np.float32),
    tree["embed"]["embedding"],
  ):
    raise WeightsError(
      "lm_head.weight differs from transformer.wte.weight; expected an "
      "output layer tied to the embedding, as in the published program"
    )
  return tree


def _array(name, value) -> np.ndarray:
  """A floating-point array of what numpy, jax or PyTorch hold.

  Raises:
    WeightsError: it holds something else.
  """
  try:
    if hasattr(value, "detach"):  # numpy cannot read all kinds of PyTorch
      value = value.detach().cpu()
      if value.is_floating_point():
        value = value.float()
      value = value.numpy()
    value = np.asarray(value)
  except (TypeError, ValueError, RuntimeError) as error:
    raise WeightsError(
      f"parameter {name!r} cannot be read ({_first_line(error)}); expected an "
      "array of floating-point numbers"
    ) from error
  if not jnp.issubdtype(value.dtype, jnp.floating):
    raise _wrong_kind(name, value.dtype)
  return value


def _wrong_kind(name, dtype):
  return WeightsError(
    f"parameter {name!r} holds {dtype}; expected floating-point numbers; save "
    "it as float32"
  )


def _tree(found, names, config):
  """The model's parameter tree, float32, each leaf of its name and shape.

  Args:
    found: name -> array, as `_array` takes it.
    names: of each parameter, its name -> our path and whether it is transposed.
    config: the model's.

  Raises:
    WeightsError: naming the parameter that does not fit.
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
    value = _array(name, found[name])
    expected = shapes[path][::-1] if transpose else shapes[path]
    if value.shape != expected:
      transposed = " (transposed)" if value.shape == expected[::-1] else ""
      raise WeightsError(
        f"parameter {name!r} is {value.shape}{transposed} where the model's "
        f"settings ask for {expected}; choose the settings it was trained with"
      )
    with np.errstate(over="ignore"):  # of float64, told below
      value = np.array(value.T if transpose else value, np.float32, order="C")
    if not np.isfinite(value).all():
      raise WeightsError(
        f"parameter {name!r} has {np.sum(~np.isfinite(value)):,} numbers that "
        "are not finite in float32; give the parameters of an earlier step"
      )
    flat[path] = value
  return flax.traverse_util.unflatten_dict(flat, sep="/")


@functools.cache
def _shapes(config: ModelConfig) -> dict[str, tuple]:
  """Path -> shape of every parameter of the model."""
  model = Transformer(config)
  variables = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  )
  flat = flax.traverse_util.flatten_dict(variables["params"], sep="/")
  return {path: leaf.shape for path, leaf in flat.items()}


def load(path, config: ModelConfig):
  """The parameter tree out of a file, float32 whatever the file has.

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
  try:
    match path.suffix:
      case ".safetensors":
        return _of_safetensors(path, config)
      case ".npz":
        return from_nanogpt(_read_npz(path), config)
      case ".pt":
        return from_nanogpt(_read_torch(path), config)
  except WeightsError as error:
    raise WeightsError(f"init_from={path}: {error}") from error
  raise WeightsError(
    f"init_from={path} is of no known kind; give .safetensors, .npz, .pt"
  )


def save(path, params, config: ModelConfig, step: int):
  """Writes the parameters as safetensors, the model's settings in its metadata.

  Names are paths, as block_0/attention/qkv/kernel; the metadata has `config`, a
  JSON of `ModelConfig`, and `step`. A file that was there is replaced whole.

  Raises:
    OSError: it cannot be written; what was there stays.
  """
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  content = safetensors.numpy.save(
    {name: np.ascontiguousarray(value) for name, value in flat.items()},
    metadata={
      "config": json.dumps(dataclasses.asdict(config)),
      "step": str(step),
    },
  )
  path = pathlib.Path(path)
  part = path.with_name(path.name + ".part")
  try:
    part.write_bytes(content)
    part.replace(path)
  except OSError:
    with contextlib.suppress(OSError):
      part.unlink(missing_ok=True)
    raise


_KINDS = {  # of safetensors -> of numpy, those that hold parameters
  "F64": "float64",
  "F32": "float32",
  "F16": "float16",
  "BF16": "bfloat16",
  "F8_E4M3": "float8_e4m3fn",
  "F8_E5M2": "float8_e5m2",
  "F8_E4M3FNUZ": "float8_e4m3fnuz",
  "F8_E5M2FNUZ": "float8_e5m2fnuz",
}


def _of_safetensors(path, config):
  try:
    with safetensors.safe_open(path, "np") as file:
      saved = dict(json.loads((file.metadata() or {})["config"]))
    tensors = safetensors.deserialize(path.read_bytes())
  except Exception as error:  # of json, safetensors and what it is made of
    raise _unreadable(error, "that --mode=export wrote") from error
  _check_settings(saved, config)
  found = {}
  for name, tensor in tensors:
    if tensor["dtype"] not in _KINDS:
      raise _wrong_kind(name, tensor["dtype"])
    kind = np.dtype(_KINDS[tensor["dtype"]])
    found[name] = np.frombuffer(tensor["data"], kind).reshape(tensor["shape"])
  return _tree(found, {path: (path, False) for path in _shapes(config)}, config)


def _check_settings(saved, config):
  """That the file's model computes what the settings ask for.

  What its metadata lack is at the default, as in `config.model_config`.
  """
  try:
    theirs = dataclasses.asdict(model_config(saved))
  except (TypeError, ValueError) as error:
    raise WeightsError(f"its metadata are of no model here: {error}") from error
  for field, ours in dataclasses.asdict(config).items():
    name, value = f"model.{field}", theirs[field]
    if fixes_the_model(name) and value != ours:
      holds = "it holds a model with" if field in saved else "its metadata lack"
      default = "" if field in saved else ", which is the default"
      raise WeightsError(
        f"{holds} {name}={value!r}{default}, not {ours!r}; set "
        f"--config.{name}={value}"
      )


def _read_npz(path):
  try:
    with np.load(path, allow_pickle=False) as file:
      named = any(name.startswith("param/") for name in file.files)
      names = [n for n in file.files if n.startswith("param/") or not named]
      _check_once(names)
      return {
        name.removeprefix("param/"): _member(file, name) for name in names
      }
  except WeightsError:
    raise
  except Exception as error:  # of numpy, zipfile, zlib and others
    raise _unreadable(error, "that numpy.savez wrote") from error


def _member(file, name):
  try:
    return file[name]
  except Exception as error:
    raise WeightsError(
      f"parameter {name!r} cannot be read ({_first_line(error)}); give a whole "
      "file of plain arrays"
    ) from error


def _check_once(names):
  for name in names:
    if names.count(name) > 1:
      raise WeightsError(
        f"parameter {name!r} is there {names.count(name)} times; give a file "
        "that has each once"
      )


def _read_torch(path):
  try:
    import torch
  except ImportError as error:
    raise WeightsError(
      "PyTorch is needed to read it; pip install torch, or save the parameters "
      "as .npz"
    ) from error
  try:
    state = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:  # torch raises its own kinds, of many modules
    raise _unreadable(error, "of only tensors and plain values") from error
  state = state.get("model", state) if isinstance(state, Mapping) else {}
  tensors = [
    (str(name).removeprefix("_orig_mod."), value)
    for name, value in (state.items() if isinstance(state, Mapping) else ())
    if isinstance(value, torch.Tensor)
  ]
  if not tensors:
    raise WeightsError("it holds no tensors; give a state dict")
  _check_once([name for name, _ in tensors])
  return dict(tensors)


def _unreadable(error, expected):
  return WeightsError(
    f"it cannot be read ({_first_line(error)}); give a file {expected}"
  )


def _first_line(error):
  text = str(error).strip() or type(error).__name__
  return text.splitlines()[0][:200].rstrip(".")
