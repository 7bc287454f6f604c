"""Reads and writes files of named arrays: .safetensors, .npz, PyTorch's .pt."""

import io
import json
import pathlib
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from adaptive_attention.atomic_write import atomic_write
from adaptive_attention.errors import Error, first_line


class WeightsError(Error, ValueError):
  """A file or a set of parameters that cannot be read."""


def float_array(name: str, value) -> np.ndarray:
  """Returns an array of NumPy, JAX or PyTorch as a floating-point NumPy array.

  Raises:
    WeightsError: it is no array, or holds other than floating-point numbers.
  """
  try:
    if hasattr(value, "detach"):  # numpy cannot read all dtypes of PyTorch
      value = value.detach().cpu()
      if value.is_floating_point():
        value = value.float()
      value = value.numpy()
    value = np.asarray(value)
  except (TypeError, ValueError, RuntimeError) as error:
    raise WeightsError(
      f"parameter {name!r} cannot be read ({first_line(error)}); expected an "
      "array of floating-point numbers"
    ) from error
  if not jnp.issubdtype(value.dtype, jnp.floating):
    raise _wrong_dtype(name, value.dtype)
  return value


def _wrong_dtype(name, dtype):
  return WeightsError(
    f"parameter {name!r} holds {dtype}; expected floating-point numbers; save "
    "it as float32"
  )


_DTYPES = {  # name in safetensors -> in NumPy, of floating-point numbers
  "F64": "float64",
  "F32": "float32",
  "F16": "float16",
  "BF16": "bfloat16",
  "F8_E4M3": "float8_e4m3fn",
  "F8_E5M2": "float8_e5m2",
  "F8_E4M3FNUZ": "float8_e4m3fnuz",
  "F8_E5M2FNUZ": "float8_e5m2fnuz",
}


def write_arrays(path, arrays: Mapping, metadata: dict[str, str]):
  """Replaces a .safetensors as a whole.

  Raises:
    OSError: the file cannot be written; the old content stays.
  """
  content = safetensors.numpy.save(
    {name: np.ascontiguousarray(value) for name, value in arrays.items()},
    metadata=metadata,
  )
  atomic_write(path, content)


def read_safetensors(path: pathlib.Path) -> tuple[dict, dict]:
  """Returns ({name: array}, the settings in the metadata) of a .safetensors.

  Raises:
    WeightsError: the file is damaged, has no settings, or holds an array of
      other than floating-point numbers.
  """
  try:
    config = dict(json.loads(read_metadata(path)["config"]))
  except (KeyError, TypeError, ValueError) as error:
    raise _unreadable(error, "that --mode=export wrote") from error
  return read_arrays(path), config


def read_metadata(path: pathlib.Path) -> dict[str, str]:
  """Returns the texts of a .safetensors by name, without reading its arrays.

  Raises:
    WeightsError: the file is damaged.
  """
  try:
    with safetensors.safe_open(path, "np") as file:
      return file.metadata() or {}
  except Exception as error:  # errors of the system, safetensors and others
    raise _unreadable(error, "of whole arrays") from error


def read_arrays(path: pathlib.Path) -> dict:
  """Returns {name: array} of any .safetensors.

  Raises:
    WeightsError: the file is damaged, or holds an array of other than
      floating-point numbers.
  """
  try:
    tensors = safetensors.deserialize(path.read_bytes())
  except Exception as error:
    raise _unreadable(error, "of whole arrays") from error
  arrays = {}
  for name, tensor in tensors:
    if tensor["dtype"] not in _DTYPES:
      raise _wrong_dtype(name, tensor["dtype"])
    dtype = np.dtype(_DTYPES[tensor["dtype"]])
    arrays[name] = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
  return arrays


_MOST_HEADER_BYTES = 1 << 14  # of an array's shape and type
_MOST_ITEM_BYTES = 64  # no number has more


def read_npz(path, shapes: Mapping[str, tuple]) -> dict:
  """Returns {name: array} of an .npz.

  If there are names under param/, these alone are returned, without it. What
  has another shape than is expected, or is no array of floats, is not unpacked,
  however much it would take: one zero stands for all of it.

  Args:
    shapes: the expected shape of each name that is to be unpacked.

  Raises:
    WeightsError: the file is damaged or has a name twice.
  """
  try:
    with np.load(path, allow_pickle=False) as file:
      prefixed = any(name.startswith("param/") for name in file.files)
      names = [n for n in file.files if n.startswith("param/") or not prefixed]
      _check_unique(names)
      short = {name: name.removeprefix("param/") for name in names}
      return {
        short[name]: _npz_member(file, name, shapes.get(short[name]))
        for name in names
      }
  except WeightsError:
    raise
  except Exception as error:  # errors of numpy, zipfile, zlib and others
    raise _unreadable(error, "that numpy.savez wrote") from error


def _npz_member(file, name, expected):
  try:
    shape, dtype = _npz_header(file, name)
    if shape == expected and np.issubdtype(dtype, np.floating):
      return file[name]
    return np.broadcast_to(np.zeros((), dtype), shape)
  except Exception as error:
    raise WeightsError(
      f"parameter {name!r} cannot be read ({first_line(error)}); give a whole "
      "file of plain arrays"
    ) from error


def _npz_header(file, name):
  """Returns the shape and the type of an array, which is not read."""
  with file.zip.open(f"{name}.npy") as member:
    start = io.BytesIO(member.read(_MOST_HEADER_BYTES))
  match np.lib.format.read_magic(start):
    case (1, 0):
      shape, _, dtype = np.lib.format.read_array_header_1_0(start)
    case (2, 0):
      shape, _, dtype = np.lib.format.read_array_header_2_0(start)
    case version:  # others are of records
      raise ValueError(f"version {version}")
  if dtype.itemsize > _MOST_ITEM_BYTES:
    raise ValueError(f"items of {dtype.itemsize:,} bytes")
  return shape, dtype


def read_torch(path) -> dict:
  """Returns {name: tensor} of a checkpoint or a state dict of PyTorch.

  Raises:
    WeightsError: PyTorch is not installed, or the file is damaged, holds no
      tensors or has a name twice.
  """
  try:
    import torch
  except ImportError as error:
    raise WeightsError(
      "PyTorch is needed to read it; pip install torch, or save the parameters "
      "as .npz"
    ) from error
  try:
    state = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:  # torch raises errors of many modules
    raise _unreadable(error, "of only tensors and plain values") from error
  state = state.get("model", state) if isinstance(state, Mapping) else {}
  tensors = [
    (str(name).removeprefix("_orig_mod."), value)
    for name, value in (state.items() if isinstance(state, Mapping) else ())
    if isinstance(value, torch.Tensor)
  ]
  if not tensors:
    raise WeightsError("it holds no tensors; give a state dict")
  _check_unique([name for name, _ in tensors])
  return dict(tensors)


def _check_unique(names):
  for name in names:
    if names.count(name) > 1:
      raise WeightsError(
        f"parameter {name!r} is there {names.count(name)} times; give a file "
        "that has each once"
      )


def _unreadable(error, expected):
  return WeightsError(
    f"it cannot be read ({first_line(error)}); give a file {expected}"
  )
