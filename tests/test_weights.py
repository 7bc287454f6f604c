"""Parameters of the published program are read by their published names."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_attention import weights
from adaptive_attention.config import ModelConfig
from adaptive_attention.model import Transformer
from adaptive_attention.weights import WeightsError

GOLDEN = pathlib.Path(__file__).parent / "golden"


SETTINGS = {
  "n_layer": 2,
  "n_head": 2,
  "n_embd": 8,
  "vocab_size": 11,
  "block_size": 6,
}


TOKENS = np.zeros((1, 6), np.int32)


def config(**changes):
  return weights.config_from_nanogpt({**SETTINGS, **changes})


def published(config: ModelConfig) -> dict[str, np.ndarray]:
  """Returns random parameters under the published names."""
  random = np.random.default_rng(0)
  D, V, T, H = (
    config.width,
    config.vocab_size,
    config.context_tokens,
    config.n_head,
  )
  shapes = {
    "transformer.wte.weight": (V, D),
    "transformer.wpe.weight": (T, D),
    "transformer.ln_f.weight": (D,),
  }
  if config.bias:
    shapes["transformer.ln_f.bias"] = (D,)
  for i in range(config.n_layer):
    h = f"transformer.h.{i}."
    if i:
      shapes[h + "add_extra_pos_emb.pos_emb.weight"] = (T, D)
    matrices = {
      "attn.c_attn": (3 * D, D),
      "attn.c_proj": (D, D),
      "mlp.c_fc": (4 * D, D),
      "mlp.c_proj": (D, 4 * D),
      "ln_1": (D,),
      "ln_2": (D,),
    }
    for name, shape in matrices.items():
      shapes[h + name + ".weight"] = shape
      if config.bias:
        shapes[h + name + ".bias"] = shape[:1]
    if config.attention != "dense":
      shapes[h + "attn.span_params"] = (H,)
    if config.attention == "span_wave":
      shapes[h + "attn.triangle_wave.period_weight"] = (H,)
      shapes[h + "attn.triangle_wave.ratio_weight"] = (H,)
  return {
    name: random.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
  }


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("wave", [False, True])
def test_every_kind_of_model_fits_ours(bias, wave):
  cfg = config(bias=bias, use_triangle_wave=wave)
  params = weights.from_nanogpt(published(cfg), cfg)
  init = jax.eval_shape(Transformer(cfg).init, jax.random.key(0), TOKENS)
  assert jax.tree.map(np.shape, params) == jax.tree.map(
    np.shape, init["params"]
  )


def test_the_settings():
  cfg = config(
    T=5,
    bias=True,
    softness=8,
    use_triangle_wave=True,
    period_min=3.0,
    period_max=9.0,
    span_reg=1e-5,
    harmonics=7,
    dropout=0.1,
  )
  assert cfg == ModelConfig(
    vocab_size=11,
    n_layer=2,
    n_head=2,
    width=8,
    context_tokens=6,
    attention="span_wave",
    max_span=6,
    ramp=8,
    span_coef=1e-5,
    period_min=3.0,
    period_max=9.0,
    harmonics=7,
    dropout=0.1,
    bias=True,
  )
  assert config().attention == "span"


def test_a_model_without_learned_positions_has_no_such_file():
  config = ModelConfig(position="rotary")
  with pytest.raises(WeightsError, match="position='rotary'"):
    weights.from_nanogpt({}, config)


def test_settings_that_are_unknown_or_missing():
  with pytest.raises(WeightsError, match="'n_haed' is unknown"):
    config(n_haed=3)
  with pytest.raises(WeightsError, match="'n_layer' is missing"):
    weights.config_from_nanogpt(
      {k: v for k, v in SETTINGS.items() if k != "n_layer"}
    )


def test_buffers_and_the_tied_output_layer_are_passed_over():
  cfg = config(use_triangle_wave=True)
  named = published(cfg)
  more = {
    "lm_head.weight": named["transformer.wte.weight"],
    "transformer.h.0.attn.bias": np.ones((1, 1, 6, 6), bool),
    "transformer.h.1.attn.base_relative_pos": np.ones((6, 6)),
  }
  np.testing.assert_equal(
    weights.from_nanogpt(named | more, cfg), weights.from_nanogpt(named, cfg)
  )


@pytest.mark.parametrize(
  ("name", "value", "match"),
  [
    ("transformer.h.2.ln_1.weight", np.ones(8), "h.2.ln_1.weight' is unknown"),
    ("transformer.h.0.attn.extra", np.ones(2), "attn.extra' is unknown"),
    ("config", np.array("{}"), "'config' is unknown"),
    (3, np.ones(2), "'3' is unknown"),
    ("transformer.h.0.ln_1.bias", np.ones(8), "ln_1.bias' is unknown"),
    (
      "transformer.h.0.attn.triangle_wave.period_weight",
      np.ones(2),
      "period_weight' is unknown",
    ),
    ("transformer.ln_f.weight", None, "'transformer.ln_f.weight' is missing"),
    ("transformer.h.1.attn.span_params", None, "span_params' is missing"),
    ("transformer.wpe.weight", np.ones((7, 8)), r"\(7, 8\).*\(6, 8\)"),
    ("transformer.h.0.attn.c_attn.weight", np.ones((8, 24)), "c_attn"),
    ("lm_head.weight", np.ones((11, 8)), "tied"),
  ],
)
def test_what_does_not_fit_is_named(name, value, match):
  named = published(config())
  if value is None:
    del named[name]
  else:
    named[name] = value
  with pytest.raises(WeightsError, match=match) as error:
    weights.from_nanogpt(named, config())
  assert "\n" not in str(error.value)


def test_arrays_of_jax_serve_too():
  named = {
    k: jnp.asarray(v, jnp.bfloat16) for k, v in published(config()).items()
  }
  params = weights.from_nanogpt(named, config())
  assert params["norm"]["scale"].dtype == np.float32
  np.testing.assert_array_equal(
    params["norm"]["scale"], np.asarray(named["transformer.ln_f.weight"])
  )
  assert isinstance(params["norm"]["scale"], np.ndarray)
