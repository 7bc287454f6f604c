"""Files of parameters are read in each format, and faults in them are named."""

import dataclasses
import itertools
import json
import sys
import types
import warnings
import zipfile

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from adaptive_attention import weights
from adaptive_attention.config import ModelConfig
from adaptive_attention.model import Transformer
from adaptive_attention.weights import WeightsError
from tests.test_weights import GOLDEN, TOKENS, config, published


@pytest.mark.parametrize("prefix", ["", "param/"])
def test_files_of_numpy(tmp_path, prefix):
  cfg = config()
  named = published(cfg)
  path = tmp_path / "them.npz"
  extra = {"model/logits": np.zeros(3)} if prefix else {}
  np.savez(path, **{prefix + k: v for k, v in named.items()}, **extra)
  np.testing.assert_equal(
    weights.load(path, cfg), weights.from_nanogpt(named, cfg)
  )


def test_files_that_cannot_be_read(tmp_path):
  (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 no archive")
  (tmp_path / "pickled.npz").write_bytes(b"\x80\x04.")
  (tmp_path / "other.bin").write_bytes(b"")
  for name, told in (
    ("bad.npz", "cannot be read"),
    ("pickled.npz", "cannot be read"),
    ("other.bin", "has an unknown suffix"),
    ("none.npz", "does not exist"),
  ):
    with pytest.raises(WeightsError, match=f"{name}:? (it )?{told}") as error:
      weights.load(tmp_path / name, config())
    assert "\n" not in str(error.value)


def test_files_of_torch(tmp_path):
  torch = pytest.importorskip("torch")
  cfg = config()
  named = published(cfg)
  state = {f"_orig_mod.{k}": torch.tensor(v) for k, v in named.items()}
  path = tmp_path / "ckpt.pt"
  torch.save({"model": state, "iter_num": 3}, path)
  np.testing.assert_equal(
    weights.load(path, cfg), weights.from_nanogpt(named, cfg)
  )
  torch.save({"model": ModelConfig}, path)
  with pytest.raises(WeightsError, match="cannot be read"):
    weights.load(path, cfg)


def test_golden_files_serve_as_they_are():
  with np.load(GOLDEN / "periodic.npz") as file:
    cfg = weights.config_from_nanogpt(json.loads(str(file["config"])))
  params = weights.load(GOLDEN / "periodic.npz", cfg)
  assert params["embed"]["embedding"].shape == (50, 32)


def drawn(cfg):
  """Returns random parameters as our tree."""
  random = np.random.default_rng(0)
  init = jax.eval_shape(Transformer(cfg).init, jax.random.key(0), TOKENS)
  return jax.tree.map(
    lambda leaf: random.normal(size=leaf.shape).astype(np.float32),
    init["params"],
  )


@pytest.mark.parametrize("attention", ["dense", "span", "span_wave"])
@pytest.mark.parametrize("position", ["learned", "rotary", "relative"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_kind_of_model_comes_back_from_safetensors(
  tmp_path, attention, position, bias
):
  cfg = dataclasses.replace(
    config(), attention=attention, position=position, bias=bias
  )
  path, params = tmp_path / "m.safetensors", drawn(cfg)
  weights.save(path, params, cfg, 1)
  np.testing.assert_equal(weights.load(path, cfg), params)


class Tensor:
  """A test double of PyTorch's tensor: what is used of it, just as strict."""

  def __init__(self, value):
    self.value = value

  def detach(self):
    return self

  def cpu(self):
    return self

  def is_floating_point(self):
    return bool(jnp.issubdtype(self.value.dtype, jnp.floating))

  def float(self):
    with np.errstate(over="ignore"):
      return Tensor(self.value.astype(np.float32))

  def numpy(self):
    if self.value.dtype.kind not in "fiubc":
      raise TypeError(f"Got unsupported ScalarType {self.value.dtype}")
    return self.value


class File:
  """Parameters that tests spoil, and a file of one kind that holds them."""

  def __init__(self, kind, folder, monkeypatch):
    self.kind, self.path = kind, folder / f"them.{kind}"
    self.cfg = config()
    self.params = published(self.cfg)
    self.matrix, self.vector = (
      "transformer.wpe.weight",
      "transformer.ln_f.weight",
    )
    self.kernel = "transformer.h.1.attn.c_attn.weight"
    if kind == "safetensors":
      self.params = flax.traverse_util.flatten_dict(drawn(self.cfg), sep="/")
      self.matrix, self.vector = "position_0", "norm/scale"
      self.kernel = "block_1/attention/qkv/kernel"
    self.metadata = {"config": json.dumps(dataclasses.asdict(self.cfg))}
    if kind == "pt":
      torch = types.ModuleType("torch")
      torch.Tensor = Tensor
      torch.load = lambda *_, **__: {"model": self.state, "step": 3}
      monkeypatch.setitem(sys.modules, "torch", torch)

  def load(self):
    match self.kind:
      case "npz":
        np.savez(self.path, **self.params)
      case "pt":
        self.path.write_bytes(b"read by the double")
        self.state = {k: Tensor(v) for k, v in self.params.items()}
      case "safetensors":
        safetensors.numpy.save_file(self.params, self.path, self.metadata)
    return weights.load(self.path, self.cfg)

  def refused(self, *parts):
    """Checks that loading fails in one sentence with path and these parts."""
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      with pytest.raises(WeightsError) as error:
        self.load()
    message = str(error.value)
    for part in (str(self.path), *parts):
      assert part in message
    assert "\n" not in message


KINDS = ("npz", "pt", "safetensors")


@pytest.fixture(params=KINDS)
def file(request, tmp_path, monkeypatch):
  return File(request.param, tmp_path, monkeypatch)


FLOATS = ["float16", "float32", "float64"]


SMALL_FLOATS = ["bfloat16", "float8_e4m3fn", "float8_e5m2"]  # not NumPy's own


@pytest.mark.parametrize(
  ("kind", "dtype"),
  [
    *itertools.product(KINDS, [*FLOATS, ">f4"]),
    # NumPy writes these without their names, so .npz is refused, see below.
    *itertools.product(["pt", "safetensors"], SMALL_FLOATS),
  ],
)
def test_parameters_are_float32_whatever_the_file_has(
  tmp_path, monkeypatch, kind, dtype
):
  file = File(kind, tmp_path, monkeypatch)
  expected = file.load()
  file.params = {k: v.astype(dtype) for k, v in file.params.items()}
  found = file.load()
  assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype("f4")}
  np.testing.assert_equal(
    found, jax.tree.map(lambda x: x.astype(dtype).astype("f4"), expected)
  )


@pytest.mark.parametrize(
  ("kind", "dtype"),
  [
    *itertools.product(KINDS, ["int8", "int32", "uint64", "bool", "complex64"]),
    *itertools.product(["npz"], [*SMALL_FLOATS, "S4", object]),
  ],
)
def test_what_is_no_floating_point_number_is_named(
  tmp_path, monkeypatch, kind, dtype
):
  file = File(kind, tmp_path, monkeypatch)
  file.params[file.vector] = file.params[file.vector].astype(dtype)
  file.refused(file.vector)


@pytest.mark.parametrize(
  ("spoil", "told"),
  [
    (lambda x: x[:-1], "(7,) where"),
    (lambda x: x[None], "(1, 8) where"),
    (lambda x: np.where(x == x[3], np.nan, x), "1 numbers that are not finite"),
    (lambda x: x / np.float32(0), "8 numbers that are not finite"),
    (lambda x: x * np.float64(1e300), "8 numbers that are not finite"),
  ],
)
def test_a_vector_that_does_not_fit_is_named(file, spoil, told):
  with np.errstate(divide="ignore"):
    file.params[file.vector] = spoil(file.params[file.vector])
  file.refused(repr(file.vector), told)


def test_a_matrix_that_is_transposed_is_said_to_be(file):
  for name in (file.matrix, file.kernel):
    value = file.params[name]
    file.params[name] = np.ascontiguousarray(value.T)
    file.refused(
      repr(name), f"is {value.T.shape} (transposed)", f"ask for {value.shape}"
    )
    file.params[name] = value


def test_parameters_too_few_or_too_many_are_named(file):
  file.params["more"] = np.zeros(2, np.float32)
  file.refused("'more' is unknown")
  del file.params["more"], file.params[file.vector]
  file.refused(f"{file.vector!r} is missing")


@pytest.mark.parametrize(
  ("spoil", "told"),
  [
    (
      lambda c: c.pop("width"),
      "the default of what they lack",
    ),
    (lambda c: c.update(depth=3), "model.depth=3 is unknown"),
    (lambda c: c.update(ramp=3.0), "--config.model.ramp=3.0"),
    (lambda c: c.clear(), "model.vocab_size=256 (not"),
  ],
)
def test_settings_of_another_model_are_named(
  tmp_path, monkeypatch, spoil, told
):
  file = File("safetensors", tmp_path, monkeypatch)
  settings = dataclasses.asdict(file.cfg)
  spoil(settings)
  file.metadata["config"] = json.dumps(settings)
  file.refused(told)


def test_settings_that_leave_the_function_as_it_is_may_differ(
  tmp_path, monkeypatch
):
  file = File("safetensors", tmp_path, monkeypatch)
  settings = dataclasses.asdict(file.cfg) | {"dropout": 0.5}
  del settings["remat"]
  file.metadata["config"] = json.dumps(settings)
  file.load()


@pytest.mark.parametrize(
  "metadata", [None, {"step": "1"}, {"config": "{"}, {"config": "3"}]
)
def test_metadata_without_settings(tmp_path, monkeypatch, metadata):
  file = File("safetensors", tmp_path, monkeypatch)
  file.metadata = metadata
  file.refused("cannot be read", "--mode=export")


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize(
  "damage",
  [
    lambda content: b"",
    lambda content: content[:-100],
    lambda content: content[:100],
    lambda content: content[:8] + b"\xff" * 60 + content[68:],
    lambda content: b"\x93NUMPY" + content,
  ],
)
def test_damaged_files(tmp_path, monkeypatch, kind, damage):
  file = File(kind, tmp_path, monkeypatch)
  file.load()
  file.path.write_bytes(damage(file.path.read_bytes()))
  with pytest.raises(WeightsError, match="cannot be read") as error:
    weights.load(file.path, file.cfg)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_not_a_file(tmp_path, kind):
  (tmp_path / f"them.{kind}").mkdir()
  with pytest.raises(WeightsError, match="is not a file"):
    weights.load(tmp_path / f"them.{kind}", config())


@pytest.mark.parametrize("state", [3, {}, {"model": 3}, {"model": {"a": 1}}])
def test_checkpoints_of_torch_without_tensors(tmp_path, monkeypatch, state):
  file = File("pt", tmp_path, monkeypatch)
  monkeypatch.setattr(sys.modules["torch"], "load", lambda *_, **__: state)
  file.refused("holds no tensors")


def test_a_parameter_that_is_there_twice_is_named(tmp_path, monkeypatch):
  file = File("npz", tmp_path, monkeypatch)
  file.load()
  with zipfile.ZipFile(file.path, "a") as archive, warnings.catch_warnings():
    warnings.simplefilter("ignore")
    archive.writestr(f"{file.vector}.npy", archive.read(f"{file.vector}.npy"))
  with pytest.raises(WeightsError, match=f"'{file.vector}' is there 2 times"):
    weights.load(file.path, file.cfg)
  file = File("pt", tmp_path, monkeypatch)
  file.params[f"_orig_mod.{file.vector}"] = file.params[file.vector]
  file.refused(f"{file.vector!r} is there 2 times")
