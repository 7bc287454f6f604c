"""An exported model is read as the run that it was exported of."""

import json

import jax
import numpy as np
import pytest

from adaptive_attention import weights
from adaptive_attention.modes import export
from adaptive_attention.training import exported, resume, settings
from adaptive_attention.training.checkpoint import CheckpointError, Checkpoints
from configs import base
from tests import drawn


@pytest.fixture
def saved(tmp_path):
  """A checkpoint of a small model: (workdir, parameters, its meta)."""
  config = base.get_config()
  config.data.path = str(tmp_path / "book.txt")
  config.init_from = "runs/other"
  config.model.update({"n_layer": 1, "n_head": 2, "width": 16})
  saved = json.loads(config.to_json())
  params = jax.device_get(drawn.parameters(settings.model_config(config.model)))
  meta = {"config": saved, "data": {"name": "book.txt", "sha256": "12"}}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(7, params, {"count": np.zeros(1)}, meta, bits=2.5)
    checkpoints.finish()
    meta = checkpoints.read_meta(7)
  return tmp_path, params, meta


def test_a_run_comes_back(saved, tmp_path):
  _, params, meta = saved
  folder = tmp_path / "alone"
  folder.mkdir()
  exported.save(folder / exported.NAME, params, meta)
  with exported.opened(folder) as found:
    assert [found.resolve(w) for w in ("latest", "best", "7")] == [7] * 3
    back, told = found.restore_params(7)
    assert found.read_meta(7) == told
  jax.tree.map(np.testing.assert_array_equal, back, params)
  assert told["step"] == 7 and told["bits"] == 2.5
  assert told["data"] == meta["data"]
  # Settings are the run's, but for the folders of its machine.
  assert told["config"]["data"]["path"] == "book.txt"
  assert told["config"]["init_from"] == "runs/other"
  told["config"]["data"]["path"] = meta["config"]["data"]["path"]
  assert told["config"] == meta["config"]


def test_a_run_starts_from_its_folder(saved, tmp_path):
  _, params, meta = saved
  folder = tmp_path / "alone"
  folder.mkdir()
  exported.save(folder / exported.NAME, params, meta)
  model = settings.model_config(meta["config"]["model"])
  jax.tree.map(
    np.testing.assert_array_equal, resume._given(str(folder), model), params
  )


def test_checkpoints_come_first(saved):
  workdir, params, meta = saved
  exported.save(workdir / exported.NAME, params, meta)
  assert isinstance(exported.opened(workdir), Checkpoints)
  for name in ("checkpoints", exported.NAME):
    (workdir / name).rename(workdir / f"no {name}")
  assert isinstance(exported.opened(workdir), Checkpoints)


def test_it_is_not_hardened(saved, tmp_path):
  """That takes the optimizer's state; nothing is written."""
  folder = tmp_path / "alone"
  folder.mkdir()
  exported.save(folder / exported.NAME, *saved[1:])
  with pytest.raises(CheckpointError, match="optimizer's state"):
    export.run(None, folder, step=7, harden=True)
  assert [path.name for path in folder.iterdir()] == [exported.NAME]


def test_a_gpt2_is_not_taken_for_one(saved, tmp_path):
  folder = tmp_path / "gpt2"
  folder.mkdir()
  exported.save(folder / exported.NAME, *saved[1:])
  assert exported.is_alone(folder)
  (folder / "config.json").write_text("{}")
  assert not exported.is_alone(folder)


def broken(path, params, meta):
  """Yields what is wrong with a file, and what the error says."""
  exported.save(path, params, meta)
  whole = path.read_bytes()
  yield "--step=8 names no checkpoint"
  for content in (b"", whole[:9], whole[:200]):
    path.write_bytes(content)
    yield "cannot be read"
  config = settings.model_config(meta["config"]["model"])
  weights.save(path, params, config, 7)
  yield "'run' is missing"
  weights.save(path, params, config, 7, run="{}")
  yield "'config' is missing"
  weights.save(path, params, config, 7, run='{"config": {}}')
  yield "'model' is missing"
  weights.save(path, params, config, 7, run='{"config": 1}')
  yield "not subscriptable"
  weights.save(path, params, config, 7, run="[")
  yield "Expecting value"
  weights.save(path, {"norm": params["norm"]}, config, 7, run=meta_text(meta))
  yield "parameter"


def meta_text(meta):
  return json.dumps({name: meta[name] for name in ("config", "data", "bits")})


def test_what_is_wrong_is_told_in_one_sentence(saved, tmp_path):
  folder = tmp_path / "alone"
  folder.mkdir()
  for i, said in enumerate(broken(folder / exported.NAME, *saved[1:])):
    with (
      exported.opened(folder) as found,
      pytest.raises(CheckpointError, match=said) as error,
    ):
      found.restore_params(7 if i else 8)
    assert "\n" not in str(error.value)
    assert exported.NAME in str(error.value)
