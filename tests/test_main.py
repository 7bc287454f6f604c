"""The command line: wrong settings end in one sentence, before any device."""

import json
import pathlib
import runpy
import shutil

import numpy as np
import pytest
import safetensors

from adaptive_attention.command_line import workdirs
from adaptive_attention.config import ModelConfig
from tests.conftest import TINY, serving

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def refused(main):
  """Returns a function that calls main.py and returns its one sentence.

  It is called as refused(code, *flags), where `code` is the exit code.
  """

  def run(code, *flags, started=False):
    found, _, err = main(*flags)
    assert found == code, err
    assert err.startswith("main.py: ")
    assert err.count("\n") == 1
    assert code != 2 or main.backend_was_started == started
    return err

  return run


ENWIK8 = "--config=configs/enwik8.py"


@pytest.mark.parametrize(
  ("flag", "named"),
  [
    # Typos and wrong types.
    ("--config.model.n_layr=4", "'n_layr'; Did you mean \"n_layer\""),
    ("--config.nope=4", "'nope'; see configs/base.py"),
    ("--config.model.n_layer=four", "--config.model.n_layer=four"),
    ("--config.model.n_layer=1.5", "--config.model.n_layer=1.5"),
    ("--config.steps=", "--config.steps="),
    ("--confg=x", "confg"),
    ("--mode=fly", "--mode=fly"),
    ("model.n_layer=4", "'model.n_layer=4' is not a flag"),
    ("--split=train", "--split=train"),
    ("--layout=gpt3", "--layout=gpt3: value should be one of <gpt2>"),
    # Negatives, zeros and nan.
    ("--config.steps=0", "config.steps=0"),
    ("--config.batch_size=-8", "config.batch_size=-8"),
    ("--config.seed=-1", "config.seed=-1"),
    ("--config.eval_tokens=-1", "config.eval_tokens=-1"),
    ("--config.eval_tokens=1", "config.eval_tokens=1"),
    ("--config.seed=4294967296", "at most 4294967295"),
    ("--config.cpu_devices=-1", "config.cpu_devices=-1"),
    ("--config.optimizer.learning_rate=nan", "optimizer.learning_rate=nan"),
    ("--config.optimizer.learning_rate=-1", "optimizer.learning_rate=-1.0"),
    ("--config.optimizer.weight_decay=inf", "optimizer.weight_decay=inf"),
    ("--config.optimizer.beta2=1", "optimizer.beta2=1.0"),
    ("--config.optimizer.clip_norm=0", "optimizer.clip_norm=0.0"),
    ("--config.model.n_layer=-4", "config.model.n_layer=-4"),
    ("--config.model.ramp=0", "config.model.ramp=0.0"),
    ("--config.model.ramp=nan", "config.model.ramp=nan"),
    ("--config.model.span_coef=-1", "config.model.span_coef=-1.0"),
    ("--config.model.dropout=1", "config.model.dropout=1.0"),
    ("--config.model.span_init=0", "config.model.span_init=0.0"),
    ("--config.optimizer.name=sgd", "config.optimizer.name='sgd'"),
    ("--config.optimizer.clip=norm", "config.optimizer.clip='norm'"),
    # Pairs that do not fit.
    ("--config.model.width=500", "a multiple of model.n_head=8"),
    ("--config.model.period_max=1.5", "more than period_min=2.0"),
    ("--config.model.vocab_size=100", "at least 256"),
    ("--config.optimizer.min_learning_rate=1", "at most optimizer.learning"),
    ("--config.accumulation_steps=3", "config.batch_size=64"),
    ("--config.cpu_devices=3", "a multiple of 3 device(s)"),
    # Names.
    ("--config.model.attention=sparse", "config.model.attention='sparse'"),
    ("--config.model.implementation=fast", "model.implementation='fast'"),
    ("--config.data.corpus=books", "config.data.corpus='books'"),
    # Several processes that cannot find each other.
    ("--config.process_count=2", "0 without distributed=True"),
    # Flags that the mode does not use.
    ("--protocol=window", "--protocol=window means nothing to --mode=train"),
    # Characters that would break the line.
    ("--config.bench.compare=a\nb\x1b", r"compare=a\nb\x1b means nothing"),
  ],
)
def test_wrong_settings(refused, flag, named):
  assert named in refused(2, ENWIK8, flag)


def test_a_context_longer_than_the_data(refused, text):
  message = refused(
    2,
    ENWIK8,
    f"--config.data.path={text}",
    "--config.model.context_tokens=5000",
  )
  assert "context_tokens=5000" in message


