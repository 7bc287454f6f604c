"""Times attention, training steps and decoding, on the named cases."""

import pathlib

import jax

from adaptive_attention.bench import cases, device, runners, timing
from adaptive_attention.mask_parameters import mask_params
from adaptive_attention.training import checkpoint, console, logbook
from adaptive_attention.training.settings import model_config


def run(config, workdir):
  """Times every chosen case by every implementation.

  On an accelerator these are cases of its own, each beside what others have
  there, and for some it is printed which share of another's time is the bar.

  It prints a table and writes bench.json after each case, so that a run that is
  stopped keeps the cases that it has timed.

  Args:
    config: `bench` says what to compare with, how often, and on which cases.
    workdir: the folder for bench.json, made if absent.

  Raises:
    BenchmarkError: a case is unknown, or PyTorch is missing.
    LogbookError: bench.json cannot be written; its rows are printed first.
  """
  settings = config.bench
  known = (*cases.SHAPES, *cases.STEPS, *cases.DECODES)
  if jax.default_backend() != "cpu":
    known = (*cases.DEVICE_SHAPES, *cases.STEPS)
  if settings.checkpoint:
    known = _learned_cases(settings.checkpoint)
  chosen = cases.named(known, settings.shapes)
  path = pathlib.Path(workdir) / "bench.json"
  with logbook.writing(path.parent):
    path.parent.mkdir(parents=True, exist_ok=True)
  content = {"environment": logbook.environment(), "rows": []}
  for case in chosen:
    timed = runners.of(case, config, compare=settings.compare)
    if not timed:
      continue
    if settings.profile:
      _profile(timed, path.parent / "profile")
    timing.time_in_turns(timed, settings.repeats)
    content["rows"] += [runner.row() for runner in timed]
    content["bars"] = device.bars(content["rows"])
    try:  # the file is written even if the table cannot be printed
      for line in timing.table(timed):
        console.say(line)
    finally:
      logbook.write_json(path, content)
  for bar in content.get("bars", ()):
    console.say(device.bar_text(bar))
  if content["rows"]:
    console.say(f"written to {path}")


def _profile(timed, folder):
  """Writes a trace of one call of each runner, for TensorBoard or Perfetto."""
  for runner in timed:
    name = f"{runner.case}, {runner.name} {runner.kind}".replace(" ", "_")
    with jax.profiler.trace(str(folder / name)):
      runner.call()
  console.say(f"{timed[0].case}: traces are in {folder}")


def _learned_cases(folder):
  """Returns the layers of a trained run as cases with their masks."""
  with checkpoint.Checkpoints(folder) as saved:
    step = saved.resolve("latest")
    params, meta = saved.restore_params(step)
  model = model_config(meta["config"]["model"])
  return [
    cases.case_of_mask(
      f"layer {i} of step {step}",
      model.context_tokens,
      mask,
      H=model.n_head,
      K=model.width // model.n_head,
    )
    for i, mask in enumerate(mask_params(params, model))
  ]
