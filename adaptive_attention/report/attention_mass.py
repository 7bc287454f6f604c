"""What heads attend to in real text: attention weights against distance.

Weights are computed head by head, for a block of queries at a time, so that
nothing of T x T is held for all heads.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from adaptive_attention import masks
from adaptive_attention.attention import attend, reference
from adaptive_attention.config import ModelConfig
from adaptive_attention.model import Transformer
from adaptive_attention.report import runs, style
from adaptive_attention.report.style import Figure
from adaptive_attention.state import State

_BLOCK = 64  # queries at a time
_BINS = 48  # of the distances in a figure


class Mass(NamedTuple):
  """Mean attention weights of each layer and head, on some text.

  Attributes:
    by_distance_LHS: of the distance S, over the later half of the queries; a
      head's sum is 1, unless a query is left without an open key.
    last_LHS: of the last query, over the keys from the first to the last.
    tokens: of how many tokens.
  """

  by_distance_LHS: np.ndarray
  last_LHS: np.ndarray
  tokens: int


class Watched(flax.struct.PyTreeNode):
  """A layer's state that records attention weights, and holds no keys.

  It serves one call, of a whole sequence.

  Attributes:
    by_distance_HS, last_HS: as in `Mass`, of one layer.
  """

  by_distance_HS: jax.Array
  last_HS: jax.Array

  def attend(
    self,
    q_BTHK,
    k_BTGK,
    v_BTGK,
    mask,
    *,
    tokens_read,
    relative_RK=None,
    **options,
  ):
    """Attends plainly; see `state.LayerState`."""
    del tokens_read
    T = q_BTHK.shape[1]
    out_BTHK = attend(
      *(q_BTHK, k_BTGK, v_BTGK, mask), relative_RK=relative_RK, **options
    )
    H = q_BTHK.shape[2]
    bias_HS = jnp.zeros((H, T))
    if mask is not None:
      bias_HS = masks.log_weight(mask, jnp.arange(T))
    k_BTHK = jnp.repeat(k_BTGK, H // k_BTGK.shape[2], axis=2)

    def of_head(of_head):
      q_BTK, k_BTK, bias_S = of_head
      found = [
        _of_sequence(q_TK, k_TK, bias_S, relative_RK)
        for q_TK, k_TK in zip(q_BTK, k_BTK, strict=True)
      ]
      return jax.tree.map(lambda *x: sum(x) / len(x), *found)

    by_head = (q_BTHK, k_BTHK)
    by_head = [jnp.moveaxis(x.astype(jnp.float32), 2, 0) for x in by_head]
    return out_BTHK, Watched(*jax.lax.map(of_head, (*by_head, bias_HS)))


def _of_sequence(q_TK, k_TK, bias_S, relative_RK):
  """Returns (mass by distance, weights of the last query) of one head."""
  T, K = q_TK.shape
  blocks = -(-T // _BLOCK)
  q_TK = jnp.pad(q_TK, ((0, blocks * _BLOCK - T), (0, 0)))
  key_S = jnp.arange(T)

  def of_block(mass_S, start):
    query_Y = start + jnp.arange(_BLOCK)
    distance_YS = query_Y[:, None] - key_S
    q_YK = jax.lax.dynamic_slice_in_dim(q_TK, start, _BLOCK)
    logits_YS = q_YK @ k_TK.T
    at_YS = jnp.clip(distance_YS, 0, T - 1)
    if relative_RK is not None:
      q_BTHK = q_YK[None, :, None]
      found_BHYS = reference.of_distances(q_BTHK, relative_RK, distance_YS)
      logits_YS += found_BHYS[0, 0]
    logits_YS = logits_YS / math.sqrt(K) + bias_S[at_YS]
    logits_YS = jnp.where(distance_YS >= 0, logits_YS, -jnp.inf)
    weights_YS = reference.softmax(logits_YS)
    counted = (query_Y >= T // 2) & (query_Y < T)
    counted_YS = jnp.where(counted[:, None], weights_YS, 0.0)
    mass_S = mass_S.at[at_YS].add(counted_YS)
    return mass_S, weights_YS

  starts = jnp.arange(blocks) * _BLOCK
  mass_S, weights_NYS = jax.lax.scan(of_block, jnp.zeros(T), starts)
  return mass_S / (T - T // 2), weights_NYS[-1, T - 1 - starts[-1]]


def measure(
  params: Mapping[str, Any], config: ModelConfig, data: np.ndarray
) -> Mass:
  """Returns the mean weights over the sequences of a text.

  Args:
    params, config: the model. A sequence is as long as its context and memory.
    data: tokens, of which whole sequences are read; at least one.
  """
  T = min(config.max_context_tokens, len(data))
  empty = Watched(jnp.zeros((config.n_head, T)), jnp.zeros((config.n_head, T)))
  state = State((empty,) * config.n_layer, np.uint32(0))
  model = Transformer(config)

  @jax.jit
  def read(params, tokens_1T):
    return model.apply({"params": params}, tokens_1T, state=state)[1].layers

  starts = range(0, len(data) - T + 1, T)
  total = None
  for start in starts:
    tokens = np.asarray(data[start : start + T], np.int32)[None]
    found = jax.device_get(read(params, tokens))
    total = found if total is None else jax.tree.map(np.add, total, found)
  by_distance, last = (
    np.stack([getattr(layer, name) for layer in total]) / len(starts)
    for name in ("by_distance_HS", "last_HS")
  )
  return Mass(by_distance, last, len(starts) * T)


def figures(run: runs.Run, mass: Mass, split: str) -> Sequence[Figure]:
  """Draws the mass against distance, and the last query's weights."""
  return [_by_distance(run, mass, split), _last(run, mass, split)]


