"""Generation: a prompt in one pass, then token by token out of what heads see.

After training spans and waves are numbers, so that the shape of the cache is
theirs: see `attention.decode`. Every next-token distribution is that of a full
forward pass.
"""

import codecs
import dataclasses
import functools
import math
import os
import pathlib
import re
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adaptive_attention import accounting, checkpoint, logbook
from adaptive_attention.attention import decode
from adaptive_attention.model import (
  ModelConfig,
  Transformer,
  init_memory,
  mask_params,
)
from adaptive_attention.settings import SettingsError

CACHES = ("spans", "dense")
BYTES = 256  # tokens below are bytes
_CHUNK = 64  # tokens that one call makes at most, between prints


class GenerationError(Exception):
  """A prompt that cannot be used."""


@flax.struct.dataclass
class Cache:
  """What all heads can still see of B sequences of one length.

  `prefill` makes one, `step` goes on by a token; it is a pytree.

  Attributes:
    by_layer: the `decode.Rings` of each layer.
    tokens_read: uint32, the position of the next token.
    config: static; the model's.
  """

  by_layer: tuple[decode.Rings, ...]
  tokens_read: jax.Array
  config: ModelConfig = flax.struct.field(pytree_node=False)

  @classmethod
  def prefill(cls, params, config: ModelConfig, prompt_BT, cache="spans"):
    """(logits_BV of the token after the prompt, the cache), in one pass.

    Args:
      params: concrete, as the sizes of the rings follow from the spans.
      prompt_BT: B prompts of one length, at least 1.
      cache: "spans", rings as long as each head's span, or "dense", all as long
        as any head could look.

    Raises:
      ValueError: prompts that are empty, not alike or no tokens of the model,
        another kind of cache, or a prompt longer than positions were learned
        for.
    """
    prompt_BT = _prompt(prompt_BT, config)
    return _prefill(params, prompt_BT, config, groups(params, config, cache))

  def step(self, params, tokens_B):
    """(logits_BV of the token after these, the cache with them in it).

    Raises:
      ValueError: tokens that are none of the model, or a position beyond the
        learned ones; where that is traced logits are nan there.
    """
    tokens_B = _tokens(tokens_B, self.config)
    if tokens_B.ndim != 1:
      raise ValueError(
        f"tokens of the shape {tokens_B.shape} are not one of each sequence; "
        "give (B,)"
      )
    logits_BTV, cache = Transformer(self.config).apply(
      {"params": params}, tokens_B[:, None], memory=self
    )
    return logits_BTV[:, 0], cache

  @property
  def nbytes(self) -> int:
    """Of all keys and values."""
    return sum(layer.nbytes for layer in self.by_layer)

  def check(self, T: int):
    if T != 1:
      raise ValueError(
        f"a cache goes on by one token a call, not {T}; fill it by prefill"
      )

  def layers(self, batch):
    if isinstance(batch, jax.core.Tracer) or batch:
      raise ValueError(
        f"batch={batch} names no part of a cache, which is of one batch; leave "
        "it out"
      )
    return [
      decode.LayerCache(rings, self.tokens_read) for rings in self.by_layer
    ]

  def after(self, by_layer, T: int) -> "Cache":
    return self.replace(
      by_layer=tuple(by_layer), tokens_read=self.tokens_read + jnp.uint32(T)
    )


def _tokens(tokens, config):
  """The tokens as an array, of integers that the model has vectors of.

  Raises:
    ValueError: they are none; where they are traced only the type is known.
  """
  tokens = jnp.asarray(tokens)
  if not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(
      f"tokens of the type {tokens.dtype} are no integers; give the number of "
      "each token"
    )
  if not isinstance(tokens, jax.core.Tracer):
    V, known = config.vocab_size, np.asarray(tokens)
    for token in known[(known < 0) | (known >= V)][:1]:
      raise ValueError(
        f"the token {token} is none of model.vocab_size={V}; give tokens from "
        f"0 to {V - 1}"
      )
  return tokens


