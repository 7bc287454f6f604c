"""A trained run as a report reads it: settings, masks, and what it recorded."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from adaptive_attention import accounting
from adaptive_attention.config import ModelConfig
from adaptive_attention.mask_parameters import mask_params
from adaptive_attention.masks import Mask
from adaptive_attention.training import (
  exported,
  files,
  protocols,
  settings,
  units,
)


class Run(NamedTuple):
  """A run at one of its checkpoints.

  Attributes:
    name: its folder, as it was given.
    step: the checkpoint.
    config: the settings of its model.
    settings: all of its settings, by sections.
    data: name and sha256 of its data.
    layers: the masks of its layers.
    metrics, curves, evaluations: the lines of metrics.jsonl, masks.jsonl and
      evals.jsonl up to this step; empty where a run has no such file.
  """

  name: str
  step: int
  config: ModelConfig
  settings: Mapping[str, Any]
  data: Mapping[str, Any]
  layers: Sequence[Mask]
  metrics: list[dict]
  curves: list[dict]
  evaluations: list[dict]

  @property
  def label(self) -> str:
    """The last part of its folder's path."""
    return pathlib.Path(self.name).name

  @property
  def units(self) -> units.Units:
    return units.of_record(self.data)

  def bits(self, line: Mapping) -> float:
    """Returns the loss of a line of the record, per unit of the data."""
    return line["bits_per_char" if self.units.is_text else "bits_per_token"]

  def evaluation(self, split: str) -> dict | None:
    """Returns the last evaluation of a split at this step, or None.

    If --mode=eval has made none, it is that of training, by the model's own
    protocol, of as many tokens as its settings say.
    """
    for line in reversed(self.evaluations):
      if line["split"] == split and line["step"] == self.step:
        return line
    for line in reversed(self.metrics):
      if line["split"] == split == "valid" and line["step"] == self.step:
        macs = accounting.attention_macs_per_token(
          *(self.layers, self.config),
          *(self.config.context_tokens, self.config.memory_tokens),
        )
        protocol = protocols.default(self.config)
        return line | {"protocol": protocol, "attention_macs_per_token": macs}
    return None


def read(
  folder, step: int | None = None, config: ModelConfig | None = None
) -> Run:
  """Reads a run.

  Args:
    folder: its folder.
    step: the checkpoint; None for the newest.
    config: the settings to read the model with; None for the checkpoint's.

  Raises:
    CheckpointError: there is no checkpoint, or it is damaged.
    SettingsError: its model is of a version that is not known.
  """
  with exported.opened(folder) as saved:
    if step is None:
      step = saved.resolve("latest")
    params, meta = saved.restore_params(step)
  config = config or settings.model_config(meta["config"]["model"])
  lines = (
    _lines(pathlib.Path(folder) / f"{name}.jsonl", step)
    for name in ("metrics", "masks", "evals")
  )
  return Run(
    *(str(folder), step, config, meta["config"], meta["data"]),
    mask_params(params, config),
    *lines,
  )


def _lines(path, last_step) -> list[dict]:
  """Returns the lines of a file up to a step; none if it is absent."""
  try:
    lines = files.read_lines(path)
  except OSError:
    return []
  return [line for line in lines if line.get("step", math.inf) <= last_step]


def labels(runs: Sequence[Run]) -> list[str]:
  """Returns a short name for each run: its folder's, or its path if shared."""
  short = [run.label for run in runs]
  return [
    name if short.count(name) == 1 else run.name
    for name, run in zip(short, runs, strict=True)
  ]
