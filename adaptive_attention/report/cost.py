"""What each layer costs: multiply-adds, milliseconds, and its KV cache."""

import dataclasses
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_attention import accounting
from adaptive_attention.attention import attend
from adaptive_attention.config import ModelConfig
from adaptive_attention.masks import Mask
from adaptive_attention.report import runs, style
from adaptive_attention.report.style import Figure

_TURNS = 5


class Layer(NamedTuple):
  """The costs of a layer, and of one without masks.

  Attributes:
    macs: multiply-adds per token of attention: dense, open, computed.
    milliseconds: of attention over a segment of one sequence, the median.
    cache_bytes, cache_reads: as in `accounting`, of this layer.
  """

  macs: dict[str, float]
  milliseconds: float
  cache_bytes: dict[str, int]
  cache_reads: dict[str, int]


def measure(run: runs.Run) -> tuple[list[Layer], float]:
  """Returns the costs of each layer, and the milliseconds of dense attention.

  Attention is timed alone, forward, on normal queries, keys and values of one
  sequence. All layers take turns, so that what else the machine does falls on
  all of them.
  """
  config = dataclasses.replace(run.config, n_layer=1)
  call, inputs = _call(config)
  T, M = config.context_tokens, config.memory_tokens
  whole = Mask(jnp.full(config.n_head, float(T + M)), config.ramp)
  seconds = _timed(call, inputs, [*run.layers, whole])
  layers = [
    Layer(
      accounting.attention_macs_per_token([mask], config, T, M),
      1e3 * taken,
      accounting.cache_bytes([mask], config),
      accounting.cache_reads([mask], config),
    )
    for mask, taken in zip(run.layers, seconds)
  ]
  return layers, 1e3 * seconds[-1]


def _call(config: ModelConfig):
  """Returns (compiled attention of a mask, its queries, keys and values)."""
  T, M = config.context_tokens, config.memory_tokens
  K = config.width // config.n_head
  random = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(random.normal(size=(1, n, heads, K)), config.compute_dtype)
    for n, heads in (
      (T, config.n_head),
      *((T + M, config.n_kv_head),) * 2,
    )
  )
  name = None if config.implementation == "auto" else config.implementation

  @jax.jit
  def call(q, k, v, mask):
    return attend(q, k, v, mask, memory=M, implementation=name)

  return call, (q, k, v)


def _timed(call, inputs, layers) -> list[float]:
  """Returns the median seconds of each mask, by turns."""
  jax.block_until_ready([call(*inputs, mask) for mask in layers])
  seconds = np.empty((_TURNS, len(layers)))
  for turn in seconds:
    for i, mask in enumerate(layers):
      start = time.perf_counter()
      jax.block_until_ready(call(*inputs, mask))
      turn[i] = time.perf_counter() - start
  return np.median(seconds, axis=0).tolist()


def _panels(layers: list[Layer], dense_ms: float):
  """Yields (title, for each layer its bars by name)."""

  def some(values, *names):
    return {name: values[name] for name in names}

  yield (
    "multiply-adds per token",
    [some(layer.macs, "dense", "open", "computed") for layer in layers],
  )
  yield (
    "attention, ms",
    [{"dense": dense_ms, "masked": layer.milliseconds} for layer in layers],
  )
  yield (
    "cache, bytes",
    [some(layer.cache_bytes, "dense", "reach", "head") for layer in layers],
  )
  yield (
    "keys read per token",
    [some(layer.cache_reads, "dense", "open", "cache") for layer in layers],
  )


def _bars(ax, title, parts):
  """Draws bars of some names for each layer."""
  from matplotlib.ticker import EngFormatter

  x, names = np.arange(len(parts)), list(parts[0])
  width = 0.8 / len(names)
  for i, name in enumerate(names):
    ax.bar(
      x + (i - (len(names) - 1) / 2) * width,
      [part[name] for part in parts],
      width,
      color="#999999" if name == "dense" else style.COLOURS[i - 1],
      label=name,
    )
  ax.set(title=title, xlabel="layer")
  ax.set_xticks(x)
  ax.set_ylim(top=1.35 * ax.get_ylim()[1])  # room for the legend
  ax.legend(fontsize=7, ncols=len(names), loc="upper center")
  if ax.get_ylim()[1] > 1_000:
    ax.yaxis.set_major_formatter(EngFormatter())


def figure(run: runs.Run, layers: list[Layer], dense_ms: float) -> Figure:
  """Draws the costs of all layers."""
  drawn, (row,) = style.axes(1, 4, width=11, height=2.6)
  for ax, panel in zip(row, _panels(layers, dense_ms), strict=True):
    _bars(ax, *panel)
  total = sum(layer.milliseconds for layer in layers)
  told = (
    f"{total:.2f} ms for attention in all layers, {dense_ms * len(layers):.2f} "
    "without masks"
  )
  T, M = run.config.context_tokens, run.config.memory_tokens
  return Figure(
    "cost",
    f"What the layers of {run.label} cost",
    "From the left: multiply-adds of attention per token, of all causal pairs, "
    "of the open ones, and of those that are computed; milliseconds of "
    f"attention alone, forward, over {T} tokens and a memory of {M}, the "
    f"median of {_TURNS} turns on this machine; bytes of the KV cache of a "
    "sequence, and keys read per token in generation: for the longest reach "
    "that a head could have (dense), for its own reach or its open keys, and "
    f"as its rings are made (head, cache). Together {told}.",
    f"Bars for each layer. {told}.",
    drawn,
  )
