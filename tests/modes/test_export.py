"""An exported file can be loaded; a hardened model is evaluated."""

import json
import re
import shutil

import flax.traverse_util
import jax
import numpy as np
import pytest
import safetensors

from adaptive_attention import weight_files, weights
from adaptive_attention.config import ModelConfig
from adaptive_attention.mask_parameters import hardened, mask_params
from adaptive_attention.modes import export
from adaptive_attention.training import settings
from adaptive_attention.training.checkpoint import Checkpoints
from tests import drawn
from tests.modes.test_train import flags_with

SMALL = ModelConfig(n_layer=2, n_head=3, width=24, context_tokens=16)


def some_params(config=SMALL):
  return jax.device_get(drawn.parameters(config))


def test_a_model_that_is_trained_on_has_its_report(tiny, tmp_path, monkeypatch):
  """Where the settings ask for one, at the end of its training."""
  hardened, checked, calls = tmp_path / "hardened", settings.check(tiny), []
  for name, result in (("_tuned", checked), ("_harden", hardened)):
    monkeypatch.setattr(export, name, lambda *_, found=result: found)
  monkeypatch.setattr(export, "_write", lambda *_: None)
  monkeypatch.setattr(
    export.training, "train", lambda *_, **__: calls.append("train")
  )
  monkeypatch.setattr(export.whole, "write_of_ended_run", calls.append)
  for tiny.report in (False, True):
    export.run(checked, tmp_path, step=3, harden=True, finetune_steps=2)
  assert calls == ["train", "train", hardened]


def test_parameters_come_back_to_the_bit(tmp_path):
  params = some_params()
  path = tmp_path / "model.safetensors"
  weights.save(path, params, SMALL, 7)
  with safetensors.safe_open(path, "np") as file:
    assert file.metadata()["step"] == "7"
    assert json.loads(file.metadata()["config"])["width"] == 24
    assert "block_1/attention/qkv/kernel" in file.keys()  # noqa: SIM118
  back = weights.load(path, SMALL)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  for found, expected in zip(jax.tree.leaves(back), jax.tree.leaves(params)):
    assert found.tobytes() == expected.tobytes()
  assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_file_that_is_no_such_file_is_told(tmp_path):
  path = tmp_path / "model.safetensors"
  weights.save(path, some_params(), SMALL, 7)
  other = ModelConfig(n_layer=2, n_head=3, width=24, context_tokens=32)
  with pytest.raises(weights.WeightsError, match=r"context_tokens=16 \(not 32"):
    weights.load(path, other)
  # What does not change the function may differ.
  free = ModelConfig(
    n_layer=2, n_head=3, width=24, context_tokens=16, dropout=0.1
  )
  weights.load(path, free)
  whole = path.read_bytes()
  for damaged in (b"", whole[:100], b"\xff" * 200, whole[:-9]):
    path.write_bytes(damaged)
    with pytest.raises(weights.WeightsError, match="cannot be read") as error:
      weights.load(path, SMALL)
    assert "\n" not in str(error.value)


def test_hardened_masks_are_whole_and_the_rest_is_as_it_was():
  params = some_params()
  whole, config = hardened(params, SMALL)
  assert config.period == "integer"
  for before, after in zip(
    mask_params(params, SMALL), mask_params(whole, config)
  ):
    span_H = np.asarray(after.span)
    np.testing.assert_allclose(span_H, np.round(span_H), atol=1e-3)
    assert np.abs(before.span - span_H).max() <= 0.5 + 1e-3
    period_H = np.asarray(after.wave.period)
    np.testing.assert_allclose(period_H, np.round(period_H), atol=1e-4)
    assert np.abs(before.wave.period - period_H).max() <= 0.5 + 1e-4
    np.testing.assert_array_equal(before.wave.ratio, after.wave.ratio)
  for name in ("embed", "norm", "position_0"):
    jax.tree.map(np.testing.assert_array_equal, params[name], whole[name])
  again, _ = hardened(whole, config)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
    again,
    whole,
  )


@pytest.fixture(scope="module")
def trained(main, text, tmp_path_factory):
  from tests.conftest import TINY

  workdir = tmp_path_factory.mktemp("runs") / "trained"
  changes = TINY | {
    "data.path": text,
    "model.position": "rotary",
    "model.memory_tokens": 24,
    "model.vocab_size": 300,  # of which only bytes are written
    "sample_every_steps": 6,
  }
  flags = [f"--config.{name}={value}" for name, value in changes.items()]
  flags = ["--config=configs/base.py", *flags]
  code, out, err = main(*flags, f"--workdir={workdir}")
  assert code == 0, err
  return workdir, flags, out


def test_training_shows_what_it_writes(trained, text):
  _, _, out = trained
  prompt = text.read_bytes()[18_000:18_032].decode()
  samples = re.findall(r"^sample +(\d+) (.*)", out, re.MULTILINE)
  assert [step for step, _ in samples] == ["6", "12"]
  assert all(sample.startswith(prompt) for _, sample in samples)


