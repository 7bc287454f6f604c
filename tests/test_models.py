"""The models that come with the project are as their cards say."""

import json
import re
import shutil

import numpy as np
import pytest

from adaptive_attention.model import Transformer
from adaptive_attention.training import (
  evaluator,
  exported,
  parallel,
  settings,
)
from tests.conftest import ROOT

TEXT = ROOT / "tests" / "golden" / "enwik8_part.txt"
FOLDERS = sorted(path.parent for path in ROOT.glob("models/*/*.safetensors"))
each = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)


def test_there_is_one():
  assert FOLDERS == [ROOT / "models" / "enwik8_small"]


@each
def test_it_is_small_and_reaches_its_figure(folder):
  assert (folder / exported.NAME).stat().st_size < 8e6
  with exported.opened(folder) as saved:
    params, meta = saved.restore_params(saved.resolve("latest"))
  config = settings.model_config(meta["config"]["model"])
  data = np.frombuffer(TEXT.read_bytes(), np.uint8)
  predict = evaluator.Evaluator(Transformer(config), 8)
  result = predict(parallel.replicate(params), data, "window")
  card = (folder / "README.md").read_text()
  figure, error = re.search(
    rf"{TEXT.name}\).*\| ([\d.]+) \+- ([\d.]+) \|", card
  ).groups()
  assert result.bits == pytest.approx(float(figure), abs=2e-4)
  assert result.stderr == pytest.approx(float(error), abs=2e-4)


@each
def test_it_says_nothing_of_the_machine_it_was_made_on(folder):
  with exported.opened(folder) as saved:
    meta = saved.read_meta(saved.resolve("latest"))
  values = settings.flatten(meta["config"]).values()
  assert not [x for x in values if isinstance(x, str) and x.startswith("/")]


@each
def test_it_is_evaluated(folder, main, tmp_path):
  shutil.copy(folder / exported.NAME, tmp_path)
  flags = f"--workdir={tmp_path}", "--config.model.implementation=reference"
  text = f"--config.data.path={TEXT}"
  code, out, err = main("--mode=eval", *flags, text, "--split=test")
  assert code == 0, err
  assert "other data: enwik8_part.txt" in out
  assert json.loads((tmp_path / "eval_test.json").read_text())["step"] == 1500
