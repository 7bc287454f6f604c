"""Two evaluations of the same tokens: their difference, and its error."""

import json
import math

import numpy as np
import pytest

from adaptive_attention.training import evaluator, paired

COUNT = 50_500  # the last chunk is a short one
SAME = "sha", "test", "window", COUNT


def result(losses):
  """Returns the result of losses in bits."""
  sums = evaluator.chunk_sums(losses)
  return evaluator.Result(
    bits=losses.mean(),
    stderr=evaluator.standard_error(sums, len(losses)),
    tokens=len(losses),
    tokens_per_second=1.0,
    chunk_bits=sums,
  )


def record(found, **changes):
  return {
    "data": {"sha256": "sha"},
    "split": "test",
    "protocol": "window",
    "bytes": found.tokens,
    "chunk_bits": paired.kept(found),
  } | changes


@pytest.fixture(scope="module")
def losses():
  """Bits that differ from text to text, and so from chunk to chunk."""
  generator = np.random.default_rng(0)
  text = np.repeat(generator.normal(3.0, 1.0, 51), 1_000)[:COUNT]
  return text + generator.normal(0.0, 0.5, COUNT)


def test_what_both_find_hard_is_not_in_the_error(losses):
  noise = np.random.default_rng(1).normal(0.02, 0.1, COUNT)
  mine, other = result(losses + noise), result(losses)
  more = paired.of_records(record(mine), record(other))
  np.testing.assert_allclose(more.bits, noise.mean(), atol=1e-6)
  np.testing.assert_allclose(more.stderr, 0.1 / math.sqrt(COUNT), rtol=0.25)
  assert more.stderr < mine.stderr / 100
  back = paired.of_records(record(other), record(mine))
  np.testing.assert_allclose(back, (-more.bits, more.stderr), atol=1e-6)
  assert paired.of_records(record(mine), record(mine)).stderr < 1e-6


def written(folder, *records, rest=""):
  folder.mkdir(exist_ok=True)
  lines = "".join(json.dumps(record) + "\n" for record in records)
  (folder / "evals.jsonl").write_text(lines + rest)
  return folder


@pytest.mark.parametrize(
  "change",
  [
    {"data": {"sha256": "another"}},
    {"split": "valid"},
    {"protocol": "memory"},
    {"bytes": COUNT - 1},
    {"bytes": None, "tokens": COUNT},
  ],
)
def test_records_of_other_tokens_have_no_difference(losses, change):
  one = record(result(losses))
  assert paired.of_records(one, one | change) is None
  assert paired.of_records(one | change, one) is None
  older = {n: v for n, v in one.items() if n != "chunk_bits"}
  assert paired.of_records(one, older) is None
  assert paired.of_records(one, one | {"step": 7}) == (0.0, 0.0)


def test_the_last_evaluation_of_the_same_tokens_is_found(tmp_path, losses):
  same = record(result(losses))
  others = [
    same | {"data": {"sha256": "another"}},
    same | {"split": "valid"},
    same | {"protocol": "memory"},
    same | {"bytes": COUNT - 1},
  ]
  of_tokens = {n: v for n, v in same.items() if n != "bytes"}
  for rows in (
    [same | {"step": 1}, same | {"step": 2}, *others],
    [*others, of_tokens | {"tokens": COUNT, "step": 2}],
  ):
    folder = written(tmp_path / "run", *rows, {}, [], rest='{"split": "te')
    assert paired.earlier(folder, *SAME)["step"] == 2
  older = {n: v for n, v in same.items() if n != "chunk_bits"}
  folder = written(tmp_path / "run", *others, older)
  with pytest.raises(evaluator.EvaluationError, match="of the same 50,500 tok"):
    paired.earlier(folder, *SAME)
  with pytest.raises(evaluator.EvaluationError, match="has no evaluations"):
    paired.earlier(tmp_path / "none", *SAME)
