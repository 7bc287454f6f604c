"""Two evaluations of the same tokens beside each other.

Text that is hard for one model is hard for the other. So the difference of
their losses, chunk by chunk, has a far smaller standard error than each loss.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from adaptive_attention.training import files
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
    records = files.read_lines(pathlib.Path(workdir) / "evals.jsonl")
  except OSError as error:
    raise EvaluationError(
      f"--against={workdir} has no evaluations ({error.strerror}); evaluate it "
      "first, by --mode=eval"
    ) from error
  # Earlier versions kept no chunks.
  same = {
    record["protocol"]: record
    for record in records
    if record.get("data", {}).get("sha256") == sha256
    and record.get("split") == split
    and record.get("tokens", record.get("bytes")) == tokens
    and "chunk_bits" in record
  }
  if protocol in same:
    return same[protocol]
  by_others = (
    f", but by {', '.join(same)}; name one by --against_protocol, or evaluate"
    if same
    else "; evaluate"
  )
  raise EvaluationError(
    f"--against={workdir} has no evaluation of the same {tokens:,} tokens of "
    f"{split} (sha256 {sha256[:12]}...) by the protocol {protocol}{by_others} "
    "it so first, by --mode=eval"
  )


def of_records(one: Mapping, other: Mapping) -> Difference | None:
  """Returns what a record has more than another; None if they do not fit.

  They fit if they are of the same tokens of the same data, by one protocol.
  """
  names = "split", "protocol", "bytes", "tokens"
  alike = all(one.get(name) == other.get(name) for name in names)
  digests = [record.get("data", {}).get("sha256") for record in (one, other)]
  kept = "chunk_bits" in one and "chunk_bits" in other
  if not (alike and kept and digests[0] == digests[1]):
    return None
  tokens = one.get("tokens", one.get("bytes"))
  return difference(one["chunk_bits"], other["chunk_bits"], tokens)


def difference(
  chunk_bits: Sequence[float], others: Sequence[float], tokens: int
) -> Difference:
  """Returns what chunks of so many tokens have more than those of another."""
  more = np.subtract(chunk_bits, others)
  return Difference(float(more.sum() / tokens), standard_error(more, tokens))
