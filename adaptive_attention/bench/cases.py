"""The named cases: calls of attention, training steps, and decoding.

`SHAPES`, `STEPS` and `DECODES` are timed. The tests also check every
implementation on `SHAPES`, made shorter, beside small cases of their own.
Lengths are in tokens.
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from adaptive_attention.attention import IMPLEMENTATIONS
from adaptive_attention.errors import Error
from adaptive_attention.masks import Mask, Wave

SEED = 0x9E3779B1  # in the upper half of 32 bits, where a signed integer fails


class BenchmarkError(Error):
  """A comparison cannot be made."""


class Case(NamedTuple):
  """One call of `attend`: B sequences, T queries, S keys, H heads of width K.

  Attributes:
    span, period, ratio: a value per head, or one value for all heads. Without a
      span the mask is None, without a period it has no wave.
    relative: the number of vectors of distances; 0 if there are none.
    G: heads of keys and values; 0 for as many as of queries.
    segments: for each sequence the lengths of its packed segments, which may be
      zero; () for one segment.
    padding: for each sequence (start, stop), keys that nobody may attend to; ()
      for none.
    query_scale: a factor of the queries, which makes the weights sharp.
    ramp, harmonics, integer, memory, first_key, dropout_rate: as in `attend`.
  """

  name: str
  T: int
  S: int
  span: tuple | None = None
  ramp: float = 32.0
  period: tuple | None = None
  ratio: tuple | None = None
  harmonics: int | None = None
  integer: bool = False
  memory: int = 0
  first_key: int = 0
  dropout_rate: float = 0.0
  dtype: str = "float32"
  B: int = 1
  H: int = 2
  K: int = 8
  query_scale: float = 1.0
  relative: int = 0
  G: int = 0
  segments: tuple = ()
  padding: tuple = ()

  @property
  def mask(self) -> Mask | None:
    """Returns the mask as `attend` takes it."""
    if self.span is None:
      return None
    wave = None
    if self.period is not None:
      wave = Wave(
        jnp.array(self.period, jnp.float32),
        jnp.array(self.ratio, jnp.float32),
        harmonics=self.harmonics,
        integer=self.integer,
      )
    return Mask(jnp.array(self.span, jnp.float32), ramp=self.ramp, wave=wave)

  @property
  def segment_ids(self) -> np.ndarray | None:
    """Returns (B, S) the number of each key's segment."""
    if not self.segments:
      return None
    ids = [np.repeat(np.arange(len(n)), n) for n in self.segments]
    return np.stack(ids).astype(np.int32)

  @property
  def key_mask(self) -> np.ndarray | None:
    """Returns (B, S), false for padding."""
    if not self.padding:
      return None
    key_S = np.arange(self.S)
    return np.stack([(key_S < i) | (key_S >= j) for i, j in self.padding])

  @property
  def options(self) -> dict:
    """Returns all keyword arguments of `attend` but the implementation."""
    hidden = {"segment_ids": self.segment_ids, "key_mask": self.key_mask}
    return {name: x for name, x in hidden.items() if x is not None} | {
      "memory": self.memory,
      "first_key": self.first_key,
      "dropout_rate": self.dropout_rate,
      "dropout_seed": np.uint32(SEED) if self.dropout_rate else None,
    }


def inputs(case: Case) -> tuple:
  """Returns (q_BTHK, k_BSHK, v_BSHK, dout_BTHK) in the dtype of the case."""
  random = np.random.default_rng(sum(case.name.encode()))
  queries = (case.B, case.T, case.H, case.K)
  keys = (case.B, case.S, case.G or case.H, case.K)
  q, k, v, dout = (
    random.standard_normal(shape) for shape in (queries, keys, keys, queries)
  )
  return tuple(
    jnp.asarray(x, jnp.float32).astype(case.dtype)
    for x in (case.query_scale * q, k, v, dout)
  )


def relative_vectors(case: Case):
  """Returns the vectors of distances (R, K), or None."""
  if not case.relative:
    return None
  random = np.random.default_rng(case.relative)
  return jnp.asarray(
    random.standard_normal((case.relative, case.K)), jnp.float32
  )


HEADS, HEAD_WIDTH = 8, 64
_LEARNED = (10.0, 20.0, 30.0, 40.0, 60.0, 100.0, 200.0)  # of seven heads


def _timed(name, B, T, span, **wave) -> Case:
  return Case(name, T, T, span, B=B, H=HEADS, K=HEAD_WIDTH, **wave)


SHAPES = (
  _timed("512", 4, 512, (*_LEARNED, 256.0)),
  _timed("2048", 2, 2048, (*_LEARNED, 1024.0)),
  _timed("8192", 1, 8192, (*_LEARNED, 4096.0)),
  _timed("8192 first spans", 1, 8192, (*_LEARNED, 256.0)),
  _timed("2048 first spans", 1, 2048, (*_LEARNED, 256.0)),
  _timed("8192 spans 4096", 1, 8192, (4096.0,) * HEADS),
  _timed(
    "8192 spans 4096, period 4",
    *(1, 8192, (4096.0,) * HEADS),
    period=(4.0,) * HEADS,
    ratio=(-0.25,) * HEADS,  # only the crests are open: one residue
    integer=True,
  ),
)


