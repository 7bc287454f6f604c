"""Runs for the tests of several modes."""

import pytest

from adaptive_attention.modes import train
from adaptive_attention.training import settings
from configs import base
from data import text_file
from tests.conftest import TINY


@pytest.fixture(scope="module")
def run(text):
  """run(workdir, corpus, **settings): trains here, in this process."""

  def trained(workdir, corpus=None, **changes):
    config = base.get_config()
    config.update_from_flattened_dict(
      TINY | {"data.path": str(text), "sample_every_steps": 0} | changes
    )
    corpus = corpus or text_file.load(str(text))
    train.run(settings.check(config), workdir, corpus=corpus)

  return trained


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
  """A run that is never interrupted."""
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  run(workdir)
  return workdir


@pytest.fixture(scope="module")
def memory_flags(text, tmp_path_factory):
  """Returns flags of a run on streams of nine segments, one for each step.

  Spans move so fast that some heads use up the margin of their memory.
  """
  path = tmp_path_factory.mktemp("data") / "short.txt"
  path.write_bytes(text.read_bytes()[:1000])
  changes = {
    "data.path": path,
    "accumulation_steps": 2,
    "keep_checkpoints": 9,
    "model.n_layer": 1,
    "model.n_head": 4,
    "model.attention": "span",
    "model.memory_tokens": 80,
    "model.max_span": 96,
    "model.span_init": 0.1,
    "model.position": "rotary",
    "optimizer.mask_lr_multiplier": 200.0,
  }
  return [
    "--config=configs/base.py",
    *(f"--config.{name}={value}" for name, value in (TINY | changes).items()),
  ]


@pytest.fixture(scope="module")
def memory_run(main, memory_flags, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "memory"
  code, _, err = main(*memory_flags, f"--workdir={workdir}")
  assert code == 0, err
  return workdir