def _prompt(prompt_BT, config):
  """Prompts as an array (B, T) of the model's tokens, T at least 1."""
  shape = np.shape(prompt_BT)
  if len(shape) != 2:
    raise ValueError(
      f"prompts of the shape {shape} are no batch of one length; give (B, T)"
    )
  if not shape[1]:
    raise ValueError("the prompt is empty; give at least one token")
  return _tokens(prompt_BT, config)


def _slides(config):
  return config.position == "learned"


def groups(params, config: ModelConfig, cache="spans"):
  """The groups of rings of each layer."""
  match cache:
    case "spans":
      return tuple(
        decode.groups_of(jax.tree.map(np.asarray, mask), config.cache_tokens)
        for mask in mask_params(params, config)
      )
    case "dense":
      dense = decode.dense_groups(config.n_head, config.cache_tokens)
      return (dense,) * config.n_layer
    case _:
      raise ValueError(f"cache={cache!r} is unknown; choose one of {CACHES}")


@functools.partial(jax.jit, static_argnames=("config", "groups"))
def _prefill(params, prompt_BT, config, groups):
  B, T = prompt_BT.shape
  # Rings of one segment: all keys and values of the prompt, in order.
  memory = init_memory(dataclasses.replace(config, memory_tokens=0), B, T)
  logits_BTV, memory = Transformer(config).apply(
    {"params": params}, prompt_BT, memory=memory
  )
  by_layer = tuple(
    decode.filled(mask, of_layer, k, v)
    for mask, of_layer, k, v in zip(
      mask_params(params, config), groups, memory.k, memory.v, strict=True
    )
  )
  return logits_BTV[:, -1], Cache(by_layer, jnp.uint32(T), config)


def sample(logits_BV, key_B, temperature, top_k, top_p):
  """(B,) tokens drawn from softmax(logits / temperature), cut to the likeliest.

  Args:
    key_B: a key for each row, so that a row does not depend on the others.
    temperature: 0 for the likeliest token.
    top_k: how many of the likeliest tokens may be drawn; 0 for all.
    top_p: the fewest likeliest tokens of so much probability may be drawn; of
      equal ones the lower numbers come first.
  """
  V = logits_BV.shape[-1]
  scaled_BV = logits_BV / jnp.where(temperature > 0, temperature, 1.0)
  order_BV = jnp.argsort(-scaled_BV, axis=-1, stable=True)
  sorted_BV = jnp.take_along_axis(scaled_BV, order_BV, axis=-1)
  share_BV = jax.nn.softmax(sorted_BV, axis=-1)
  before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV
  rank_1V = jnp.arange(V)[None]
  kept_BV = (before_BV < top_p) & (rank_1V < jnp.where(top_k > 0, top_k, V))
  kept_BV &= (rank_1V == 0) | (temperature > 0)
  kept_BV |= rank_1V == 0
  rank_B = jax.vmap(jax.random.categorical)(
    key_B, jnp.where(kept_BV, sorted_BV, -jnp.inf)
  )
  return jnp.take_along_axis(order_BV, rank_B[:, None], axis=-1)[:, 0]


@functools.partial(
  jax.jit, donate_argnames=("cache",), static_argnames=("draw_below",)
)
def go_on(
  params, cache, logits_BV, key_B, first, count, sampling, draw_below=None
):
  """(tokens (B, _CHUNK), logits_BV, cache) after `count` more tokens.

  One loop on the device; the first of them is the token number `first` of its
  text, which is what it is drawn by. See `generate` for `draw_below`.
  """
  B = len(logits_BV)

  def one(i, carry):
    tokens, logits_BV, cache = carry
    own_B = jax.vmap(lambda key: jax.random.fold_in(key, first + i))(key_B)
    tokens_B = sample(logits_BV[:, :draw_below], own_B, *sampling)
    tokens_B = tokens_B.astype(jnp.int32)
    logits_BV, cache = step(tokens_B, logits_BV, cache)
    return tokens.at[:, i].set(tokens_B), logits_BV, cache

  def step(tokens_B, logits_BV, cache):
    if not _slides(cache.config):
      return cache.step(params, tokens_B)
    # The token after a full context has no position in it.
    return lax.cond(
      cache.tokens_read < cache.config.context_tokens,
      lambda: cache.step(params, tokens_B),
      lambda: (logits_BV, cache),
    )

  start = (jnp.zeros((B, _CHUNK), jnp.int32), logits_BV, cache)
  return lax.fori_loop(0, count, one, start)


