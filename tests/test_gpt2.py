"""A GPT-2 in the layout of the Hugging Face libraries comes in and goes out."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from adaptive_attention import gpt2, weights
from adaptive_attention.config import ModelConfig
from adaptive_attention.mask_parameters import mask_params
from adaptive_attention.model import Transformer
from adaptive_attention.weights import WeightsError
from tests import drawn

SETTINGS = {
  "model_type": "gpt2",
  "n_layer": 2,
  "n_head": 2,
  "n_embd": 16,
  "n_positions": 24,
  "vocab_size": 300,
}
CONFIG = gpt2.config_from_gpt2(SETTINGS)
TEXT = np.random.default_rng(0).integers(0, 300, (2, 24))


def logits_of(params, config):
  return Transformer(config).apply({"params": params}, TEXT)


@pytest.fixture(scope="module")
def params():
  return drawn.parameters(CONFIG, scale=0.15)


@pytest.fixture
def folder(tmp_path, params):
  gpt2.write(tmp_path / "gpt2", params, CONFIG)
  return tmp_path / "gpt2"


def test_its_settings():
  assert CONFIG == ModelConfig(
    vocab_size=300,
    n_layer=2,
    n_head=2,
    width=16,
    context_tokens=24,
    attention="dense",
    position="learned_once",
    bias=True,
    gelu="tanh",
  )
  exact = gpt2.config_from_gpt2(SETTINGS | {"activation_function": "gelu"})
  assert exact.gelu == "erf"


@pytest.mark.parametrize(
  ("name", "value", "told"),
  [
    ("model_type", "llama", "model_type='llama'"),
    ("layer_norm_epsilon", 1e-6, "layer_norm_epsilon=1e-06"),
    ("scale_attn_by_inverse_layer_idx", True, "inverse_layer_idx=True"),
    ("tie_word_embeddings", False, "tie_word_embeddings=False"),
    ("n_inner", 100, "n_inner=100"),
    ("activation_function", "relu", "activation_function='relu'"),
    ("n_embd", None, "'n_embd' is missing"),
  ],
)
def test_settings_that_are_not_served_are_named(name, value, told):
  theirs = SETTINGS | {name: value}
  if value is None:
    del theirs[name]
  with pytest.raises(WeightsError, match=told):
    gpt2.config_from_gpt2(theirs)


def test_it_comes_back_as_it_was_written(folder, params):
  found, config = gpt2.read(folder)
  assert config == CONFIG
  jax.tree.map(np.testing.assert_array_equal, found, params)


def test_names_without_the_prefix_and_other_arrays(folder, params):
  path = folder / "model.safetensors"
  arrays = safetensors.numpy.load_file(path)
  bare = {name.removeprefix("transformer."): x for name, x in arrays.items()}
  bare["h.0.attn.bias"] = np.ones((1, 1, 24, 24), np.float32)
  bare["lm_head.weight"] = bare["wte.weight"]
  found = gpt2.from_gpt2(bare, CONFIG)
  jax.tree.map(np.testing.assert_array_equal, found, params)
  for change, told in (
    ({"lm_head.weight": 2 * bare["wte.weight"]}, "lm_head.weight differs"),
    ({"h.7.ln_1.bias": bare["ln_f.bias"]}, "h.7.ln_1.bias' is unknown"),
    ({"ln_f.bias": bare["ln_f.bias"][:3]}, r"ln_f.bias' is \(3,\)"),
  ):
    with pytest.raises(WeightsError, match=told):
      gpt2.from_gpt2(bare | change, CONFIG)


@pytest.mark.parametrize("attention", ["span", "span_wave"])
def test_it_becomes_a_model_with_masks_and_goes_back(
  folder, params, tmp_path, attention
):
  config = dataclasses.replace(
    CONFIG, attention=attention, ramp=4.0, ratio_max=0.5, max_span=48
  )
  adapted = weights.load(folder, config)
  np.testing.assert_array_equal(
    logits_of(adapted, config), logits_of(params, CONFIG)
  )
  gpt2.write(tmp_path / "back", adapted, config)
  found, _ = gpt2.read(tmp_path / "back")
  jax.tree.map(np.testing.assert_array_equal, found, params)
  learned = json.loads((tmp_path / "back" / "spans.json").read_text())
  assert learned["attention"] == attention
  for layer, mask in zip(
    learned["layers"], mask_params(adapted, config), strict=True
  ):
    np.testing.assert_array_equal(layer["span"], mask.span)
    assert ("period" in layer) == (attention == "span_wave")


def test_it_is_written_in_half_the_bytes(tmp_path):
  params = drawn.parameters(CONFIG)
  half = jax.tree.map(lambda x: np.asarray(x, "bfloat16"), params)
  gpt2.write(tmp_path / "half", half, CONFIG)
  settings = json.loads((tmp_path / "half" / "config.json").read_text())
  assert settings["torch_dtype"] == "bfloat16"
  found, config = gpt2.read(tmp_path / "half")
  assert config == CONFIG
  jax.tree.map(np.testing.assert_array_equal, found, half)


def test_what_differs_is_said_at_once(folder):
  with pytest.raises(WeightsError) as error:
    weights.load(folder, dataclasses.replace(ModelConfig(), attention="span"))
  message = str(error.value)
  assert "--config.model.n_layer=2 --config.model.n_head=2" in message
  assert "--config.model.gelu=tanh" in message
  assert "\n" not in message


def test_files_that_are_missing_or_damaged(folder):
  config = dataclasses.replace(CONFIG, attention="span")
  (folder / "model.safetensors").write_bytes(b"no")
  with pytest.raises(WeightsError, match="cannot be read"):
    weights.load(folder, config)
  (folder / "model.safetensors").unlink()
  with pytest.raises(WeightsError, match=r"model\.safetensors does not exist"):
    weights.load(folder, config)
  (folder / "config.json").write_text("[]")
  with pytest.raises(WeightsError, match=r"config\.json describes no GPT-2"):
    weights.load(folder, config)


@pytest.mark.parametrize(
  "changes", [{"position": "learned"}, {"bias": False}, {"n_kv_head": 1}]
)
def test_a_model_with_other_parts_has_no_such_file(tmp_path, params, changes):
  config = dataclasses.replace(CONFIG, **changes)
  with pytest.raises(WeightsError, match="has no place in a GPT-2"):
    gpt2.write(tmp_path / "gpt2", params, config)
  assert not (tmp_path / "gpt2").exists()


@pytest.mark.every_case
@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_its_logits_are_those_of_transformers(tmp_path, activation):
  """In both directions: their file read here, and ours read there."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  theirs = transformers.GPT2LMHeadModel(
    transformers.GPT2Config(
      **{n: x for n, x in SETTINGS.items() if n != "model_type"},
      activation_function=activation,
    )
  ).eval()
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
    expected = theirs(torch.tensor(TEXT)).logits.numpy()
  theirs.save_pretrained(tmp_path / "theirs")
  found, config = gpt2.read(tmp_path / "theirs")
  np.testing.assert_allclose(logits_of(found, config), expected, atol=1e-4)

  spans = dataclasses.replace(config, attention="span", max_span=48)
  adapted = weights.load(tmp_path / "theirs", spans)
  np.testing.assert_allclose(logits_of(adapted, spans), expected, atol=1e-4)
  gpt2.write(tmp_path / "ours", adapted, spans)
  again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
  with torch.no_grad():
    back = again(torch.tensor(TEXT)).logits.numpy()
  np.testing.assert_allclose(back, expected, atol=1e-5)
