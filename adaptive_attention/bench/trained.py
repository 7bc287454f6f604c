"""The cases of a trained run: its layers, training, evaluation and generation.

The model is timed beside one of the same sizes without masks. The time of a
dense model does not depend on its parameters, which may be any.
"""

import dataclasses

import flax.traverse_util
import jax
import numpy as np

from adaptive_attention.bench.cases import Case
from adaptive_attention.config import ModelConfig
from adaptive_attention.fitted import shapes_of
from adaptive_attention.mask_parameters import mask_params
from adaptive_attention.masks import Mask

_LONG_MEMORY = 4096
_PASS_TOKENS = 4096  # of a training step, and of an evaluation, at least


@dataclasses.dataclass(frozen=True)
class Pass:
  """A training step, or the evaluation of as many tokens.

  Attributes:
    B: how many sequences of a context.
    trains: whether it is a training step.
    runs: name -> (parameters, settings of the model).
  """

  name: str
  B: int
  trains: bool
  runs: dict


@dataclasses.dataclass(frozen=True)
class Writing:
  """Generation by a trained model, B texts at once.

  Attributes:
    params, config: the model.
    runs: name -> (tokens of a memory beyond the context, kind of cache). The
      next token comes after so many that the cache is full.
  """

  name: str
  B: int
  params: dict
  config: ModelConfig
  runs: dict


def of_run(step: int, params, config: ModelConfig, context: int = 0) -> list:
  """Returns the cases of a run: attention of its layers, passes and writing.

  Args:
    step: that of the checkpoint, which is in the names.
    params, config: the model.
    context: the tokens of a context that it is stretched to; 0 for its own.
  """
  name = f"step {step}"
  if context:
    params, config = stretched(params, config, context)
    name += f" at {context}"
  return [
    *layers(name, params, config),
    *passes(name, params, config),
    *texts(name, params, config),
  ]


def layers(name: str, params, config: ModelConfig) -> list[Case]:
  """Returns a call of attention for each layer, under its own mask."""
  return [
    case_of_mask(
      f"layer {i} of {name}",
      config.context_tokens,
      mask,
      H=config.n_head,
      K=config.width // config.n_head,
    )
    for i, mask in enumerate(mask_params(params, config))
  ]


def case_of_mask(name: str, T: int, mask: Mask | None, *, H: int, K: int):
  """Returns the case of plain attention over T tokens under a given mask."""
  case = Case(name, T, T, H=H, K=K)
  if mask is None:
    return case
  case = case._replace(span=_numbers(mask.span), ramp=mask.ramp)
  if mask.wave is None:
    return case
  return case._replace(
    period=_numbers(mask.wave.period),
    ratio=_numbers(mask.wave.ratio),
    harmonics=mask.wave.harmonics,
    integer=mask.wave.integer,
  )


def _numbers(values_H) -> tuple[float, ...]:
  return tuple(np.asarray(values_H, np.float32).tolist())


def passes(name: str, params, config: ModelConfig) -> list[Pass]:
  """Returns a training step and an evaluation, with masks and without."""
  dense = dataclasses.replace(config, attention="dense")
  runs = {"dense": (_like(params, dense), dense)}
  if config.attention != "dense":
    runs["masks"] = params, config
  B = max(_PASS_TOKENS // config.context_tokens, jax.local_device_count())
  return [
    Pass(f"{work}, {name}", B, work == "training", runs)
    for work in ("training", "evaluation")
  ]


def texts(name: str, params, config: ModelConfig) -> list[Writing]:
  """Returns the cases of generation by a model, one text and eight at once.

  A model with spans is timed with their KV cache and with a dense one, of the
  same length for any text. One without is timed at the length of its context
  and, unless its positions are learned, of 4,096 tokens more.
  """
  runs = {"spans": (0, "spans"), "dense": (0, "dense")}
  if config.attention == "dense":
    memories = (0,) if config.learns_positions else (0, _LONG_MEMORY)
    context = config.context_tokens
    runs = {f"dense {context + more}": (more, "dense") for more in memories}
  return [
    Writing(f"decode {B}, {name}", B, params, config, runs) for B in (1, 8)
  ]


def stretched(params, config: ModelConfig, T: int) -> tuple:
  """Returns (params, config) of a context of T tokens, with longer spans.

  They keep their share of the longest one, which grows with the context; ramp
  and waves stay. Parameters that belong to positions are zero.
  """
  max_span = max(1, config.max_span * T // config.context_tokens)
  config = dataclasses.replace(config, context_tokens=T, max_span=max_span)
  return _like(params, config), config


def _like(params, config: ModelConfig):
  """Returns the parameters of a model, those of other shapes as zeros."""
  found, flat = flax.traverse_util.flatten_dict(params, sep="/"), {}
  for path, shape in shapes_of(config).items():
    fits = path in found and found[path].shape == shape
    flat[path] = found[path] if fits else np.zeros(shape, np.float32)
  return flax.traverse_util.unflatten_dict(flat, sep="/")