def generate(
  params,
  config: ModelConfig,
  prompt_BT,
  steps: int,
  key,
  *,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  cache: str = "spans",
  draw_below: int | None = None,
  on_tokens=None,
) -> np.ndarray:
  """(B, steps) tokens that go on from B prompts of one length.

  Row b of any batch is drawn with its own key, fold_in(key, b), a token with
  its place in the text: a text that is cut anywhere and gone on with from there
  is the same. With rotary or relative positions there is no longest text. With
  learned ones the context slides: where it is full its later half is read anew
  as a prompt, at places that are the same for all texts.

  Args:
    params: the model's, concrete.
    temperature, top_k, top_p: see `sample`.
    cache: see `Cache.prefill`.
    draw_below: only tokens below it are drawn, as `BYTES` for a text; None for
      any token of the model.
    on_tokens: called with each (B, n) new tokens as they come.

  Raises:
    ValueError: arguments out of bounds.
  """
  check_sampling(temperature, top_k, top_p)
  for name, value, least in (
    ("steps", steps, 0),
    ("draw_below", draw_below, 1),
  ):
    if value is not None and value < least:
      raise ValueError(
        f"{name}={value} is not possible; expected {least} or more"
      )
  sampling = (jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))
  text_BT = np.asarray(_prompt(prompt_BT, config))
  B, prompt_length = text_BT.shape
  key_B = jax.vmap(lambda b: jax.random.fold_in(key, b))(jnp.arange(B))
  made = 0
  while made < steps:
    window_BT, room = _window(config, text_BT, steps - made)
    logits_BV, kept = Cache.prefill(params, config, window_BT, cache)
    while room:
      count = min(room, _CHUNK)
      tokens, logits_BV, kept = go_on(
        *(params, kept, logits_BV, key_B, prompt_length + made, count),
        sampling,
        draw_below,
      )
      new_BT = np.asarray(tokens)[:, :count]
      text_BT = np.concatenate([text_BT, new_BT], axis=1)
      made, room = made + count, room - count
      if on_tokens:
        on_tokens(new_BT)
  return text_BT[:, prompt_length:]


