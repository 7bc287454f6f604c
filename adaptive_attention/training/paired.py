"""Two evaluations of the same tokens beside each other.

What is hard to predict is so for both. So the difference of their losses, chunk
by chunk, has a far smaller standard error than either loss.
"""

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from adaptive_attention.training import logbook
from adaptive_attention.training.evaluator import (
  EvaluationError,
  Result,
  standard_error,
)

_DECIMALS = 3  # of a chunk's bits, which are thousands


class Difference(NamedTuple):
  """What one evaluation has more than another, in bits per token.

  Attributes:
    bits: the difference; less than 0 where the other is worse.
    stderr: the standard error of this difference.
  """

  bits: float
  stderr: float


def kept(result: Result) -> list[float]:
  """Returns the chunks of a result, as `evals.jsonl` keeps them."""
  return [round(float(bits), _DECIMALS) for bits in result.chunk_bits]


def earlier(
  workdir, sha256: str, split: str, protocol: str, tokens: int
) -> dict:
  """Returns the record of the last evaluation of these tokens in a workdir.

  Args:
    workdir: the folder of the other run.
    sha256: that of the data.
    split, protocol, tokens: those of the evaluation; how many were predicted.

  Raises:
    EvaluationError: there is none that has all of these.
  """
  try:
    records = logbook.read_lines(pathlib.Path(workdir) / "evals.jsonl")
  except OSError as error:
    raise EvaluationError(
      f"--against={workdir} has no evaluations ({error.strerror}); evaluate it "
      "first, by --mode=eval"
    ) from error
  for record in reversed(records):
    found = (
      *(record.get("data", {}).get("sha256"), record.get("split")),
      *(record.get("protocol"), record.get("tokens", record.get("bytes"))),
    )
    # Earlier versions kept no chunks.
    if found == (sha256, split, protocol, tokens) and "chunk_bits" in record:
      return record
  raise EvaluationError(
    f"--against={workdir} has no evaluation of the same {tokens:,} tokens of "
    f"{split} (sha256 {sha256[:12]}...) by the protocol {protocol}; evaluate "
    "it so first, by --mode=eval"
  )


def difference(result: Result, record: Mapping) -> Difference:
  """Returns what a result has more than a record of `earlier`."""
  more = result.chunk_bits - np.asarray(record["chunk_bits"])
  return Difference(
    float(more.sum() / result.tokens), standard_error(more, result.tokens)
  )
