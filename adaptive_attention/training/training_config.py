"""The settings of a training run, taken apart, and its schedule."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from adaptive_attention.config import ModelConfig, OptimizerConfig


class Due(NamedTuple):
  """What follows a step, in this order."""

  record: bool
  save: bool
  evaluate: bool
  sample: bool


@dataclasses.dataclass(frozen=True)
class Every:
  """The schedule of a run: after which steps something follows.

  Attributes:
    last: the run's last step, which is recorded, saved and evaluated.
    record, save, evaluate, sample: the period of each, in steps; `sample` may
      be 0, for never.
  """

  last: int
  record: int
  save: int
  evaluate: int
  sample: int

  def evaluates(self, step: int) -> bool:
    return step == self.last or step % self.evaluate == 0

  def due(self, step: int) -> Due:
    """Returns what follows `step`.

    A save precedes what may take long, so that nothing is lost if that fails.
    """
    evaluates = self.evaluates(step)
    samples = bool(self.sample) and step % self.sample == 0
    return Due(
      record=step % self.record == 0 or step == self.last,
      save=step % self.save == 0 or evaluates or samples,
      evaluate=evaluates,
      sample=samples,
    )


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """The settings of a training run, taken apart.

  Attributes:
    model, optimizer: the settings of these.
    steps: the number of steps.
    every: after which of them something follows.
    seed: the number that parameters, batches and dropout follow from.
    batch_size: sequences per step, over all devices and parts.
    accumulation_steps: into how many parts each device's sequences are cut.
    eval_tokens: how many bytes of the validation split are predicted; None for
      all of them.
    eval_batch_size: windows or streams at a time in evaluation.
    keep_checkpoints: how many of the newest are kept.
    init_from: parameters to start from, a file or a run's folder; "" for drawn
      ones.
    train_only: "masks", or an expression of paths, to hold all others still; ""
      to train all.
    stop_seconds: how long one of several processes goes on after SIGTERM.
    copies: where the metrics go besides, of "tensorboard" and "wandb".
    record: all settings, for config.json and the checkpoints.
  """

  model: ModelConfig
  optimizer: OptimizerConfig
  steps: int
  every: Every
  seed: int
  batch_size: int
  accumulation_steps: int
  eval_tokens: int | None
  eval_batch_size: int
  keep_checkpoints: int
  init_from: str
  train_only: str
  stop_seconds: int
  copies: tuple[str, ...]
  record: Mapping[str, object]
