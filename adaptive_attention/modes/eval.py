"""Evaluates a checkpoint."""

import collections
import dataclasses

from adaptive_attention import accounting
from adaptive_attention.config import ModelConfig
from adaptive_attention.mask_parameters import mask_params
from adaptive_attention.training import (
  checkpoint,
  console,
  evaluator,
  logbook,
  parallel,
  resume,
)


def run(config, workdir, *, corpus, step, split="valid", protocol=None):
  """Evaluates a checkpoint; writes eval_SPLIT.json and adds to evals.jsonl.

  Args:
    config: the checkpoint's settings; `eval_tokens` says how much of the
      split is evaluated, 0 for all of it.
    workdir: the run's folder.
    corpus: the data, with splits `valid` and `test`.
    step: the checkpoint.
    split: "valid" or "test".
    protocol: "window", "stride:N" or "memory"; None for the model's own.
  """
  model_config = ModelConfig(**config.model)
  protocol = protocol or evaluator.default_protocol(model_config)
  evaluator.check_protocol(protocol, model_config)
  with checkpoint.Checkpoints(workdir) as checkpoints:
    params, meta = checkpoints.restore_params(step)
  resume.say_other_data(corpus, meta)
  params = parallel.replicate(params)
  predict = evaluator.Evaluator(model_config, config.eval_batch_size)
  data = getattr(corpus, split)[: config.eval_tokens or None]
  result = predict(params, data, protocol, warm=True)
  layers = mask_params(params, model_config)
  macs = accounting.attention_macs_per_token(
    layers,
    model_config,
    model_config.context_tokens,
    evaluator.memory_of(protocol, model_config),
  )
  record = collections.OrderedDict(
    step=step,
    split=split,
    protocol=protocol,
    **dataclasses.asdict(result),
    attention_macs_per_token=macs,
    cache_bytes=accounting.cache_bytes(layers, model_config),
    cache_reads=accounting.cache_reads(layers, model_config),
    data={"name": corpus.name, "sha256": corpus.sha256},
  )
  part = f"first {len(data):,} bytes of " if config.eval_tokens else ""
  try:  # told first, and kept even if nobody reads it
    console.say(
      f"step {step}  {part}{split} of {corpus.name}, {protocol}: "
      f"{result.bits_per_char:.4f} +- {result.stderr:.4f} bits per character, "
      f"{result.bytes:,} bytes, {result.tokens_per_second:,.0f} tokens/s"
    )
    console.say(f"attention: {console.macs_text(macs, model_config)}")
    console.say(f"cache: {console.cache_text(layers, model_config)}")
  finally:
    if parallel.is_primary():
      logbook.write_evaluation(workdir, record)
