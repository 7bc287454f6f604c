"""What follows a step: a line of the record, a checkpoint, a figure, a text."""

import contextlib
import math
import time

import jax
import numpy as np

from adaptive_attention import accounting, generation
from adaptive_attention.config import ModelConfig
from adaptive_attention.training import (
  console,
  evaluator,
  logbook,
  parallel,
  signals,
)

_PROMPT_BYTES, _SAMPLE_BYTES = 32, 200


def record(
  step: int,
  metrics: dict,
  seconds: float | None,
  *,
  config: ModelConfig,
  step_tokens: int,
  last: int,
  began: float,
  book: logbook.Logbook,
  ends: signals.Signals,
):
  """Says and writes down the numbers of a step.

  Args:
    metrics: those of `steps.make_train_step`, on the host.
    seconds: what a step takes; None where none was timed yet.
    step_tokens: how many tokens a step has, over all devices.
    last: the run's last step.
    began: when this process took up the run, by time.perf_counter.
    book: where it is written.
    ends: what is asked for the end where it cannot be written.
  """
  layers = metrics["masks"]
  bits_per_char = metrics["cross_entropy"] / math.log(2)
  rate = None if seconds is None else step_tokens / seconds
  numbers = metrics | {"bits_per_char": bits_per_char}
  console.say(console.step_text(step, last, numbers, seconds, rate))
  wall_seconds = time.perf_counter() - began
  _write(
    book,
    ends,
    step,
    "train",
    loss=metrics["loss"],
    bits_per_char=bits_per_char,
    tokens_per_second=rate,
    seconds=book.seconds + wall_seconds,
    **{
      name: metrics[name]
      for name in ("learning_rate", "grad_norm", "span_mean", "open_share")
    },
    span_max=max(float(np.max(mask.span)) for mask in layers),
    span_by_layer=[float(np.mean(mask.span)) for mask in layers],
    attention_macs_per_token=accounting.attention_macs_per_token(
      layers, config, config.context_tokens, config.memory_tokens
    ),
  )


def save(state, memory, step: int, *, saved, meta: dict):
  """Saves a step: every process gives what it remembers, the primary writes.

  Args:
    saved: the run's checkpoints.
    meta: what else is kept with each.
  """
  memory = parallel.gather(memory)
  if parallel.is_primary():
    saved.save(step, state.params, state.opt_state, meta, memory=memory)


def evaluate(
  state,
  step: int,
  *,
  predict: evaluator.Evaluator,
  data,
  last: int,
  saved,
  book: logbook.Logbook,
  ends: signals.Signals,
):
  """Says and writes down the figure of a step that is saved.

  Its checkpoint then has the figure too.

  Args:
    predict: what evaluates.
    data: the bytes to predict.
    last: the run's last step, where other coders' figures are said too.
    saved: the run's checkpoints.
    book: where it is written.
    ends: what may ask for the end before it is done.
  """
  with _given_up(ends, step):
    result = predict(state.params, data)
  text = (
    f"valid {step:>5} bpc {result.bits_per_char:.4f} +- {result.stderr:.4f} "
    f"over {result.bytes:,} bytes in "
    f"{result.bytes / result.tokens_per_second:.1f} s"
  )
  if step == last:
    text += (
      f"; the same bytes have an order-0 entropy of "
      f"{evaluator.order0_entropy(data):.4f}, and lzma takes "
      f"{evaluator.lzma_bits_per_char(data):.4f}"
    )
  console.say(text)
  _write(
    book,
    ends,
    step,
    "valid",
    loss=result.loss,
    bits_per_char=result.bits_per_char,
    stderr=result.stderr,
    bytes=result.bytes,
    tokens_per_second=result.tokens_per_second,
  )
  if parallel.is_primary():
    saved.record_evaluation(step, result.bits_per_char)


def sample(
  state,
  step: int,
  *,
  config: ModelConfig,
  data,
  seed: int,
  ends: signals.Signals,
):
  """Says what the model writes now; no figure, and no setting, follows.

  Args:
    data: a text that begins with the prompt.
    seed: what is drawn follows from it and the step.
    ends: what may ask for the end before it is done.
  """
  if not parallel.is_primary():
    return
  prompt = np.asarray(data[:_PROMPT_BYTES])
  with _given_up(ends, step):
    written = generation.generate(
      jax.device_get(state.params),
      config,
      prompt[None],
      _SAMPLE_BYTES,
      jax.random.fold_in(jax.random.key(seed), step),
      temperature=0.8,
      # Of one shape throughout, where spans go on changing.
      cache="dense",
      draw_below=generation.BYTES,
    )[0]
  text = console.text_of(np.concatenate([prompt, written]))
  console.say(f"sample {step:>4} {text}")


@contextlib.contextmanager
def _given_up(ends, step):
  """Around what can be done again: a signal ends it, and the run.

  Not so under several processes, where each waits for all others.

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


def _write(book, ends, step, split, **values):
  """Writes a line of the record; where it fails the run ends as at a signal."""
  try:
    book.write(step, split, **values)
  except logbook.LogbookError as error:
    ends.stop(f"a record that takes no more ({error})", 1)
