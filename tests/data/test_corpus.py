"""The splits are the parts of the content, in order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import CorpusError, split
from tests.data.samples import CONTENT, sha256


@given(st.integers(100, 5_000))
def test_the_splits_are_the_content(total):
  content = np.arange(total, dtype=np.uint32).view(np.uint8)[:total]
  corpus = split("x", content)
  joined = np.concatenate([corpus.train, corpus.valid, corpus.test])
  np.testing.assert_array_equal(joined, content)
  assert len(corpus.valid) == len(corpus.test) == total * 5 // 100
  assert corpus.sha256 == sha256(content.tobytes())


@given(st.integers(1, 500), st.integers(1, 500), st.integers(98, 500))
def test_explicit_sizes_are_obeyed(train, valid, test):
  sizes = train, valid, test
  content = bytes(i % 251 for i in range(sum(sizes)))
  corpus = split("x", content, sizes)
  parts = corpus.train, corpus.valid, corpus.test
  assert tuple(map(len, parts)) == sizes
  assert b"".join(part.tobytes() for part in parts) == content


@pytest.mark.parametrize(
  ("sizes", "match"),
  [
    ((50_000, 1, 0), "expected 50,001"),
    ((60_000, -10_000, 0), "at least one"),
    ((49_999, 1, 0), "at least one"),
  ],
)
def test_sizes_must_add_up_and_leave_none_empty(sizes, match):
  with pytest.raises(CorpusError, match=match) as error:
    split("x", CONTENT, sizes)
  assert "\n" not in str(error.value)
