"""Evaluates a checkpoint."""

import collections

from adaptive_attention import accounting
from adaptive_attention.mask_parameters import mask_params
from adaptive_attention.model import Transformer
from adaptive_attention.training import (
  checkpoint,
  console,
  evaluator,
  logbook,
  parallel,
  resume,
  settings,
  units,
)


def run(config, workdir, *, corpus, step, split="valid", protocol=None):
  """Evaluates a checkpoint; writes eval_SPLIT.json, appends to evals.jsonl.

  Args:
    config: the checkpoint's settings; `eval_tokens` says how much of the
      split is evaluated, 0 for all of it.
    workdir: the run's folder.
    corpus: the data, with splits `valid` and `test`.
    step: the checkpoint.
    split: "valid" or "test".
    protocol: "window", "stride:N" or "memory"; None for the model's own.
  """
  model_config = settings.model_config(config.model)
  protocol = protocol or evaluator.default_protocol(model_config)
  evaluator.check_protocol(protocol, model_config)
  with checkpoint.Checkpoints(workdir) as checkpoints:
    params, meta = checkpoints.restore_params(step)
  resume.say_other_data(corpus, meta)
  params = parallel.replicate(params)
  predict = evaluator.Evaluator(
    Transformer(model_config), config.eval_batch_size
  )
  data = _split(corpus, split)[: config.eval_tokens or None]
  result = predict(params, data, protocol)
  layers = mask_params(params, model_config)
  read = units.of(corpus)
  record = collections.OrderedDict(
    step=step,
    split=split,
    protocol=protocol,
    **read.record(result),
    **_costs(layers, model_config, protocol),
    data=units.source(corpus),
  )
  part = f"first {len(data):,} {read.unit}s of " if config.eval_tokens else ""
  macs = record["attention_macs_per_token"]
  try:  # the record is written even if nothing can be printed
    console.say(
      f"step {step}  {part}{split} of {corpus.name}, {protocol}: "
      f"{read.full(result.bits, result.stderr)}, {result.tokens:,} "
      f"{read.unit}s, {result.tokens_per_second:,.0f} tokens/s"
    )
    found = accounting.attention_choice(model_config)
    console.say(f"attention: {console.macs_text(macs, found)}")
    console.say(f"cache: {console.cache_text(layers, model_config)}")
  finally:
    if parallel.is_primary():
      logbook.write_evaluation(workdir, record)


def _split(corpus, split):
  """Returns a split of the data.

  Raises:
    EvaluationError: the data have no such split.
  """
  data = getattr(corpus, split)
  if not len(data):
    raise evaluator.EvaluationError(
      f"{corpus.name} has no split {split}; add {split}.bin to it, or give "
      "--split=valid"
    )
  return data


def _costs(layers, config, protocol) -> dict:
  """Returns what attention and the KV cache cost with these masks."""
  return {
    "attention_macs_per_token": accounting.attention_macs_per_token(
      layers,
      config,
      config.context_tokens,
      evaluator.memory_of(protocol, config),
    ),
    "cache_bytes": accounting.cache_bytes(layers, config),
    "cache_reads": accounting.cache_reads(layers, config),
  }