def test_what_is_needed(refused):
  assert "needs --config=FILE" in refused(2)
  assert "needs --workdir=DIR" in refused(2, "--mode=eval")
  assert "needs --config=FILE or" in refused(2, "--mode=plan")
  assert "does not exist" in refused(2, "--config=configs/none.py")


@pytest.mark.parametrize(
  ("content", "said"),
  [
    ("def get_config(:", "fails (SyntaxError"),
    ("x = 1", "has no get_config"),
    ("get_config = 1", "has no get_config"),
    ("def get_config(): return {}", "returns dict; expected a ConfigDict"),
    ("def get_config(): return 1 / 0", "fails (ZeroDivisionError"),
    ("raise SystemExit(3)", "fails (SystemExit: 3)"),
    ("def get_config(size): return size", "takes an argument; give --config="),
    ("\0", "fails (SyntaxError"),
    (
      "from ml_collections import ConfigDict\n"
      "def get_config(): return ConfigDict({'seed': 3})",
      "has nothing at config.accumulation_steps; expected int",
    ),
    (
      "from configs import base\n"
      "def get_config():\n"
      "  config = base.get_config()\n"
      "  config.seed = None\n"
      "  return config",
      "has NoneType at config.seed; expected int",
    ),
  ],
)
def test_configs_that_cannot_be_used(refused, tmp_path, content, said):
  (tmp_path / "broken.py").write_text(content)
  message = refused(2, f"--config={tmp_path / 'broken.py'}")
  assert said in message
  assert "broken.py" in message


@pytest.mark.parametrize(
  "config", ["quickstart", "configs", "README.md", "a" * 300]
)
def test_no_config_names_those_that_there_are(refused, config):
  assert "enwik8_8k.py, enwik8_dense.py" in refused(2, f"--config={config}")


def test_a_config_can_take_an_argument(main, refused, tmp_path):
  (tmp_path / "deep.py").write_text(
    "from configs import quickstart\n"
    "def get_config(layers):\n"
    "  config = quickstart.get_config()\n"
    "  config.model.n_layer, config.model.width = int(layers), 16\n"
    "  return config\n"
  )
  given = f"--config={tmp_path / 'deep.py'}"
  code, out, err = main("--mode=plan", f"{given}:1", "--config.batch_size=4")
  assert code == 0, err
  assert f"{tmp_path / 'deep.py'}:1, batch_size=4 (was 16)" in out
  assert "workdir    runs/deep_1" in out
  assert "fails (ValueError" in refused(2, f"{given}:many")
  assert "takes no argument" in refused(2, f"{ENWIK8}:3")


def test_data_that_would_not_be_read(refused):
  path = "--config.data.path=a.txt"
  for flag in ("data.corpus=python_source", "data.cache_dir=b"):
    message = refused(2, ENWIK8, path, f"--config.{flag}")
    assert f"{flag} means nothing where data.path=a.txt is read" in message
  message = refused(
    2, "--config=configs/quickstart.py", "--config.data.cache_dir=b"
  )
  assert "means nothing where data.corpus=python_source is read" in message


def test_a_setting_is_no_section(refused):
  assert "config.model is a section" in refused(2, ENWIK8, "--config.model={}")


def test_processes_that_cannot_find_each_other(refused, text):
  message = refused(
    2,
    ENWIK8,
    f"--config.data.path={text}",
    "--config.distributed=True",
    "--config.cpu_devices=1",
  )
  assert "config.distributed=True finds no other processes" in message
  assert "give coordinator_address" in message


@pytest.mark.parametrize(
  "workdir",
  [
    "data",
    "./data/",
    "data/../data/x",
    "tests/golden",
    ".",
    ".ci",
    str(ROOT / "configs"),
    "LINK",
    "main.py",
    "main.py/x",
    "a" * 300,
  ],
)
def test_no_run_is_written_into_the_source(refused, tmp_path, workdir):
  if workdir == "LINK":
    workdir = tmp_path / "link"
    workdir.symlink_to(ROOT / "adaptive_attention")
  before = sorted(ROOT.iterdir())
  message = refused(2, ENWIK8, f"--workdir={workdir}")
  assert f"--workdir={pathlib.Path(workdir)}" in message
  assert sorted(ROOT.iterdir()) == before


@pytest.mark.parametrize(
  ("changes", "what"),
  [
    ({"model.width": 2_000_000}, "the train state (parameters and optimizer)"),
    ({"batch_size": 2_000_000, "model.dropout": 0.0}, "a training step"),
  ],
)
def test_sizes_that_no_memory_holds(
  refused, tiny_flags, tmp_path, changes, what
):
  flags = [f"--config.{name}={value}" for name, value in changes.items()]
  message = refused(1, *tiny_flags, *flags, f"--workdir={tmp_path / 'w'}")
  assert f"main.py: {what} takes " in message
  assert "iB per device, which has " in message