_DEVICE_TOKENS = 32_768  # of a call, in bfloat16
DEVICE_WIDTHS = (64, 128)


def on_device_name(name: str, width: int) -> str:
  """Returns the name of a case of DEVICE_SHAPES."""
  return f"{name}, K {width}"


def _on_device(name, T, span, **wave) -> Iterable[Case]:
  for width in DEVICE_WIDTHS:
    yield Case(
      *(on_device_name(name, width), T, T, span),
      **{"B": _DEVICE_TOKENS // T, "H": HEADS, "K": width} | wave,
      dtype="bfloat16",
    )


_UNIFORM = (4096.0,) * HEADS
DEVICE_SHAPES = (
  *_on_device("dense 2048", 2048, None),
  *_on_device("dense 8192", 8192, None),
  *_on_device("spans 2048", 2048, (*_LEARNED, 1024.0)),
  *_on_device("spans 8192", 8192, (*_LEARNED, 4096.0)),
  *_on_device("reach 256, 8192", 8192, (224.0,) * HEADS),
  *_on_device("no period, 8192", 8192, _UNIFORM),
  *_on_device(
    *("period 4, 8192", 8192, _UNIFORM),
    period=(4.0,) * HEADS,
    ratio=(-0.25,) * HEADS,  # only the crests are open: one residue
    integer=True,
  ),
  *_on_device(
    *("waves 8192", 8192, (*_LEARNED, 4096.0)),
    period=(3.3, 4.7, 5.1, 8.2, 9.9, 12.3, 17.7, 100.1),
    ratio=(-0.1,) * HEADS,
  ),
)


@dataclasses.dataclass(frozen=True)
class Step:
  """A training step of four layers, width 512, dropout 0.2, B x T tokens.

  Attributes:
    spans: z of the eight heads of every layer, or of each layer in turn, at
      most the tokens that there are to attend to.
    runs: the models that are compared: name -> settings.
  """

  name: str
  B: int
  T: int
  spans: tuple
  runs: dict


_BY_IMPLEMENTATION = {
  name: {"attention": "span_wave", "implementation": name}
  for name in IMPLEMENTATIONS
}
_BY_MEMORY = {
  f"{attention}, memory {memory}": {
    "attention": attention,
    "position": "rotary",
    "memory_tokens": memory,
  }
  for attention, memory in (
    *(("span", 512), ("span", 8192), ("span", 65_536), ("span", 1_048_576)),
    ("dense", 8192),
  )
}
_REMEMBERED = 0.0, 0.0, 10.0, 20.0, 60.0, 150.0, 400.0, 1500.0
STEPS = (
  Step("step 4 x 512", 4, 512, (*_LEARNED, 256.0), _BY_IMPLEMENTATION),
  Step("step 1 x 2048", 1, 2048, (*_LEARNED, 1024.0), _BY_IMPLEMENTATION),
  Step(
    "step 4 x 512, memory",
    *(4, 512, _REMEMBERED),
    _BY_MEMORY,
  ),
  Step(
    "step 4 x 512, one far head",
    *(4, 512, (*[_REMEMBERED] * 3, (*_REMEMBERED[:-1], 60_000.0))),
    {
      name: _BY_MEMORY[name]
      for name in ("span, memory 65536", "span, memory 1048576")
    },
  ),
)


@dataclasses.dataclass(frozen=True)
class Decode:
  """Generation after a long text: 12 layers, width 512, B texts at once.

  Attributes:
    context_tokens: the largest distance that a head could reach.
    spans: z of the eight heads of every layer.
    runs: name -> (settings of the model, kind of cache, position of the next
      token); with None for the cache the context is read again for each token.
  """

  name: str
  B: int
  context_tokens: int
  spans: tuple[float, ...]
  runs: dict


_DECODED = (0.0, 0.0, 10.0, 20.0, 60.0, 150.0, 400.0, 1500.0)
_INTEGER_WAVE = {"attention": "span_wave", "period": "integer", "harmonics": 0}
_LONG = {
  "spans": ({}, "spans", 20_000),
  "spans at 1000": ({}, "spans", 1_000),
  "spans, wave": (_INTEGER_WAVE, "spans", 20_000),
  "dense": ({}, "dense", 20_000),
}
_SHORT = {"spans": ({}, "spans", 512), "context read again": ({}, None, 512)}
DECODES = tuple(
  Decode(f"decode {B} x {context}", B, context, spans, runs)
  for context, spans, runs in (
    (8192, _DECODED, _LONG),
    (512, (*_DECODED[:-1], 480.0), _SHORT),
  )
  for B in (1, 8)
)


def named(cases: Iterable, names: str) -> list:
  """Returns the cases of these names, in their own order; all of them for "".

  Args:
    cases: cases with a `name`.
    names: some of their names, separated by ";".

  Raises:
    BenchmarkError: naming the first unknown name.
  """
  known = [case.name for case in cases]
  wanted = names.split(";") if names else known
  for name in wanted:
    if name not in known:
      raise BenchmarkError(
        f"config.bench.shapes has {name!r}; expected some of {known}, "
        'separated by ";"'
      )
  return [case for case in cases if case.name in wanted]
