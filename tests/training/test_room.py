"""What does not fit the memory is refused before it is asked for."""

import types

import jax
import pytest

from adaptive_attention.training import parallel, room

GIB = 1 << 30


@pytest.fixture
def group(monkeypatch, tmp_path):
  """group(text): what the file of the process' group says of its limit."""
  monkeypatch.setattr(room, "_CGROUP", tmp_path / "memory.max")
  return (tmp_path / "memory.max").write_text


def test_devices_of_a_cpu_share_what_the_process_may_use(group):
  assert jax.local_device_count() == 2
  whole = 2 * room.bytes_per_device()
  assert 0 < whole < 1 << 50
  assert room.bytes_per_device(count=1) == whole
  for text, limit in (("max\n", whole), (f"{whole // 4}\n", whole // 4)):
    group(text)
    assert room.bytes_per_device() == limit // 2


@pytest.mark.parametrize(
  ("stats", "expected"), [({"bytes_limit": 5}, 5), ({}, None), (None, None)]
)
def test_other_devices_say_it_themselves(monkeypatch, stats, expected):
  device = types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
  monkeypatch.setattr(parallel, "local_devices", lambda: [device])
  assert room.bytes_per_device() == expected
  if expected is None:
    room.check(1 << 60, "a step")


def test_what_does_not_fit_is_named_with_both_sizes(group):
  group(f"{6 * GIB}\n")
  room.check(3 * GIB, "a training step")
  with pytest.raises(
    room.RoomError,
    match=r"a training step takes 4 GiB per device, which has 3 GiB; make the "
    r"model smaller, or give --config.accumulation_steps more",
  ):
    room.check(4 * GIB, "a training step")


@pytest.mark.parametrize(
  "error",
  [
    MemoryError("Unable to allocate 1 TiB"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room\nmore"),
    jax.errors.JaxRuntimeError("INTERNAL: Out of memory allocating 9 B"),
    jax.errors.JaxRuntimeError(
      "INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"
    ),
  ],
)
def test_what_fails_for_want_of_memory(error):
  with (
    pytest.raises(
      room.RoomError, match=r"not enough memory \(.*[a-zB]\); make"
    ),
    room.failures(),
  ):
    raise error


@pytest.mark.parametrize(
  "error", [ValueError("x"), jax.errors.JaxRuntimeError("INTERNAL: x")]
)
def test_other_failures_stay_what_they_are(error):
  with pytest.raises(type(error)) as found, room.failures():
    raise error
  assert found.value is error
