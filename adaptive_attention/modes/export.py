"""Exports a checkpoint as a file for other programs, hardened if asked for."""

import pathlib

import jax
import numpy as np

from adaptive_attention import gpt2
from adaptive_attention.mask_parameters import hardened
from adaptive_attention.model import Transformer
from adaptive_attention.report import whole
from adaptive_attention.training import (
  checkpoint,
  console,
  evaluator,
  exported,
  files,
  parallel,
  resume,
  settings,
  units,
)
from adaptive_attention.training import run as training


def run(
  config: settings.Checked,
  workdir,
  *,
  corpus=None,
  step,
  harden=False,
  finetune_steps=0,
  layout=None,
  dtype="float32",
):
  """Writes model.safetensors beside the checkpoints of the run.

  Args:
    config: the checkpoint's settings, with those that flags change.
    workdir, step: the run's folder and the checkpoint.
    corpus: the data, to measure what hardening costs and to train on; None
      without `harden`.
    harden: makes WORKDIR/hardened, a run whose first checkpoint is the
      `hardened` one, and exports that.
    finetune_steps: how many steps the hardened model is trained on, with its
      masks fixed; its report is made then, if the settings ask for one.
    layout: "gpt2" to write WORKDIR/gpt2, a folder that other programs read as a
      GPT-2, instead; see `gpt2.write`.
    dtype: what the parameters are written in: "float32" or "bfloat16".

  Raises:
    SettingsError: the model has no masks, or it cannot be trained on with these
      settings.
    WeightsError: the layout has no place for the model.
    CheckpointError: WORKDIR/hardened exists already, or WORKDIR is that of an
      exported model, which cannot be hardened.
  """
  workdir = pathlib.Path(workdir)
  if harden:
    tuned = _tuned(config, workdir, corpus, step, finetune_steps)
    workdir = _harden(config, workdir, corpus, step)
    if finetune_steps:
      training.train(
        settings.training_config(tuned), workdir, corpus, which=str(step)
      )
      step = tuned.given.steps
      if tuned.given.report:
        whole.write_of_ended_run(workdir)
  _write(workdir, step, layout, dtype)


def _write(workdir, step, layout, dtype):
  """Writes a checkpoint's parameters beside the checkpoints."""
  with exported.opened(workdir) as saved:
    params, meta = saved.restore_params(step)
  params = jax.tree.map(lambda x: np.asarray(x, dtype), params)
  path = workdir / (layout or exported.NAME)
  with files.writing(path):
    if layout:
      gpt2.write(path, params, settings.model_config(meta["config"]["model"]))
    else:
      exported.save(path, params, meta)
  console.say(f"step {step} written to {path}")


def _tuned(config, workdir, corpus, step, finetune_steps):
  """Checks that the hardened run can be made.

  Returns:
    The settings to train it on with; None if it is not.
  """
  if exported.is_alone(workdir):
    raise checkpoint.CheckpointError(
      f"--harden goes on with the optimizer's state, which {workdir} does not "
      f"hold beside {exported.NAME}; give the --workdir of a run that has "
      "saved a checkpoint"
    )
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
  if not finetune_steps:
    return None
  given = config.given.copy_and_resolve_references()
  if given.model.attention == "span_wave":
    given.model.period = "integer"
  given.steps = step + finetune_steps
  given.optimizer.mask_lr_multiplier = 0.0
  given.train_only = ""
  devices = parallel.device_count()
  tuned = settings.check(given)
  settings.check_devices(given, devices)
  settings.check_data(given, corpus, devices)
  with checkpoint.Checkpoints(workdir) as saved:
    resume.check_same_data(corpus, saved.read_meta(step), step)
  return tuned


def _harden(config, workdir, corpus, step):
  """Makes the hardened run, with one evaluated checkpoint; returns its path."""
  folder, given = workdir / "hardened", config.given
  with resume.lock(folder):
    with checkpoint.Checkpoints(workdir) as saved:
      params, opt_state, meta = saved.restore_items(step)
    resume.say_other_data(corpus, meta)
    rounded, after = hardened(params, config.model)
    data = corpus.valid[: given.eval_tokens or None]
    figures = [
      evaluator.Evaluator(Transformer(model_config), given.eval_batch_size)(
        parallel.replicate(tree), data
      ).bits
      for tree, model_config in ((params, config.model), (rounded, after))
    ]
    read = units.of(corpus)
    part = f" of {len(data):,} {read.unit}s" if given.eval_tokens else ""
    console.say(
      f"step {step}, validation {read.name}{part}: as trained "
      f"{figures[0]:.4f}, hardened {figures[1]:.4f} "
      f"({figures[1] - figures[0]:+.4f})"
    )
    kept = {name: meta[name] for name in ("config", "data")}
    kept["config"]["model"]["period"] = after.period
    with checkpoint.Checkpoints(folder) as saved:
      saved.save(step, rounded, opt_state, kept, figures[1])
  return folder
