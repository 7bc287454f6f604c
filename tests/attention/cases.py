"""The cases that every implementation of attention is tested on.

Each is named after what is special about it.
"""

import pytest

from adaptive_attention.bench.cases import (
  SEED,
  SHAPES,
  Case,
  inputs,
  relative_vectors,
)

__all__ = ["CASES", "SEED", "Case", "inputs", "relative_vectors"]

# The kernels are in test_pallas.
everywhere = pytest.mark.parametrize("implementation", ("blocked", "reference"))
# JAX's own operations make the reference, so that it is asked by hand.
mostly_blocked = pytest.mark.parametrize(
  "implementation",
  ["blocked", pytest.param("reference", marks=pytest.mark.every_case)],
)


def shortened(cases, T=200):
  """Returns the timed cases, each once, so short that the oracle can serve."""
  short = (
    case._replace(
      T=T,
      S=T,
      B=1,
      K=8,
      span=tuple(min(z, T) for z in case.span),
    )
    for case in cases
  )
  return tuple({case._replace(name=""): case for case in short}.values())


# Under an integer period and a ratio that is a multiple of 1/4 all weights are
# multiples of 1/4. Then the clips' ends are met exactly, and rounding plays no
# part. Real periods keep away from where slopes jump.
CASES = (
  *shortened(SHAPES),
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
