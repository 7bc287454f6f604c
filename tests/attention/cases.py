"""The cases every implementation of attention is held to.

Each is named for what it brings in. Lengths are in tokens; a value per head,
or one value for all heads.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from adaptive_attention.masks import Mask, Wave


class Case(NamedTuple):
  """One call of `attend`; span None is mask=None, period None is no wave."""

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
  relative: int = 0  # vectors of distances

  @property
  def mask(self):
    """The mask as `attend` takes it."""
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
  def options(self):
    """The keyword arguments of `attend`, all but the implementation."""
    return {
      "memory": self.memory,
      "first_key": self.first_key,
      "dropout_rate": self.dropout_rate,
      "dropout_seed": np.uint32(SEED) if self.dropout_rate else None,
    }


SEED = 0x9E3779B1  # in the upper half of 32 bits, where a signed one fails


def inputs(case):
  """(q_BTHK, k_BSHK, v_BSHK, dout_BTHK) in the dtype of the case."""
  random = np.random.default_rng(sum(case.name.encode()))
  queries = (case.B, case.T, case.H, case.K)
  keys = (case.B, case.S, case.H, case.K)
  q, k, v, dout = (
    random.standard_normal(shape) for shape in (queries, keys, keys, queries)
  )
  return tuple(
    jnp.asarray(x, jnp.float32).astype(case.dtype)
    for x in (case.query_scale * q, k, v, dout)
  )


def relative_vectors(case):
  """(R, K), or None."""
  if not case.relative:
    return None
  random = np.random.default_rng(case.relative)
  return jnp.asarray(
    random.standard_normal((case.relative, case.K)), jnp.float32
  )


# With an integer period and a ratio that is a multiple of 1/4 all weights are
# multiples of 1/4, the clips' ends are met exactly, and rounding plays no
# part. Real periods keep away from where slopes jump.
CASES = (
  # No mask.
  Case("dense_one", 1, 1),
  Case("dense_seven", 7, 7, B=2),
  Case("dense_129", 129, 129),
  Case("dense_first_key", 64, 67, memory=3, first_key=30),
  Case("dense_dropout", 64, 67, memory=3, dropout_rate=0.3, B=2),
  Case("dense_bfloat16", 129, 129, dtype="bfloat16"),
  # Spans.
  Case("span_seven", 7, 7, span=(0.0, 2.25), ramp=3.0, B=2),
  Case("span_in_the_ramp", 64, 64, span=(0.0, 11.5, 31.75), H=3),
  Case("span_beyond", 64, 64, span=(64.0, 1e3, 1e6), H=3),
  Case("span_at_a_distance", 64, 64, span=(8.0, 17.0), ramp=16.0),
  Case("only_itself", 129, 129, span=(0.0, 0.25), ramp=0.5, B=2),
  Case("span_500", 500, 500, span=(0.0, 20.5, 130.3, 700.0), H=4),
  Case("one_query", 1, 513, span=(0.0, 100.7, 600.0), H=3, memory=512),
  Case("memory_3", 129, 132, span=(1.5, 90.25), memory=3, B=2),
  Case("memory_512", 129, 641, span=(40.5, 300.5, 2e3), H=3, memory=512),
  Case("memory_part", 64, 128, span=(9.5, 70.5), memory=20),
  Case(
    "first_key_in_memory",
    129,
    641,
    span=(40.5, 300.5),
    memory=512,
    first_key=400,
  ),
  Case(
    "first_key_beyond_memory",
    64,
    67,
    span=(3.5, 50.5),
    ramp=4.0,
    memory=3,
    first_key=21,
  ),
  Case("first_key_last", 7, 10, span=(3.5, 50.5), memory=3, first_key=10),
  Case("sharp", 64, 64, span=(5.5, 40.5), query_scale=30.0),
  # Waves.
  Case(
    "stride_at_the_bounds",
    129,
    129,
    span=(60.0, 60.0, 10.0, 200.0),
    period=(2.0, 8.0, 2.0, 8.0),
    ratio=(-0.25, -0.25, 0.25, 0.25),
    integer=True,
    H=4,
  ),
  Case(
    "stride_rounds",
    64,
    64,
    span=(30.5, 30.5, 30.5),
    period=(4.4, 6.7, 2.9),
    ratio=(0.0, -0.25, 0.25),
    integer=True,
    H=3,
    B=2,
  ),
  Case(
    "stride_500",
    500,
    500,
    span=(0.0, 150.5, 400.5),
    period=(3.0, 5.0, 7.0),
    ratio=(0.0, -0.25, 0.0),
    integer=True,
    H=3,
  ),
  Case(
    "stride_memory_512",
    500,
    1012,
    span=(30.5, 900.5),
    period=(5.0, 8.0),
    ratio=(0.0, -0.25),
    integer=True,
    memory=512,
    first_key=100,
  ),
  Case(
    "stride_series",
    129,
    129,
    span=(20.5, 90.5),
    period=(3.6, 7.2),
    ratio=(0.04, -0.13),
    harmonics=5,
    integer=True,
  ),
  Case(
    "comb_closed_and_off",
    64,
    64,
    span=(20.5, 20.5),
    period=(4.0, 8.0),
    ratio=(-0.5, 0.5),
    integer=True,
  ),
  Case(
    "real_seven",
    7,
    10,
    span=(2.25, 5.75),
    ramp=3.0,
    period=(2.37, 5.63),
    ratio=(0.11, -0.09),
    memory=3,
    B=2,
  ),
  Case(
    "real_near_the_bounds",
    129,
    129,
    span=(30.25, 30.25, 70.25, 70.25),
    period=(2.013, 7.987, 2.013, 7.987),
    ratio=(-0.25, -0.25, 0.25, 0.25),
    H=4,
  ),
  Case(
    "real_500",
    500,
    503,
    span=(10.25, 420.25),
    period=(3.307, 6.191),
    ratio=(0.071, -0.047),
    memory=3,
  ),
  Case(
    "series_at_the_bounds",
    64,
    64,
    span=(30.25, 30.25, 70.25, 70.25),
    period=(2.0, 8.0, 2.0, 8.0),
    ratio=(-0.25, -0.25, 0.25, 0.25),
    harmonics=5,
    H=4,
  ),
  Case(
    "series_memory_512",
    129,
    641,
    span=(20.25, 400.25, 620.25),
    period=(2.4, 4.585, 7.407),
    ratio=(0.03, -0.1524, 0.0044),
    harmonics=5,
    memory=512,
    H=3,
  ),
  Case(
    "real_first_key",
    64,
    128,
    span=(20.25, 100.25),
    period=(3.307, 6.191),
    ratio=(0.071, -0.047),
    memory=64,
    first_key=70,
  ),
  Case(
    "stride_even",
    500,
    700,
    span=(690.5, 480.5, 650.5),
    period=(2.0, 3.0, 4.0),
    ratio=(0.0, -0.125, -0.125),
    integer=True,
    memory=200,
    first_key=77,
    H=3,
  ),
  Case(
    "stride_memory_part",
    300,
    500,
    span=(290.5, 130.5),
    period=(3.0, 2.0),
    ratio=(-0.25, 0.0),
    integer=True,
    memory=101,
  ),
  # Vectors for distances.
  Case("relative_seven", 7, 7, relative=7, B=2),
  Case("relative_few", 70, 73, span=(8.5, 100.0), relative=9, memory=3),
  Case(
    "relative_500",
    500,
    630,
    span=(0.0, 60.5, 450.5),
    memory=130,
    first_key=33,
    dropout_rate=0.3,
    relative=800,
    H=3,
  ),
  Case(
    "relative_stride",
    129,
    641,
    span=(40.5, 500.5),
    period=(3.0, 2.0),
    ratio=(-0.25, 0.0),
    integer=True,
    memory=512,
    relative=641,
    B=2,
  ),
  Case(
    "relative_bfloat16",
    64,
    67,
    span=(5.5, 80.5),
    memory=3,
    relative=67,
    dtype="bfloat16",
  ),
  # Dropout and bfloat16.
  Case("span_dropout", 129, 132, span=(9.5, 60.5), dropout_rate=0.3, B=2),
  Case(
    "wave_dropout",
    64,
    128,
    span=(9.5, 60.5),
    period=(3.0, 4.0),
    ratio=(0.0, -0.25),
    integer=True,
    memory=64,
    first_key=20,
    dropout_rate=0.3,
    B=2,
  ),
  Case("span_bfloat16", 129, 132, span=(5.5, 80.5), memory=3, dtype="bfloat16"),
  Case(
    "wave_bfloat16",
    64,
    128,
    span=(9.5, 60.5),
    period=(3.0, 4.0),
    ratio=(0.0, -0.25),
    integer=True,
    memory=64,
    first_key=20,
    dropout_rate=0.3,
    dtype="bfloat16",
    B=2,
  ),
)
