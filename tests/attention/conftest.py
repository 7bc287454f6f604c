"""What tests of attention share beside their cases."""

import pytest

from adaptive_attention import attention


@pytest.fixture
def set_constant(monkeypatch):
  """Sets a module's number that attention reads as it is traced.

  A call of the same shapes is not traced again but for this.
  """

  def set_in(module, name, value):
    monkeypatch.setattr(module, name, value)
    attention._attended.clear_cache()

  yield set_in
  attention._attended.clear_cache()
