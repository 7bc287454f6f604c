"""Plans for this machine, and for devices that are not here."""

import importlib.metadata
import re

import pytest

from adaptive_attention.training import targets

for_tpu = pytest.mark.skipif(
  bool(targets.missing_package("v5e")), reason="libtpu is not installed"
)


def flags_with(flags, **changes):
  return [*flags, *(f"--config.{name}={x}" for name, x in changes.items())]


def test_it_says_what_computes_attention_and_how_much(main, tiny_flags):
  flags = [f for f in tiny_flags if "implementation" not in f]
  flags = flags_with(flags, **{"model.context_tokens": 200})
  code, out, err = main("--mode=plan", *flags)
  assert code == 0, err
  assert "attention  blocked in blocks of 64 x 64\n" in out
  # Spans of 100 tokens and a ramp of 4: of 10 causal blocks one is hidden.
  assert "90.0% of the causal blocks are computed" in out


@pytest.mark.parametrize("period", ["real", "integer"])
def test_it_says_what_a_memory_takes(main, tiny_flags, period):
  changes = {
    "n_layer": 2,
    "memory_tokens": 4800,
    "max_span": 4800,
    "span_init": 0.01,
    "position": "rotary",
    "period": period,
  }
  changes = {f"model.{name}": x for name, x in changes.items()}
  code, out, err = main("--mode=plan", *flags_with(tiny_flags, **changes))
  assert code == 0, err
  # z + R = 52, 1.2 (52 + 23) = 90 rows, of 2 heads of width 8 in 2 layers for
  # 2 streams, float32; of all of it there are 4824.
  assert "memory     45 KiB of keys and values per device" in out
  assert ", 2.355 MiB if each held all of it" in out
  assert ("waves save none of it" in out) == (period == "integer")


@pytest.mark.skipif(
  not targets.missing_package("v5e"), reason="libtpu is installed"
)
@pytest.mark.parametrize(
  ("target", "command"),
  [
    ("v5e", 'pip install "jax[tpu]=='),
    ("h100", "pip install --no-deps jax-cuda12-plugin=="),
  ],
)
def test_a_missing_compiler_is_named(main, tiny_flags, target, command):
  code, _, err = main("--mode=plan", *flags_with(tiny_flags, target=target))
  assert code == 2
  assert command in err
  assert err.count("\n") == 1


@pytest.mark.parametrize(
  "lacking", ["jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12"]
)
def test_each_package_of_a_gpu_compiler_is_looked_for(monkeypatch, lacking):
  def version(package):
    if package == lacking:
      raise importlib.metadata.PackageNotFoundError(package)
    return "1.0"

  monkeypatch.setattr(targets.importlib.metadata, "version", version)
  monkeypatch.setattr(targets.shutil, "which", lambda name: None)
  assert lacking in targets.missing_package("h100")
  monkeypatch.setattr(targets.importlib.metadata, "version", lambda _: "1.0")
  assert not targets.missing_package("h100")


@pytest.mark.parametrize(
  ("mode", "target", "named"),
  [
    ("plan", "v9", "'v5e', 'v5p'"),
    ("train", "v5e", "target"),
  ],
)
def test_a_target_that_is_not_possible(main, tiny_flags, mode, target, named):
  flags = flags_with(tiny_flags, target=target)
  code, _, err = main(f"--mode={mode}", *flags)
  assert code == 2
  assert named in err


@for_tpu
@pytest.mark.parametrize(
  ("target", "runs"),
  [
    ("v5e", "pallas_tpu in blocks of 128 x 128\n"),
    ("v4", "reference, as pal"),
    *(
      pytest.param(name, "pallas_tpu in blocks", marks=pytest.mark.every_case)
      for name in ("v5p", "v6e")
    ),
  ],
)
def test_a_step_is_compiled_for_what_is_not_here(
  main, tiny_flags, target, runs
):
  """On one device, in bfloat16, as a device of its kind would do it."""
  flags = [f for f in tiny_flags if "implementation" not in f]
  code, out, err = main("--mode=plan", *flags_with(flags, target=target))
  assert code == 0, err
  assert f"which is not here, for {target}\n" in out
  assert f"attention  {runs}" in out
  assert re.search(r"^memory +[\d.]+ .iB total, per device", out, re.MULTILINE)
  assert re.search(r"^fits +yes, [\d.]+ .iB of \d+ GiB", out, re.MULTILINE)


@for_tpu
@pytest.mark.every_case  # minutes each
@pytest.mark.parametrize(
  ("config", "blocks", "more"),
  [
    ("enwik8", "512 x 512", ()),
    ("enwik8_8k", "256 x 512", ("batch_size=8",)),
  ],
)
def test_the_steps_of_the_published_sizes_fit(main, config, blocks, more):
  flags = f"--config=configs/{config}.py", "--config.target=v5e"
  data = "--config.data.corpus=python_source"
  more = (f"--config.{setting}" for setting in more)
  code, out, err = main("--mode=plan", *flags, data, *more)
  assert code == 0, err
  assert f"attention  pallas_tpu in blocks of {blocks}\n" in out
  assert re.search(r"^fits +yes, [\d.]+ GiB of 16 GiB", out, re.MULTILINE)


@for_tpu
def test_what_cannot_serve_a_target_is_refused(main, tiny_flags):
  flags = flags_with(
    tiny_flags, target="v5e", **{"model.implementation": "pallas_gpu"}
  )
  code, _, err = main("--mode=plan", *flags)
  assert code == 2
  assert "pallas_gpu" in err
  assert "the device is TPU v5" in err


def test_whether_it_fits():
  from adaptive_attention.modes.plan import _fit_text

  assert _fit_text(1 << 30, "v5e") == "yes, 1 GiB of 16 GiB"
  assert _fit_text(1 << 35, "v5e").startswith("no, 32 GiB of 16 GiB; give ")
