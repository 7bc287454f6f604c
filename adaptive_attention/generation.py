"""Generation: reads a prompt in one pass, then writes token by token.

After training spans and waves are numbers, and they give the KV cache its
shape: see `attention.decode`. Every next-token distribution is that of a full
forward pass.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adaptive_attention.config import ModelConfig
from adaptive_attention.kv_cache import cache_groups
from adaptive_attention.model import Transformer
from adaptive_attention.state import State, init_cache

BYTES = 256  # tokens below this number are bytes
_TOKENS_PER_CALL = 64  # the most that one call writes, between prints


def check_tokens(tokens: Any, config: ModelConfig) -> jax.Array:
  """Returns tokens as an array, after checking that the model knows them.

  Raises:
    ValueError: tokens that are not integers, or not in [0, vocab_size). Only
      the type of traced tokens can be checked.
  """
  tokens = jnp.asarray(tokens)
  if not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(
      f"tokens of the type {tokens.dtype} are not integers; give the number of "
      "each token"
    )
  if not isinstance(tokens, jax.core.Tracer):
    V, known = config.vocab_size, np.asarray(tokens)
    for token in known[(known < 0) | (known >= V)][:1]:
      raise ValueError(
        f"the token {token} is not one of model.vocab_size={V}; give tokens "
        f"from 0 to {V - 1}"
      )
  return tokens


def _prompt(prompt_BT, config: ModelConfig) -> jax.Array:
  """Returns prompts as an array (B, T), after checking tokens and T >= 1."""
  shape = np.shape(prompt_BT)
  if len(shape) != 2:
    raise ValueError(
      f"prompts of the shape {shape} are not a batch of one length; give (B, T)"
    )
  if not shape[1]:
    raise ValueError("the prompt is empty; give at least one token")
  return check_tokens(prompt_BT, config)


def slides(config: ModelConfig) -> bool:
  """Returns whether there is a longest context, which slides along a text."""
  return config.learns_positions


def prefill(
  params: Mapping, config: ModelConfig, prompt_BT: Any, cache: str = "spans"
) -> tuple[jax.Array, State]:
  """Returns (logits_BV of the token after a prompt, the KV cache), in one pass.

  Args:
    params: concrete, as the sizes of the cache follow from the spans.
    prompt_BT: B prompts of one length, at least 1.
    cache: as in `kv_cache.cache_groups`.

  Raises:
    ValueError: prompts that are empty, not (B, T) or not tokens of the model,
      an unknown kind of cache, or more tokens than learned positions.
  """
  prompt_BT = _prompt(prompt_BT, config)
  return _prefill(
    params, prompt_BT, config, cache_groups(params, config, cache)
  )


@functools.partial(jax.jit, static_argnames=("config", "groups"))
def _prefill(params, prompt_BT, config, groups):
  empty = init_cache(params, config, len(prompt_BT), groups=groups)
  called: Any = Transformer(config).apply(
    {"params": params}, prompt_BT, state=empty
  )
  logits_BTV, state = called
  return logits_BTV[:, -1], state


def sample(
  logits_BV: jax.Array,
  key_B: jax.Array,
  temperature: Any,
  top_k: Any,
  top_p: Any,
) -> jax.Array:
  """Returns (B,) tokens drawn from softmax(logits / temperature).

  Only tokens that both `top_k` and `top_p` allow are drawn. Of equally likely
  tokens the lower numbers come first.

  Args:
    key_B: a key for each row, so that a row does not depend on the others.
    temperature: 0 for the likeliest token.
    top_k: how many of the likeliest tokens are allowed; 0 for all.
    top_p: allows the fewest likeliest tokens whose probabilities sum up to it.
  """
  V = logits_BV.shape[-1]
  scaled_BV = logits_BV / jnp.where(temperature > 0, temperature, 1.0)
  order_BV = jnp.argsort(-scaled_BV, axis=-1, stable=True)
  sorted_BV = jnp.take_along_axis(scaled_BV, order_BV, axis=-1)
  share_BV = jax.nn.softmax(sorted_BV, axis=-1)
  before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV
  rank_1V = jnp.arange(V, dtype=jnp.int32)[None]
  kept_BV = (before_BV < top_p) & (rank_1V < jnp.where(top_k > 0, top_k, V))
  kept_BV &= (rank_1V == 0) | (temperature > 0)
  kept_BV |= rank_1V == 0
  rank_B = jax.vmap(jax.random.categorical)(
    key_B, jnp.where(kept_BV, sorted_BV, -jnp.inf)
  )
  return jnp.take_along_axis(order_BV, rank_B[:, None], axis=-1)[:, 0]


@functools.partial(
  jax.jit,
  donate_argnames=("state",),
  static_argnames=("config", "draw_below"),
)
def go_on(
  params: Mapping,
  config: ModelConfig,
  state: State,
  logits_BV: jax.Array,
  key_B: jax.Array,
  first: Any,
  count: Any,
  sampling: tuple[Any, Any, Any],
  draw_below: int | None = None,
) -> tuple[jax.Array, jax.Array, State]:
  """Returns (tokens, logits_BV, state) after `count` more tokens.

  They are written in one loop on the device, into the first `count` columns of
  tokens (B, _TOKENS_PER_CALL). The first of them is token number `first` of its
  text, and each is drawn by the key of its number. See `generate` for
  `draw_below`.
  """
  B = len(logits_BV)

  def one(i, carry):
    tokens, logits_BV, state = carry
    own_B = jax.vmap(lambda key: jax.random.fold_in(key, first + i))(key_B)
    tokens_B = sample(logits_BV[:, :draw_below], own_B, *sampling)
    tokens_B = tokens_B.astype(jnp.int32)
    logits_BV, state = written(tokens_B, logits_BV, state)
    return tokens.at[:, i].set(tokens_B), logits_BV, state

  def written(tokens_B, logits_BV, state):
    if not slides(config):
      return step(params, config, tokens_B, state)
    # The token after a full context has no position in it.
    return lax.cond(
      state.tokens_read < config.context_tokens,
      lambda: step(params, config, tokens_B, state),
      lambda: (logits_BV, state),
    )

  start = (jnp.zeros((B, _TOKENS_PER_CALL), jnp.int32), logits_BV, state)
  return lax.fori_loop(0, count, one, start)


def step(
  params: Mapping, config: ModelConfig, tokens_B: Any, state: State
) -> tuple[jax.Array, State]:
  """Returns (logits_BV of the token after these, the state with these).

  Args:
    tokens_B: the next token of each sequence.
    state: of the B sequences; see `state.init_cache`.

  Raises:
    ValueError: tokens that are not (B,) or not of the model, or a position
      beyond the learned ones. Where the position is traced, the logits are nan.
  """
  tokens_B = check_tokens(tokens_B, config)
  if tokens_B.ndim != 1:
    raise ValueError(
      f"tokens of the shape {tokens_B.shape} are not one of each sequence; "
      "give (B,)"
    )
  called: Any = Transformer(config).apply(
    {"params": params}, tokens_B[:, None], state=state
  )
  logits_BTV, state = called
  return logits_BTV[:, 0], state


def generate(
  params: Mapping,
  config: ModelConfig,
  prompt_BT: Any,
  steps: int,
  key: jax.Array,
  *,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  cache: str = "spans",
  draw_below: int | None = None,
  on_tokens: Callable[[np.ndarray], None] | None = None,
) -> np.ndarray:
  """Returns (B, steps) tokens that follow B prompts of one length.

  Each is drawn from softmax(logits / temperature) over the tokens that `top_k`
  (Fan et al. 2018) and `top_p` (Holtzman et al. 2020) allow; the logits (B, V)
  are those of a full forward pass over what comes before. Token n of row b is
  drawn by fold_in(fold_in(key, b), n), counted from the start of its text: a
  text that is cut anywhere goes on the same. A full context of learned
  positions slides: its later half is read again, at places alike for all texts.

  Args:
    params, config: a model's parameters, concrete, and its ModelConfig.
    prompt_BT: integers in [0, V), concrete; T is at least 1.
    steps, key: how many tokens to draw, 0 or more; the key of all draws.
    temperature: 0 or more, finite; at 0 the likeliest token is taken.
    top_k: how many of the likeliest tokens are allowed, 0 for all.
    top_p: in (0, 1]; allows the fewest likeliest tokens that sum up to it.
    cache: "spans" for a ring as long as each head's reach, or "dense".
    draw_below: 1 or more; only tokens below it are drawn, as `BYTES` for text.
    on_tokens: called with each (B, n) new tokens as they come.

  Raises:
    ValueError: prompts that are empty, not (B, T) or not tokens of the model,
      or another argument out of the bounds above.
  """
  check_sampling(temperature, top_k, top_p)
  _check_counts(steps, draw_below)
  sampling = (jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))
  text_BT = np.asarray(_prompt(prompt_BT, config))
  B, T = text_BT.shape
  key_B = jax.vmap(lambda b: jax.random.fold_in(key, b))(jnp.arange(B))
  settings = params, config, cache, sampling, draw_below
  for new_BT in _new_tokens(settings, text_BT, steps, key_B):
    text_BT = np.concatenate([text_BT, new_BT], axis=1)
    if on_tokens:
      on_tokens(new_BT)
  return text_BT[:, T:]


def _new_tokens(settings, text_BT, steps, key_B) -> Iterator[np.ndarray]:
  """Yields (B, n) the next tokens of texts, until `steps` are written."""
  params, config, cache, sampling, draw_below = settings
  end, room = text_BT.shape[1] + steps, 0  # `room` can follow the context
  while (length := text_BT.shape[1]) < end:
    if not room:
      context_BT, room = _context(config, text_BT, end - length)
      logits_BV, state = prefill(params, config, context_BT, cache)
    count = min(room, _TOKENS_PER_CALL)
    args = params, config, state, logits_BV, key_B, length, count
    tokens, logits_BV, state = go_on(*args, sampling, draw_below)
    new_BT, room = np.asarray(tokens)[:, :count], room - count
    text_BT = np.concatenate([text_BT, new_BT], axis=1)
    yield new_BT


def _check_counts(steps: int, draw_below: int | None) -> None:
  if steps < 0:
    raise ValueError(f"steps={steps} is not possible; expected 0 or more")
  if draw_below is not None and draw_below < 1:
    raise ValueError(
      f"draw_below={draw_below} is not possible; expected 1 or more"
    )


def _context(config, text_BT, steps):
  """Returns (the tokens to read as a prompt, how many can follow them).

  Where these tokens begin depends on the length of the text alone.
  """
  if not slides(config):
    return text_BT, steps
  N, length = config.context_tokens, text_BT.shape[1]
  # The last token of a full context is followed by one more.
  hop = N + 1 - max(1, N // 2)
  start = max(0, -(-(length - N) // hop) * hop)
  return text_BT[:, start:], min(steps, start + N - length + 1)


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
  """Checks the arguments of `sample`.

  Raises:
    ValueError: an argument out of its bounds.
  """
  if not 0 <= temperature < math.inf:
    raise ValueError(
      f"temperature={temperature} is not possible; expected 0 or more, finite"
    )
  if top_k < 0:
    raise ValueError(f"top_k={top_k} is not possible; expected 0 or more")
  if not 0 < top_p <= 1:
    raise ValueError(
      f"top_p={top_p} is not possible; expected more than 0, up to 1"
    )
