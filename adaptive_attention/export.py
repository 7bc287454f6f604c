"""A checkpoint as a file for others, and as a model whose masks are whole."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from adaptive_attention import (
  checkpoint,
  evaluate,
  logbook,
  masks,
  parallel,
  train,
  weights,
)
from adaptive_attention.model import ModelConfig
from adaptive_attention.settings import SettingsError


def hardened(params, config: ModelConfig):
  """(params, config) with spans of whole tokens and integer periods.

  Then a comb is a stride, whose hidden keys generation does not read. Ratios
  stay as they are.
  """
  bounds = {
    "span_logit": (0.0, config.max_span),
    "period_logit": (config.period_min, config.period_max),
  }

  def visit(path, leaf):
    if path[-1].key not in bounds:
      return leaf
    low, high = bounds[path[-1].key]
    length = np.asarray(masks.bounded(jnp.asarray(leaf), low, high), np.float64)
    # A hair inside the bounds, where the logit is finite.
    share = np.clip((np.round(length) - low) / (high - low), 1e-7, 1 - 1e-7)
    return np.log(share / (1 - share)).astype(np.float32)

  if config.attention == "span_wave":
    config = dataclasses.replace(config, period="integer")
  return jax.tree_util.tree_map_with_path(visit, params), config


def run(config, workdir, corpus, *, step, harden, finetune_steps):
  """Writes model.safetensors beside the checkpoints it is made of.

  Args:
    config: the checkpoint's settings.
    workdir, step: the run's folder and the checkpoint.
    corpus: the data, to measure what hardening costs and to train on.
    harden: makes WORKDIR/hardened, a run whose first checkpoint is the
      `hardened` one, and exports that.
    finetune_steps: trains it on for so many steps, masks as they are.

  Raises:
    SettingsError: steps without hardening, or a model without masks.
  """
  workdir = pathlib.Path(workdir)
  if finetune_steps and not harden:
    raise SettingsError(
      f"--finetune_steps={finetune_steps} trains a hardened model; add --harden"
    )
  if harden:
    if config.model.attention == "dense":
      raise SettingsError(
        "--harden rounds spans and periods, of which a model with "
        "model.attention='dense' has none; leave it out"
      )
    workdir = _harden(config, workdir, corpus, step)
    if finetune_steps:
      step = _finetune(workdir, corpus, step, finetune_steps)
  with checkpoint.Checkpoints(workdir) as saved:
    params, meta = saved.restore_params(step)
  path = workdir / "model.safetensors"
  weights.save(path, params, ModelConfig(**meta["config"]["model"]), step)
  logbook.say(f"step {step} written to {path}")


def _harden(config, workdir, corpus, step):
  """The folder of the hardened run, with one checkpoint, measured."""
  before = ModelConfig(**config.model)
  with checkpoint.Checkpoints(workdir) as saved:
    params, opt_state, meta = saved.restore_items(step)
  whole, after = hardened(params, before)
  figures = [
    evaluate.Evaluator(model_config, config.eval_batch_size)(
      parallel.replicate(tree),
      corpus.valid,
      evaluate.default_protocol(model_config),
    ).bits_per_char
    for tree, model_config in ((params, before), (whole, after))
  ]
  logbook.say(
    f"step {step}, validation bits per character: as trained {figures[0]:.4f}, "
    f"hardened {figures[1]:.4f} ({figures[1] - figures[0]:+.4f})"
  )
  folder = workdir / "hardened"
  with logbook.writing(folder):
    folder.mkdir(exist_ok=True)
  meta["config"]["model"]["period"] = after.period
  with checkpoint.lock(folder), checkpoint.Checkpoints(folder) as saved:
    kept = {name: meta[name] for name in ("config", "data")}
    saved.save(step, whole, opt_state, kept, figures[1])
  return folder


def _finetune(workdir, corpus, step, steps):
  """Trains on, masks as they are; the step it ends with."""
  with checkpoint.Checkpoints(workdir) as saved:
    config = ConfigDict(saved.read_meta(step)["config"])
  config.steps = step + steps
  config.optimizer.mask_lr_multiplier = 0.0
  train.run(config, workdir, corpus, step=str(step))
  return config.steps
