"""Evaluates a checkpoint."""

from adaptive_attention import accounting
from adaptive_attention.mask_parameters import mask_params
from adaptive_attention.model import Transformer
from adaptive_attention.training import (
  console,
  evaluator,
  logbook,
  paired,
  parallel,
  processes,
  protocols,
  regrouping,
  resume,
  settings,
  units,
)


def run(
  config: settings.Checked,
  workdir,
  *,
  corpus,
  step,
  split="valid",
  protocol=None,
  against=None,
  against_protocol=None,
):
  """Evaluates a checkpoint; writes eval_SPLIT.json, appends to evals.jsonl.

  Args:
    config: the checkpoint's settings; `eval_tokens` says how much of the
      split is evaluated, 0 for all of it.
    workdir, step: the run's folder and the checkpoint.
    corpus, split: the data, and which of its splits: "valid" or "test".
    protocol: one of `protocols`; None for the model's own.
    against: the folder of another run, of whose last evaluation of the same
      tokens the difference is printed.
    against_protocol: the protocol of that evaluation; None for the same.

  Raises:
    SettingsError: the protocol is unknown or does not fit the model.
    EvaluationError: there is no such split, or no such evaluation of another.
  """
  given = config.given
  protocol = protocol or protocols.default(config.model)
  model_config = protocols.model_for(protocol, config.model)
  data = _split(corpus, split)[: given.eval_tokens or None]
  other = _other(against, against_protocol, corpus, split, protocol, data)
  params, meta = resume.params_and_meta(workdir, step, model_config)
  resume.say_other_data(corpus, meta)
  predict = evaluator.Evaluator(
    Transformer(model_config), given.eval_batch_size
  )
  groups = regrouping.from_meta(meta, model_config)
  result = predict(parallel.replicate(params), data, protocol, groups)
  layers = mask_params(params, model_config)
  record = {
    **{"step": step, "split": split, "protocol": protocol},
    **_figures(result, layers, corpus, protocol, model_config),
    **_compared(result, other, against),
  }
  try:  # the record is written even if nothing can be printed
    _say(record, result, corpus, given.eval_tokens, layers, model_config)
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


def _other(against, by, corpus, split, protocol, data) -> dict | None:
  """Returns the record of another run's evaluation of the same tokens.

  Args:
    against: the run's folder; None for no other.
    by: the protocol of that evaluation, if it is not the same.
  """
  if against is not None:
    same = corpus.sha256, split, by or protocol, len(data) - 1
    return processes.from_primary(lambda: paired.earlier(against, *same))
  if by is not None:
    raise settings.SettingsError(
      f"--against_protocol={by} means nothing without --against; give both"
    )
  return None


def _figures(result, layers, corpus, protocol, config) -> dict:
  """Returns a result, and what attention and the KV cache cost."""
  return {
    **units.of(corpus).record(result),
    "attention_macs_per_token": accounting.attention_macs_per_token(
      layers,
      config,
      config.context_tokens,
      protocols.memory_of(protocol, config),
    ),
    "cache_bytes": accounting.cache_bytes(layers, config),
    "cache_reads": accounting.cache_reads(layers, config),
    "data": units.source(corpus),
    "chunk_bits": paired.kept(result),
  }


def _compared(result, other, against) -> dict:
  """Returns what the result has more than the record of another run, if any."""
  if other is None:
    return {}
  told = {"workdir": str(against)}
  told |= {name: other[name] for name in ("step", "protocol")}
  chunks = result.chunk_bits, other["chunk_bits"]
  more = paired.difference(*chunks, result.tokens)
  return {"against": told | more._asdict()}


def _say(record, result, corpus, part, layers, config):
  """Prints a result and what it costs.

  Args:
    part: how many tokens of the split were read at most; 0 for all.
  """
  read = units.of(corpus)
  first = f"first {result.tokens + 1:,} {read.unit}s of " if part else ""
  console.say(
    f"step {record['step']}  {first}{record['split']} of {corpus.name}, "
    f"{record['protocol']}: {read.full(result.bits, result.stderr)}, "
    f"{result.tokens:,} {read.unit}s, {result.tokens_per_second:,.0f} tokens/s"
  )
  if "against" in record:
    other = record["against"]
    console.say(
      f"against step {other['step']} of {other['workdir']}, "
      f"{other['protocol']}: {other['bits']:+.4f} +- {other['stderr']:.4f} "
      f"{read.name}, token by token"
    )
  found = accounting.attention_choice(config)
  macs = record["attention_macs_per_token"]
  console.say(f"attention: {console.macs_text(macs, found)}")
  console.say(f"cache: {console.cache_text(layers, config)}")
