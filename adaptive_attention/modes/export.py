"""A checkpoint as a file for others, and as a model whose masks are whole."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_attention import masks, weights
from adaptive_attention.config import ModelConfig
from adaptive_attention.model import Transformer
from adaptive_attention.training import (
  checkpoint,
  console,
  evaluator,
  logbook,
  parallel,
  resume,
  settings,
)
from adaptive_attention.training import run as training


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
    config: the checkpoint's settings, under those that flags change.
    workdir, step: the run's folder and the checkpoint.
    corpus: the data, to measure what hardening costs and to train on.
    harden: makes WORKDIR/hardened, a run whose first checkpoint is the
      `hardened` one, and exports that.
    finetune_steps: trains it on for so many steps, masks as they are.

  Raises:
    SettingsError: a model without masks, or settings that it cannot be trained
      on with.
    CheckpointError: a hardened model is there already.
  """
  workdir = pathlib.Path(workdir)
  if harden:
    tuned = _tuned(config, workdir, corpus, step, finetune_steps)
    workdir = _harden(config, workdir, corpus, step)
    if finetune_steps:
      training.train(
        settings.training_config(tuned), workdir, corpus, which=str(step)
      )
      step = tuned.steps
  with checkpoint.Checkpoints(workdir) as saved:
    params, meta = saved.restore_params(step)
  path = workdir / "model.safetensors"
  model_config = settings.model_config(meta["config"]["model"])
  with logbook.writing(path):
    weights.save(path, params, model_config, step)
  console.say(f"step {step} written to {path}")


def _tuned(config, workdir, corpus, step, finetune_steps):
  """The settings of the hardened run, which can be made and trained on."""
  if config.model.attention == "dense":
    raise settings.SettingsError(
      "--harden rounds spans and periods, of which a model with "
      "model.attention='dense' has none; leave it out"
    )
  folder = workdir / "hardened"
  with checkpoint.Checkpoints(folder) as saved:
    if saved.steps():
      raise checkpoint.CheckpointError(
        f"the hardened model was not written, as {folder} holds one already; "
        "move that folder away, or remove it"
      )
  config = config.copy_and_resolve_references()
  if config.model.attention == "span_wave":
    config.model.period = "integer"
  if finetune_steps:
    config.steps = step + finetune_steps
    config.optimizer.mask_lr_multiplier = 0.0
    devices = parallel.device_count()
    settings.check(config)
    settings.check_devices(config, devices)
    settings.check_data(config, corpus, devices)
    with checkpoint.Checkpoints(workdir) as saved:
      resume.check_same_data(corpus, saved.read_meta(step), step)
  return config


def _harden(config, workdir, corpus, step):
  """The folder of the hardened run, with one checkpoint, measured."""
  folder = workdir / "hardened"
  with resume.lock(folder):
    before = settings.model_config(config.model)
    with checkpoint.Checkpoints(workdir) as saved:
      params, opt_state, meta = saved.restore_items(step)
    resume.say_other_data(corpus, meta)
    whole, after = hardened(params, before)
    data = corpus.valid[: config.eval_tokens or None]
    figures = [
      evaluator.Evaluator(Transformer(model_config), config.eval_batch_size)(
        parallel.replicate(tree), data
      ).bits_per_char
      for tree, model_config in ((params, before), (whole, after))
    ]
    part = f" of {len(data):,} bytes" if config.eval_tokens else ""
    console.say(
      f"step {step}, validation bits per character{part}: as trained "
      f"{figures[0]:.4f}, hardened {figures[1]:.4f} "
      f"({figures[1] - figures[0]:+.4f})"
    )
    kept = {name: meta[name] for name in ("config", "data")}
    kept["config"]["model"]["period"] = after.period
    with checkpoint.Checkpoints(folder) as saved:
      saved.save(step, whole, opt_state, kept, figures[1])
  return folder
