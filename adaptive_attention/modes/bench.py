"""Times attention, training steps and decoding, on the named cases."""

import pathlib
import re
import time

import jax

from adaptive_attention.bench import (
  bars,
  cases,
  device,
  runners,
  timing,
  trained,
)
from adaptive_attention.training import (
  console,
  exported,
  files,
  logbook,
  settings,
)


def run(config: settings.Checked, workdir):
  """Times every chosen case by every implementation.

  On an accelerator these are calls of attention of its own, each beside what
  others have there, in at most five minutes; at the end it is printed which
  share of another's time is the bar, and whether it is met.

  It prints a table and writes bench.json after each case, so that a run that is
  stopped keeps the cases that it has timed.

  Args:
    config: `bench` says what to compare with, how often, and on which cases.
    workdir: the folder for bench.json, made if absent.

  Raises:
    BenchmarkError: a case is unknown, a context is given without a run, or
      PyTorch is missing.
    WriteError: bench.json cannot be written; its rows are printed first.
  """
  asked, parts = config.given.bench, settings.training_config(config)
  on_device = jax.default_backend() != "cpu"
  chosen = cases.named(_known(asked, on_device), asked.shapes)
  path = pathlib.Path(workdir) / "bench.json"
  with files.writing(path.parent):
    path.parent.mkdir(parents=True, exist_ok=True)
  content = {"environment": logbook.environment(), "rows": []}
  ends, longest = time.perf_counter() + device.SECONDS, 0.0
  for i, case in enumerate(chosen):
    begun = time.perf_counter()
    if on_device and ends - begun <= longest:
      console.say(_too_late(chosen[i:]))
      break
    timed = _made(case, asked, parts, path.parent / "profile")
    if not timed:
      continue
    share = None
    if on_device:
      made_in = time.perf_counter() - begun
      longest = max(longest, made_in)
      share = (ends - begun) / (len(chosen) - i) - made_in
    timing.time_in_turns(timed, asked.repeats, share)
    content["rows"] += [runner.row() for runner in timed]
    if on_device:
      content["bars"] = bars.judged(content["rows"])
    _shown(timed, content, path)
  for bar in content.get("bars", ()):
    console.say(bars.text(bar))
  if content["rows"]:
    console.say(f"written to {path}")


def _known(asked, on_device):
  """Returns the cases that there are to choose from."""
  if asked.checkpoint:
    return _learned_cases(asked)
  if asked.context:
    raise cases.BenchmarkError(
      f"config.bench.context={asked.context} stretches the masks of a run; "
      "give config.bench.checkpoint too, or leave it out"
    )
  if on_device:
    return cases.DEVICE_SHAPES
  return (*cases.SHAPES, *cases.STEPS, *cases.DECODES)


def _made(case, asked, parts, profile_folder):
  """Returns the runners of a case, of which a trace is written if wanted."""
  made = runners.of(case, parts, compare=asked.compare)
  if made and asked.profile:
    _profile(made, profile_folder)
  return made


def _shown(timed, content, path):
  """Prints the table of a case, and writes the file even if that fails."""
  try:
    for line in timing.table(timed):
      console.say(line)
  finally:
    files.write_json(path, content)


def _too_late(left):
  """Says what is left out, as the time is over, and how to have it."""
  names = ";".join(case.name for case in left)
  return (
    f"left out, as no time is left of {device.SECONDS:g} s: "
    f"--config.bench.shapes={names!r} times them"
  )


def _profile(timed, folder):
  """Writes a trace of one round of each runner, named in it as in the table."""
  case = timed[0].case
  folder /= re.sub(r"\W+", "_", case)
  for runner in timed:  # what comes with a first call is not of the trace
    (runner.one_round or runner.call)()
  with jax.profiler.trace(str(folder)):
    for runner in timed:
      with jax.profiler.TraceAnnotation(f"{runner.name} {runner.kind}"):
        (runner.one_round or runner.call)()
  console.say(f"{case}: a trace of one round of each is in {folder}")


def _learned_cases(asked):
  """Returns the cases of a trained run; on a device its layers alone."""
  with exported.opened(asked.checkpoint) as saved:
    step = saved.resolve("latest")
    params, meta = saved.restore_params(step)
  model = settings.model_config(meta["config"]["model"])
  found = trained.of_run(step, params, model, asked.context)
  if jax.default_backend() != "cpu":
    return [case for case in found if isinstance(case, cases.Case)]
  return found