def _window(config, text_BT, steps):
  """What to read as a prompt, and how many tokens can follow it.

  Where the window starts is a function of the length of the text alone.
  """
  if not _slides(config):
    return text_BT, steps
  N, length = config.context_tokens, text_BT.shape[1]
  # The last token of a full context is followed by one more.
  hop = N + 1 - max(1, N // 2)
  start = max(0, -(-(length - N) // hop) * hop)
  return text_BT[:, start:], min(steps, start + N - length + 1)


def check_sampling(temperature, top_k, top_p):
  """That they can be drawn with.

  Raises:
    SettingsError: naming the one that cannot.
  """
  if not 0 <= temperature < math.inf:
    raise SettingsError(
      f"temperature={temperature} is not possible; expected 0 or more, finite"
    )
  if top_k < 0:
    raise SettingsError(f"top_k={top_k} is not possible; expected 0 or more")
  if not 0 < top_p <= 1:
    raise SettingsError(
      f"top_p={top_p} is not possible; expected more than 0, up to 1"
    )


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class _Text:
  """Bytes as text that a terminal can show, as they come.

  Bytes that are not UTF-8 and control characters, but for newline and tab, are
  written as \\xNN.
  """

  def __init__(self):
    make = codecs.getincrementaldecoder("utf-8")
    self._decoder = make(errors="backslashreplace")

  def __call__(self, tokens, last=False) -> str:
    for token in tokens[(tokens < 0) | (tokens >= BYTES)][:1]:
      raise ValueError(
        f"the token {token} is no byte; expected 0 to {BYTES - 1}, which "
        f"generate(draw_below={BYTES}) draws alone"
      )
    text = self._decoder.decode(bytes(tokens.astype(np.uint8)), last)
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def text_of(tokens) -> str:
  """All of some tokens as text that a terminal can show.

  Raises:
    ValueError: a token that is no byte.
  """
  return _Text()(np.asarray(tokens), last=True)


def read_prompt(prompt, prompt_file) -> np.ndarray:
  """(T,) the bytes to go on from.

  Raises:
    SettingsError: both were given, or neither.
    GenerationError: a file that cannot be read, or an empty prompt.
  """
  if (prompt is None) == (prompt_file is None):
    raise SettingsError(
      "--mode=sample needs one of --prompt=TEXT and --prompt_file=FILE"
    )
  if prompt is not None:
    # The bytes that were typed, whether or not they are UTF-8.
    data, source = os.fsencode(prompt), "--prompt"
  else:
    source = f"--prompt_file={prompt_file}"
    try:
      data = pathlib.Path(prompt_file).read_bytes()
    except OSError as error:
      raise GenerationError(
        f"{source} cannot be read ({error.strerror}); give a file"
      ) from error
  if not data:
    raise GenerationError(f"{source} is empty; give at least one byte")
  return np.frombuffer(data, np.uint8)


def run(
  config,
  workdir,
  *,
  step,
  prompt,
  tokens,
  temperature,
  top_k,
  top_p,
  num,
  seed,
):
  """Prints texts that a checkpoint writes, the first as it comes; sample.txt.

  Args:
    config: the checkpoint's settings.
    workdir, step: the run's folder and the checkpoint.
    prompt: (T,) bytes.
    tokens, num: how many bytes to write, and how many texts side by side.
    temperature, top_k, top_p: see `sample`.
    seed: text b of the same seed is the same for any number of them.
  """
  model_config = ModelConfig(**config.model)
  check_sampling(temperature, top_k, top_p)
  with checkpoint.Checkpoints(workdir) as checkpoints:
    params, _ = checkpoints.restore_params(step)
  params = jax.device_put(params)
  if _slides(model_config) and len(prompt) + tokens > (
    model_config.context_tokens + 1
  ):
    logbook.say(
      f"positions were learned for {model_config.context_tokens} tokens: the "
      "context slides, its later half being read anew where it is full"
    )
  first = _Text()

  def show(new_BT):
    logbook.write_out(first(new_BT[0]))

  logbook.write_out(text_of(prompt))
  began = time.perf_counter()
  made_BT = generate(
    params,
    model_config,
    np.tile(prompt, (num, 1)),
    tokens,
    jax.random.key(seed),
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    draw_below=BYTES,
    on_tokens=show,
  )
  seconds = time.perf_counter() - began
  texts = [text_of(np.concatenate([prompt, row])) for row in made_BT]
  path = pathlib.Path(workdir) / "sample.txt"
  try:  # told first, and kept even if nobody reads it
    logbook.write_out(first(made_BT[0, :0], last=True) + "\n")
    for i, text in enumerate(texts[1:], start=1):
      logbook.say(f"\n--- {i + 1} of {num}\n{text}")
    layers = mask_params(params, model_config)
    logbook.say(
      f"{num} x {tokens} bytes in {seconds:.1f} s, compilation included"
    )
    logbook.say(f"cache: {accounting.cache_text(layers, model_config)}")
  finally:
    logbook.write_text(
      path,
      "\n".join(
        f"--- {i + 1} of {num}, step {step}\n{text}"
        for i, text in enumerate(texts)
      )
      + "\n",
    )
  logbook.say(f"written to {path}")