def test_a_folder_of_that_name_elsewhere_will_do(tmp_path):
  for workdir in (tmp_path / "data", ROOT / "runs" / "data", ROOT / "runs"):
    workdirs.check(workdir, ROOT)


def test_what_is_not_there(refused, tmp_path):
  none = tmp_path / "none"
  assert "does not exist" in refused(1, ENWIK8, f"--config.data.path={none}")
  message = refused(1, "--mode=eval", f"--workdir={none}")
  assert "holds no checkpoint" in message
  assert not none.exists()


def test_plan_counts_without_training(main, tmp_path):
  code, out, err = main(
    "--mode=plan",
    "--config=configs/quickstart.py",
    "--config.batch_size=4",
    f"--workdir={tmp_path / 'w'}",
  )
  assert code == 0, err
  # There are 2 layers of 4 D^2 + 8 D^2 with D = 192, 3 x 4 mask logits a layer,
  # norms of 192 (two a layer and the last), and 256 bytes.
  D = 192
  expected = 2 * (12 * D**2 + 3 * 4 + 2 * D) + D + 256 * D
  assert f"parameters {expected:,} (span_wave)" in out
  assert "temporary" in out
  # All pairs of 128 tokens, in 2 layers of 4 heads: two products of width 48.
  assert f"dense {8 * 96 * 129 / 2:,.0f}, open" in out
  assert "of step 0" in out
  assert "batch_size=4 (was 16)" in out
  assert f"workdir    {tmp_path / 'w'}" in out
  assert not (tmp_path / "w").exists()


@pytest.fixture(scope="module")
def odd(main, text, tmp_path_factory):
  """A run whose batch two devices cannot share; its spans pass the context."""
  workdir = tmp_path_factory.mktemp("runs") / "odd"
  changes = TINY | {
    "steps": 2,
    "batch_size": 3,
    "eval_tokens": 0,
    "model.n_layer": 1,
    # The default, so that it differs from the context alone.
    "model.max_span": 512,
    "cpu_devices": 1,
    "data.path": text,
  }
  flags = [f"--config.{name}={value}" for name, value in changes.items()]
  flags = ["--config=configs/base.py", *flags, f"--workdir={workdir}"]
  code, out, err = main(*flags)
  assert code == 0, err
  assert "warmup_steps=4 lasts to the end of steps=2" in out
  return workdir, flags


def test_the_model_that_was_trained_is_evaluated(main, odd):
  workdir = odd[0]
  line = (workdir / "metrics.jsonl").read_text().splitlines()[-1]
  trained = json.loads(line)
  assert trained["split"] == "valid"

  def figure(*flags):
    code, out, err = main("--mode=eval", f"--workdir={workdir}", *flags)
    assert code == 0, err
    return json.loads((workdir / "eval_valid.json").read_text()), out

  # This is on two devices, which could not share the batch of training.
  found, _ = figure("--config.cpu_devices=2")
  np.testing.assert_allclose(
    found["bits_per_char"], trained["bits_per_char"], rtol=1e-6
  )
  found, out = figure("--config.eval_tokens=500")
  assert found["bytes"] == 499
  assert "first 500 bytes of valid" in out


def test_a_model_of_an_odd_batch_is_used(main, odd):
  workdir = f"--workdir={odd[0]}"
  code, _, err = main("--mode=export", workdir, "--step=2")
  assert code == 0, err
  with safetensors.safe_open(odd[0] / "model.safetensors", "np") as file:
    assert json.loads(file.metadata()["config"])["max_span"] == 512
  # A prompt is taken byte for byte, UTF-8 or not.
  code, out, err = main(
    "--mode=sample", workdir, "--prompt=caf\udce9", "--tokens=2"
  )
  assert code == 0, err
  assert out.startswith("caf\\xe9")


def test_going_on_names_the_setting_that_differs(refused, odd):
  _, flags = odd
  for changed in ("model.n_layer=3", "model.max_span=24"):
    message = refused(2, *flags, f"--config.{changed}", started=True)
    assert f"config.{changed}" in message
  message = refused(2, *flags, "--config.optimizer.name=adagrad", started=True)
  assert "config.optimizer.name='adagrad' does not fit" in message


def test_a_record_with_bad_bytes_goes_on(main, odd, tmp_path):
  workdir = shutil.copytree(odd[0], tmp_path / "w")
  path = workdir / "metrics.jsonl"
  before = path.read_bytes()
  path.write_bytes(b"\xff\xfe\n[1]\n" + before + b'{"step": 2, "spl')
  code, out, err = main(*odd[1], f"--workdir={workdir}", "--config.steps=3")
  assert code == 0, err
  assert path.read_bytes().startswith(before)
  aside = path.with_name("metrics.jsonl.unreadable")
  assert aside.read_bytes() == b'\xff\xfe\n[1]\n{"step": 2, "spl'
  assert str(aside) in out


