"""What follows a step: a record, a checkpoint, an evaluation, a sample."""

import contextlib
import math
import time
from collections.abc import Sequence

import jax
import numpy as np

from adaptive_attention import accounting, generation
from adaptive_attention.config import ModelConfig
from adaptive_attention.masks import Mask
from adaptive_attention.segment_memory import Groups
from adaptive_attention.state import State
from adaptive_attention.training import (
  checkpoint,
  console,
  evaluator,
  files,
  logbook,
  parallel,
  processes,
  regrouping,
  signals,
)
from adaptive_attention.training.units import Units

_TOLD = (
  *("learning_rate", "grad_norm", "span_mean", "open_share"),
  "memory_bytes",  # on a device, if there is a memory
)
_PROMPT_TOKENS, _SAMPLE_TOKENS = 32, 200


def record(
  step: int,
  metrics: dict,
  seconds: float | None,
  *,
  config: ModelConfig,
  step_tokens: int,
  units: Units,
  last: int,
  began: float,
  saved: checkpoint.Checkpoints,
  book: logbook.Logbook,
  ends: signals.Signals,
):
  """Prints and records the numbers of a step.

  Args:
    metrics: those of `steps.make_train_step`, on the host.
    seconds: the time per step; None if no step was timed yet.
    step_tokens: how many tokens a step has, over all devices.
    units: those of the losses.
    last: the run's last step.
    began: when this process began with the run, by time.perf_counter.
    saved, book: the run's checkpoints and its record.
    ends: asked to end the run if the record cannot be written.
  """
  finish(saved=saved, book=book, wait=False)
  layers, shares_LH = metrics["masks"]
  lengths = by_head(layers, shares_LH)
  bits = float(metrics["cross_entropy"] / math.log(2))
  rate = None if seconds is None else step_tokens / seconds
  said = units.brief(bits)
  console.say(console.step_text(step, last, metrics, said, seconds, rate))
  numbers = {
    "loss": metrics["loss"],
    **units.figures(bits),
    "tokens_per_second": rate,
    "seconds": book.seconds + time.perf_counter() - began,
    **{name: metrics[name] for name in _TOLD if name in metrics},
    **_of_masks(layers, lengths, config),
  }
  with _ended_by_failure(ends):
    book.write_masks(step, **lengths)
    book.write(step, "train", **numbers)


def _of_masks(layers, lengths, config) -> dict:
  return {
    "span_max": float(np.max(lengths["span"])),
    "span_by_layer": np.mean(lengths["span"], axis=1).tolist(),
    "attention_macs_per_token": accounting.attention_macs_per_token(
      layers, config, config.context_tokens, config.memory_tokens
    ),
  }


def by_head(layers: Sequence[Mask], shares_LH) -> dict[str, list]:
  """Returns the lengths of all masks, each a list per layer of its heads'.

  Args:
    layers: a mask per layer.
    shares_LH: the shares of the distances that the heads leave open.
  """
  of_masks = {"span": [mask.span for mask in layers]}
  waves = [mask.wave for mask in layers if mask.wave is not None]
  if waves:
    of_masks["period"] = [wave.period for wave in waves]
    of_masks["ratio"] = [wave.ratio for wave in waves]
  return {
    name: np.asarray(values, np.float64).tolist()
    for name, values in (of_masks | {"open_share": shares_LH}).items()
  }


def save(
  state,
  memory,
  step: int,
  *,
  corpus,
  meta: dict,
  saved: checkpoint.Checkpoints,
  book: logbook.Logbook,
):
  """Begins to save a step, once the save before it has ended.

  The primary process writes the memory of all processes.

  Args:
    corpus: the data, which must still be what they were.
    meta: what else is kept with each checkpoint.
    saved: the run's checkpoints.
    book: the record.
  """
  corpus.check_unchanged()
  if isinstance(memory, State):
    meta = {**meta, "memory_groups": regrouping.record(memory)}
  memory = parallel.gather(memory)
  finish(saved=saved, book=book)
  if parallel.is_primary():
    saved.save(step, state.params, state.opt_state, meta, memory=memory)
  processes.exchange(None)  # as above