def test_half_the_bytes(main, trained, tmp_path):
  """Each parameter is rounded to bfloat16."""
  workdir = shutil.copytree(trained[0], tmp_path / "w")
  code, _, err = main(
    "--mode=export", f"--workdir={workdir}", "--dtype=bfloat16"
  )
  assert code == 0, err
  arrays = weight_files.read_arrays(workdir / "model.safetensors")
  with Checkpoints(workdir) as saved:
    params, _ = saved.restore_params(12)
  for name, found in flax.traverse_util.flatten_dict(params, sep="/").items():
    np.testing.assert_array_equal(arrays[name], found.astype("bfloat16"))
    assert arrays[name].dtype == "bfloat16"


def test_the_mode(main, trained, tmp_path):
  workdir = shutil.copytree(trained[0], tmp_path / "w")
  code, out, err = main("--mode=export", f"--workdir={workdir}")
  assert code == 0, err
  assert "step 12 written to" in out
  # A new run starts from the file: at rate 0 it stays what it was.
  flags = flags_with(
    trained[1],
    init_from=workdir / "model.safetensors",
    steps=1,
    optimizer__learning_rate=0.0,
    optimizer__min_learning_rate=0.0,
  )
  code, _, err = main(*flags, f"--workdir={tmp_path / 'again'}")
  assert code == 0, err
  with Checkpoints(workdir) as saved, Checkpoints(tmp_path / "again") as again:
    jax.tree.map(
      np.testing.assert_array_equal,
      saved.restore_params(12)[0],
      again.restore_params(1)[0],
    )

  code, out, err = main(
    "--mode=export", f"--workdir={workdir}", "--harden", "--finetune_steps=3"
  )
  assert code == 0, err
  figures = re.search(
    r"as trained ([\d.]+), hardened ([\d.]+) \(([+-][\d.]+)\)", out
  )
  trained_bpc, hard_bpc, difference = map(float, figures.groups())
  np.testing.assert_allclose(hard_bpc - trained_bpc, difference, atol=2e-4)
  assert "the streams restart" in out
  hard = workdir / "hardened"
  with Checkpoints(hard) as saved:
    assert saved.steps()[-1] == 15
    first, meta = saved.restore_params(12)
    last, _ = saved.restore_params(15)
  assert meta["config"]["model"]["period"] == "integer"
  np.testing.assert_allclose(meta["bits"], hard_bpc, atol=1e-4)
  for name in ("span_logit", "period_logit", "ratio_logit"):
    np.testing.assert_array_equal(
      *(params["block_0"]["attention"][name] for params in (first, last))
    )
  assert not np.array_equal(
    first["embed"]["embedding"], last["embed"]["embedding"]
  )
  config = ModelConfig(**meta["config"]["model"])
  exported = weights.load(hard / "model.safetensors", config)
  jax.tree.map(np.testing.assert_array_equal, exported, last)
  # The run that it was made of is untouched, and it is a run as any other.
  with Checkpoints(workdir) as saved:
    assert saved.resolve("latest") == 12
  code, out, err = main("--mode=eval", f"--workdir={hard}", "--step=12")
  assert code == 0, err
  found = json.loads((hard / "eval_valid.json").read_text())
  np.testing.assert_allclose(found["bits_per_char"], hard_bpc, atol=1e-4)
  assert found["cache_reads"]["open"] <= found["cache_reads"]["reach"]

  # A request that cannot be met is refused before any work.
  for flags in (["--harden"], ["--harden", "--finetune_steps=3"]):
    code, out, err = main("--mode=export", f"--workdir={workdir}", *flags)
    assert code == 1
    assert f"{hard} holds one already; move that folder away" in err
    assert "as trained" not in out
  hard.rename(workdir / "away")
  other = tmp_path / "other.txt"
  other.write_bytes(b"another text " * 1000)
  code, out, err = main(
    "--mode=export",
    f"--workdir={workdir}",
    "--harden",
    "--finetune_steps=3",
    f"--config.data.path={other}",
  )
  assert code == 1
  assert "not on other.txt" in err
  assert not hard.exists()
  # Settings act when it is trained on; they also limit the evaluation.
  code, out, err = main(
    "--mode=export",
    f"--workdir={workdir}",
    "--harden",
    "--finetune_steps=1",
    "--config.optimizer.learning_rate=0.003",
    "--config.eval_tokens=300",
    "--config.cpu_devices=1",
  )
  assert code == 0, err
  assert "of 300 bytes: as trained" in out
  assert "optimizer.learning_rate=0.003 (was 0.001)" in out
  assert "over 299 bytes" in out

  for flags, said in (
    (["--finetune_steps=3"], "add --harden"),
    (["--harden"], "was not written"),
    (["--harden=1", "--prompt=a"], "means nothing to --mode=export"),
  ):
    code, _, err = main("--mode=export", f"--workdir={workdir}", *flags)
    assert code in (1, 2)
    assert said in err
    assert err.count("\n") == 1


def test_hardening_says_that_it_is_measured_on_other_data(
  main, trained, text, tmp_path
):
  workdir = shutil.copytree(trained[0], tmp_path / "w")
  other = tmp_path / "other.txt"
  other.write_bytes(text.read_bytes()[::-1])
  code, out, err = main(
    "--mode=export",
    f"--workdir={workdir}",
    "--harden",
    f"--config.data.path={other}",
  )
  assert code == 0, err
  assert "other data: other.txt" in out
  assert "step 12 was trained on text.txt" in out