def configs():
  """Yields (the path of a config, the argument that it takes if any)."""
  for path in sorted((ROOT / "configs").glob("[!_]*.py")):
    for variant in runpy.run_path(str(path)).get("VARIANTS", [None]):
      yield path, variant


@pytest.mark.parametrize(
  ("path", "variant"),
  [*configs()],
  ids=lambda part: getattr(part, "stem", part),
)
def test_configs_build_and_know_their_fields(path, variant):
  from adaptive_attention.training import earlier_settings, settings
  from configs import base

  given = [] if variant is None else [variant]
  config = runpy.run_path(str(path))["get_config"](*given)
  settings.check(config)
  known, found = (settings.flatten(c) for c in (base.get_config(), config))
  assert {n: type(v) for n, v in found.items()} == {
    n: type(v) for n, v in known.items()
  }
  changed = earlier_settings.changes(base.get_config(), config)
  assert bool(changed) == (path.stem != "base")
  assert config.is_locked
  with pytest.raises(AttributeError):
    config.model.n_layr = 3


def test_variants_differ_in_their_masks_alone(refused):
  from adaptive_attention.training.settings import flatten
  from configs import enwik8_small

  given = ROOT / "configs" / "enwik8_small.py"
  assert "is not one of dense, span" in refused(2, f"--config={given}:wave")
  all_of_them = [
    flatten(enwik8_small.get_config(variant))
    for variant in enwik8_small.VARIANTS
  ]
  differ = {
    name
    for name in all_of_them[0]
    if len({repr(config[name]) for config in all_of_them}) > 1
  }
  assert differ == {"model.attention", "model.period"}


def test_base_has_the_defaults_of_the_model_config():

  from configs import base

  assert ModelConfig(**base.get_config().model) == ModelConfig()


def test_the_published_run_is_what_was_published():
  from configs import enwik8

  config = enwik8.get_config()
  published = {
    "steps": 150_000,
    "batch_size": 64,
    "model": {
      "n_layer": 12,
      "n_head": 8,
      "width": 512,
      "context_tokens": 512,
      "ramp": 32.0,
      "period_min": 2.0,
      "period_max": 8.0,
      "span_coef": 4e-6,
      "dropout": 0.2,
      "attention": "span_wave",
      "harmonics": 5,
    },
    "optimizer": {
      "learning_rate": 1e-3,
      "min_learning_rate": 1e-4,
      "warmup_steps": 100,
      "beta1": 0.9,
      "beta2": 0.99,
      "weight_decay": 0.1,
      "clip_norm": 1.0,
    },
  }
  for name, value in published.items():
    if isinstance(value, dict):
      assert {k: config[name][k] for k in value} == value
    else:
      assert config[name] == value
  assert ModelConfig(**config.model).max_span == 512


def test_the_largest_span_follows_the_context_unless_set():
  from configs import base

  config = base.get_config()
  config.model.context_tokens = 64
  assert ModelConfig(**config.model).max_span == 64
  config.model.max_span = 100
  config.model.context_tokens = 32
  assert ModelConfig(**config.model).max_span == 100


# Other systems lack these: macOS lacks the first, and Windows both.
_AS_ELSEWHERE = """
import os, runpy, sys
os.process_cpu_count = os.cpu_count  # which would ask for it
del os.sched_getaffinity
sys.modules["fcntl"] = None
runpy.run_module("tests.main_server", run_name="__main__")
"""


def test_every_mode_runs_where_it_is_not_linux(tiny_flags, tmp_path):
  workdir = f"--workdir={tmp_path / 'w'}"
  saved = {
    "eval": ["--config.eval_batch_size=8"],
    "sample": ["--prompt=a", "--tokens=5"],
    "export": [],
    "plan": [],
  }
  bench = [
    "--config.bench.repeats=1",
    "--config.bench.shapes=layer 0 of step 1",
    f"--config.bench.checkpoint={tmp_path / 'w'}",
  ]
  once = [
    "--config.steps=1",
    "--config.optimizer.warmup_steps=0",
    "--config.model.n_layer=1",
    "--config.model.attention=dense",
  ]
  with serving("-c", _AS_ELSEWHERE) as main:
    for flags in (
      [*tiny_flags, *once, workdir],
      *([f"--mode={mode}", *more, workdir] for mode, more in saved.items()),
      ["--mode=bench", *bench, f"--workdir={tmp_path / 'bench'}"],
    ):
      code, _, err = main(*flags)
      assert code == 0, (flags, err)
