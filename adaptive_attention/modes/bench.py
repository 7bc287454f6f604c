"""Times attention, training steps and decoding, on the named cases."""

import pathlib

from adaptive_attention.bench import cases, runners, timing
from adaptive_attention.mask_parameters import mask_params
from adaptive_attention.training import checkpoint, console, logbook
from adaptive_attention.training.settings import model_config


def run(config, workdir):
  """Times every chosen case by every implementation.

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
    timing.time_in_turns(timed, settings.repeats)
    content["rows"] += [runner.row() for runner in timed]
    try:  # the file is written even if the table cannot be printed
      for line in timing.table(timed):
        console.say(line)
    finally:
      logbook.write_json(path, content)
  if content["rows"]:
    console.say(f"written to {path}")


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