def _by_distance(run, mass, split):
  L, H, S = mass.by_distance_LHS.shape
  drawn, grid = style.small_multiples(L, H)
  edges = np.unique(np.linspace(0, S, min(_BINS, S) + 1).astype(int))
  bound = np.zeros((L, H))
  for (i, h), ax in np.ndenumerate(grid):
    mass_S = mass.by_distance_LHS[i, h]
    share = np.add.reduceat(mass_S, edges[:-1])
    ax.stairs(np.maximum(share, 1e-6), edges, color=style.OPEN, fill=True)
    span, ramp = float(run.layers[i].span[h]), run.config.ramp
    bound[i, h] = mass_S[int(np.ceil(span)) :].sum()
    for x in (span, span + ramp):
      if run.config.attention != "dense" and x < S:
        ax.axvline(x, color="#D55E00", lw=0.8)
    ax.set(yscale="log", ylim=(1e-4, 1))
  i, h = np.unravel_index(np.argmax(bound), bound.shape)
  told = (
    f"in the ramp, beyond its span, head {i}.{h} has the most of its weight: "
    f"{bound[i, h]:.1%}"
  )
  return Figure(
    "mass",
    f"What the heads of {run.label} attend to",
    "The mean attention weight softmax(q k / sqrt(K) + log m + log w) of the "
    "later half of the queries, summed over bins of the distance in tokens, on "
    f"a logarithmic scale, over {mass.tokens:,} tokens of the {split} split. A "
    "head's sum is 1. The lines are z and z + R; weight near them means that "
    f"the span binds. Here {told}.",
    f"{L} by {H} small panels of attention weight against distance; {told}.",
    drawn,
  )


def _last(run, mass, split):
  from matplotlib.colors import LogNorm

  L, H, S = mass.last_LHS.shape
  drawn, ((ax,),) = style.axes(width=8, height=1.2 + 0.09 * L * H)
  rows = np.maximum(mass.last_LHS.reshape(L * H, S), 1e-6)
  image = ax.imshow(
    rows,
    norm=LogNorm(1e-4, 1),
    cmap=style.SEQUENTIAL,
    aspect="auto",
    interpolation="nearest",
  )
  ax.grid(False)
  ax.set_yticks([H * i for i in range(L)], [f"layer {i}" for i in range(L)])
  ax.set(xlabel="key s, tokens")
  drawn.colorbar(image, label="mean weight")
  return Figure(
    "last_query",
    "What the last query attends to",
    f"The mean attention weight of the last query of {S} tokens over all keys, "
    f"a row for each head, on a logarithmic scale, over {mass.tokens:,} tokens "
    f"of the {split} split.",
    f"A map of {L * H} heads by {S} keys.",
    drawn,
  )
