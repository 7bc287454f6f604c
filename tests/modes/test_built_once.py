"""A mode makes the objects of its settings once, and hands them down."""

import collections

import pytest

import main
from adaptive_attention.config import ModelConfig, OptimizerConfig


@pytest.fixture
def built(monkeypatch):
  """Returns how often each kind of settings was made."""
  counts = collections.Counter()
  for kind in (ModelConfig, OptimizerConfig):

    def counted(self, kind=kind, check=kind.__post_init__):
      counts[kind.__name__] += 1
      check(self)

    monkeypatch.setattr(kind, "__post_init__", counted)
  return counts


def test_settings_are_taken_apart_once(built, tiny_flags, tmp_path):
  """A checkpoint's settings are one set, those with the flags another."""
  workdir = f"--workdir={tmp_path / 'run'}"
  short = "--config.steps=3", "--config.sample_every_steps=0"
  assert main.main(["main.py", *tiny_flags, *short, workdir]) == 0
  assert built == {"ModelConfig": 1, "OptimizerConfig": 1}
  built.clear()
  # It goes on: the checkpoint's are compared with those that are given.
  short = "--config.steps=4", "--config.sample_every_steps=0"
  assert main.main(["main.py", *tiny_flags, *short, workdir]) == 0
  assert built == {"ModelConfig": 2, "OptimizerConfig": 1}
  built.clear()
  flags = "--mode=eval", workdir, "--config.cpu_devices=2"
  assert main.main(["main.py", *flags, "--config.eval_tokens=100"]) == 0
  assert built == {"ModelConfig": 2}
