"""Exact counts: parameters, open pairs and multiply-adds.

Multiply-adds (MACs) per token of the whole model:

  L (4 D^2 + 2 D F) + D V + 2 K * (open pairs per token, summed over all heads)

the last term being attention's: one MAC per pair and head width for the score,
one for the value.
"""

import jax
import numpy as np

from adaptive_attention import masks
from adaptive_attention.attention import tiles
from adaptive_attention.model import ModelConfig


def parameter_count(params) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def open_pairs(mask: masks.Mask, T: int) -> np.ndarray:
  """(H,) integers: the pairs (t, s) of a sequence of T tokens that are open."""
  open_HT = np.asarray(masks.is_open(mask, np.arange(T)))
  # Distance d occurs T - d times.
  return open_HT.astype(np.int64) @ (T - np.arange(T, dtype=np.int64))


def computed_pairs(mask: masks.Mask, T: int, implementation: str):
  """(H,) integers: the pairs of a sequence of T tokens that are computed."""
  match implementation:
    case "reference":
      return np.full(len(mask.span), T * T, np.int64)
    case "blocked" | "auto":
      return np.asarray(tiles.touched(mask, T, T), np.int64) * tiles.TILE**2


def attention_macs_per_token(layers, config: ModelConfig, T: int) -> dict:
  """Multiply-adds per token of attention, over all layers and heads.

  Returns:
    dense: all causal pairs; open: those that the masks leave open; computed:
    those that the implementation computes.
  """
  macs_per_pair = 2 * config.width // config.n_head
  heads = config.n_layer * config.n_head
  pairs = {
    "dense": heads * T * (T + 1) // 2,
    "open": sum(open_pairs(mask, T).sum() for mask in layers),
    "computed": sum(
      computed_pairs(mask, T, config.implementation).sum() for mask in layers
    ),
  }
  return {name: float(macs_per_pair * n / T) for name, n in pairs.items()}


def macs_text(macs: dict) -> str:
  """What `attention_macs_per_token` gives, for a person to read."""
  counts = ", ".join(f"{name} {n:,.0f}" for name, n in macs.items())
  return f"multiply-adds a token: {counts}"


def train_flops_per_token(config: ModelConfig, T: int) -> float:
  """FLOPs per token of a training step with all causal pairs computed.

  Two per multiply-add, once forward and twice backward. What the masks save
  is not taken off: that is in `attention_macs_per_token`.
  """
  D, L, V = config.width, config.n_layer, config.vocab_size
  macs = L * (4 * D**2 + 2 * D * 4 * D) + D * V
  macs += 2 * D * L * (T + 1) / 2
  return 6 * macs