def finish(
  *, saved: checkpoint.Checkpoints, book: logbook.Logbook, wait: bool = True
):
  """Adds what the save under way took to the next line of the record.

  Args:
    saved: the run's checkpoints.
    book: the record.
    wait: whether to wait for its end.
  """
  if done := saved.finish(wait=wait):
    book.add(
      save_step=done.step,
      save_seconds=done.seconds,
      save_stall_seconds=done.stall_seconds,
      save_bytes=done.bytes,
    )
  if wait:
    processes.exchange(None)  # if it failed there, all of them end


def evaluate(
  state,
  groups: tuple[Groups, ...] | None,
  step: int,
  *,
  predict: evaluator.Evaluator,
  data,
  units: Units,
  last: int,
  saved: checkpoint.Checkpoints,
  book: logbook.Logbook,
  ends: signals.Signals,
):
  """Evaluates a step that is saved; prints and records the result.

  The checkpoint of the step gets the result too. The save may go on meanwhile.

  Args:
    groups: of the heads of the run's memory, if it has one.
    predict: the evaluator.
    data: the tokens to predict.
    units: those of the result.
    last: the run's last step, at which the results of other coders are printed.
    saved: the run's checkpoints.
    book: the record.
    ends: the signals, which may end the evaluation.
  """
  with _given_up(ends, step):
    result = predict(state.params, data, groups=groups)
  text = (
    f"valid {step:>5} {units.brief(result.bits, result.stderr)} "
    f"over {result.tokens:,} {units.unit}s in "
    f"{result.tokens / result.tokens_per_second:.1f} s"
  )
  if step == last:
    text += (
      f"; the same {units.unit}s have an order-0 entropy of "
      f"{evaluator.order0_entropy(data):.4f}"
    )
    if units.is_text:
      text += f", and lzma takes {evaluator.lzma_bits_per_char(data):.4f}"
  console.say(text)
  finish(saved=saved, book=book)
  with _ended_by_failure(ends):
    book.write(step, "valid", loss=result.loss, **units.record(result))
  if parallel.is_primary():
    saved.record_evaluation(step, result.bits)


def sample(
  state,
  step: int,
  *,
  config: ModelConfig,
  data,
  units: Units,
  seed: int,
  ends: signals.Signals,
):
  """Prints a text that the model writes; it changes nothing else.

  Args:
    data: tokens that begin with the prompt.
    units: how they are written.
    seed: the number that the draws follow from, with the step.
    ends: the signals, which may end the writing.
  """
  if not parallel.is_primary():
    return
  prompt = np.asarray(data[:_PROMPT_TOKENS])
  with _given_up(ends, step):
    written = generation.generate(
      jax.device_get(state.params),
      config,
      prompt[None],
      _SAMPLE_TOKENS,
      jax.random.fold_in(jax.random.key(seed), step),
      temperature=0.8,
      # Its shape stays the same while the spans change.
      cache="dense",
      draw_below=units.draw_below,
    )[0]
  text = units.text_of(np.concatenate([prompt, written]))
  console.say(f"sample {step:>4} {text}")


@contextlib.contextmanager
def _given_up(ends, step):
  """Lets a signal end the work inside at once, and the run after it.

  The work can be done again. Under several processes it does not end early, as
  each of them waits for all others.

  Raises:
    Stopped: a signal came in.
  """
  if parallel.process_count() > 1:
    yield
    return
  try:
    with ends.interrupting():
      yield
  except signals.Interrupted:
    raise ends.stopped(step) from None


@contextlib.contextmanager
def _ended_by_failure(ends):
  """Ends the run as at a signal if a line of the record cannot be written."""
  try:
    yield
  except files.WriteError as error:
    ends.stop(f"a failed write of the record ({error})", 1)
