"""A run of an earlier version evaluates, samples and resumes as it did."""

import json
import shutil

import pytest

from tests.conftest import ROOT

OLDER = ROOT / "tests" / "golden" / "run_0_1"
# Sums in another order: float32 of logits near zero, of 12 steps.
TOLERANCE = 2e-5


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def run(tmp_path):
  return shutil.copytree(OLDER / "run", tmp_path / "run")


def test_evaluates_as_it_did(main, run, text):
  for expected in lines(OLDER / "then" / "evals.jsonl"):
    code, _, err = main(
      "--mode=eval",
      f"--workdir={run}",
      "--split=test",
      f"--protocol={expected['protocol']}",
      f"--config.data.path={text}",
      "--config.cpu_devices=1",
      "--config.model.implementation=reference",  # soon compiled
    )
    assert code == 0, err
    found = json.loads((run / "eval_test.json").read_text())
    for name in ("bits_per_char", "stderr"):
      assert found[name] == pytest.approx(expected[name], rel=TOLERANCE)
    for name in ("step", "bytes", "data"):
      assert found[name] == expected[name]
    for name in ("cache_bytes", "cache_reads"):  # some have other names today
      assert [*found[name].values()] == [*expected[name].values()]
    for name in ("dense", "open"):
      assert (
        found["attention_macs_per_token"][name]
        == expected["attention_macs_per_token"][name]
      )


def test_samples_as_it_did(main, run):
  code, _, err = main(
    "--mode=sample", f"--workdir={run}", "--prompt=span wave ", "--tokens=80"
  )
  assert code == 0, err
  expected = (OLDER / "then" / "sample.txt").read_text()
  assert (run / "sample.txt").read_text() == expected


def test_goes_on_as_it_did(main, run, text):
  config = json.loads((run / "config.json").read_text())
  flags = [
    f"--config.{name}={value}"
    for section, values in [("", config), ("model.", config["model"])]
    for name, value in (
      (section + name, value) for name, value in values.items()
    )
    if not isinstance(value, dict)
  ]
  code, _, err = main(
    f"--config={ROOT / 'configs' / 'base.py'}",
    f"--workdir={run}",
    *flags,
    "--config.optimizer.warmup_steps=4",
    f"--config.data.path={text}",
    "--config.steps=12",
    "--config.model.implementation=reference",  # soon compiled
  )
  assert code == 0, err
  expected = lines(OLDER / "then" / "metrics.jsonl")
  found = lines(run / "metrics.jsonl")
  assert [(x["step"], x["split"]) for x in found] == [
    (x["step"], x["split"]) for x in expected
  ]
  for x, y in zip(found, expected, strict=True):
    for name in ("loss", "bits_per_char"):
      assert x[name] == pytest.approx(y[name], rel=TOLERANCE), (x["step"], name)
