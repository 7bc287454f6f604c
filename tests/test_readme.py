"""The commands and examples of README work."""

import pathlib
import re
import shlex
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_attention import gpt2, mask_params
from adaptive_attention.command_line import flags as command_line
from adaptive_attention.command_line.uses import USES
from adaptive_attention.config import ModelConfig
from adaptive_attention.mask_parameters import with_lengths
from adaptive_attention.training import settings
from configs import base
from tests import drawn

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
  return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
  """Yields the flags of each call of main.py, from lines put together."""
  for block in blocks("sh"):
    for line in block.replace("\\\n", " ").splitlines():
      words = shlex.split(line, comments=True)
      if "main.py" in words:
        yield words[words.index("main.py") + 1 :]


def test_its_pictures_are_there_and_small():
  pictures = re.findall(r"!\[[^\]]{40,}\]\(([^)]+)\)", README)
  assert len(pictures) == README.count("![") == 3
  for picture in pictures:
    content = (ROOT / picture).read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) < 1 << 18


def test_the_two_commands_come_first():
  first, second = blocks("sh")[:2]
  install = "pip install -r requirements.txt"
  assert first.strip() == (
    f"{install} && python main.py --config configs/quickstart.py"
  )
  assert second.strip() == (
    f"{install} -r requirements-dev.txt && python -m pytest"
  )


def write_gpt2(folder, **sizes):
  config = ModelConfig(
    n_head=12,
    vocab_size=256,
    position="learned_once",
    attention="dense",
    bias=True,
    gelu="tanh",
    **sizes,
  )
  params = drawn.parameters(config, scale=0.02)
  gpt2.write(folder, jax.device_get(params), config)


# What differs from another command by settings alone: tests/test_main.py checks
# those of each config.
ELSEWHERE = "configs/enwik8_rotary.py", "configs/enwik8_8k.py", "runs/mine"


def test_commands_run(main, text, tmp_path):
  """Each runs as it is written, but short and in the test's own folders."""
  short = [
    "--config.steps=2",
    "--config.batch_size=2",
    "--config.model.n_layer=1",
    "--config.model.vocab_size=256",
    "--config.model.width=48",  # of 4, 8 and 12 heads
    "--config.model.context_tokens=64",
    "--config.model.implementation=reference",
    "--config.report=False",  # tests/report has its tests
    f"--config.data.path={text}",
  ]
  write_gpt2(tmp_path / "gpt2", n_layer=1, width=48, context_tokens=64)
  shutil.copytree(ROOT / "models", tmp_path / "models")
  ran = 0
  for flags in commands():
    mode = next((f for f in flags if f.startswith("--mode=")), "--mode=train")
    tried = any(flag in ELSEWHERE for flag in flags)
    if mode in ("--mode=bench", "--mode=inspect") or tried:
      # Other tests run them, on what they need.
      command_line.parse(
        ["main.py", *flags], ROOT / "configs", base.get_config()
      )
      continue
    # All runs share a folder of their config's name under the test's own.
    if mode not in ("--mode=train", "--mode=plan"):
      flags = [f.replace("runs/", f"{tmp_path}/") for f in flags]
      flags = [f.replace("models/", f"{tmp_path}/models/") for f in flags]
      flags += ["--tokens=9"] if mode == "--mode=sample" else []
    else:
      folder = next(f for f in flags if f.startswith("configs/"))
      if "--workdir" in flags:
        folder = flags[flags.index("--workdir") + 1]
      flags = [f for f in flags if not f.startswith(("--workdir", "runs/"))]
      flags = [f.replace("=runs/", f"={tmp_path}/") for f in flags] + short
      flags = [f.replace("=gpt2", f"={tmp_path}/gpt2") for f in flags]
      if mode == "--mode=train":
        own = pathlib.Path(folder).stem
        flags.append(f"--workdir={tmp_path / own}")
    code, _, err = main(*flags)
    assert code == 0, (flags, err)
    ran += 1
  assert ran == 13


def test_the_module_example_is_as_it_says():
  example = blocks("python")[0]
  names = {}
  exec(example, names)
  assert len(example.split("\n\n")[1].strip().splitlines()) <= 6
  layer = names["Layer"]()
  x_BTD = jnp.ones((2, 5, 32))
  params = layer.init(jax.random.key(0), x_BTD)
  assert isinstance(layer, nn.Module)
  assert layer.apply(params, x_BTD).shape == (2, 5, 32)


def swapped(example, difference):
  """Returns the lines of an example with those of a difference changed."""
  old, added = [], "import optax\n"
  for line in difference.splitlines():
    text = line[1:] + "\n"
    if line[0] == "-":
      old.append(text)
    elif old:
      assert example.count("".join(old)) == 1
      example, old = example.replace("".join(old), text), []
    else:
      added += text
  return example.replace("import optax\n", added)


def test_the_models_of_others_are_as_they_say(capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  own = blocks("python")[1].replace("range(300)", "range(2)")
  assert len(own.splitlines()) < 50
  (difference,) = blocks("diff")
  ours = swapped(own, difference)
  assert "MultiHead" in own and "MultiHead" not in ours
  shapes = {}
  for example in (own, ours):
    names = {}
    exec(example, names)
    assert re.fullmatch(r"\d\.\d\d bits per byte\n", capsys.readouterr().out)
    shapes[example] = jax.tree.map(jnp.shape, names["params"])
  layers = mask_params(names["params"], names["LAYER"])
  assert [mask.span.shape for mask in layers] == [(4,), (4,)]
  assert "span_logit" not in str(shapes[own])


def test_the_attend_example_is_as_it_says():
  q_BTHK = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 2, 4)))
  q_BTHK = q_BTHK.astype(jnp.float32)
  names = {"q_BTHK": q_BTHK, "k_BSHK": q_BTHK, "v_BSHK": q_BTHK}
  exec(blocks("python")[2], names)
  assert names["out_BTHK"].shape == (1, 5, 2, 4)


def test_the_state_example_is_as_it_says():
  tokens_BT = jnp.zeros((4, 512), int)
  small = "n_layer=1, width=16, "
  example = blocks("python")[3].replace("Config(", f"Config({small}")
  config = ModelConfig(n_layer=1, width=16, max_span=2048, position="rotary")
  names = {"params": drawn.parameters(config), "tokens_BT": tokens_BT}
  exec(example, names)
  assert names["logits_BTV"].shape == (4, 512, 256)
  assert names["state"].tokens_read == 512
  whole = names["state"].nbytes
  names["params"] = with_lengths(
    names["params"], config, lambda _, length: np.full_like(length, 100.0)
  )
  exec(blocks("python")[4], names)
  assert names["logits_BTV"].shape == (4, 512, 256)
  # 1.2 (100 + 32 + 511) of 2,560 rows
  assert names["state"].nbytes / whole == pytest.approx(0.302, abs=0.001)


def test_the_writing_example_is_as_it_says(capsys):
  config = ModelConfig(
    n_layer=1, width=16, n_head=2, max_span=16, position="rotary"
  )
  prompt_BT = np.zeros((2, 5), int)
  names = {"config": config, "prompt_BT": prompt_BT}
  names["params"] = drawn.parameters(config)
  exec(blocks("python")[5], names)
  assert names["tokens_BT"].shape == (2, 100)
  assert int(capsys.readouterr().out) == names["state"].nbytes
  assert names["state"].tokens_read == 6


def test_the_table_of_modes_has_their_flags():
  rows = re.findall(
    r"^\| (\w+)(?: \(default\))? \| .* \| ([\w, ]+) \|$", README, re.M
  )
  told = {mode: {*flags.split(", ")} for mode, flags in rows}
  expected = {}
  for use in USES:
    expected.setdefault(use.mode, set()).update(use.flags())
  for mode, flags in expected.items():
    always = {"config", "workdir"}  # most modes take these for the folder alone
    assert told[mode] - always == flags - always, mode


def test_files_and_flags_that_readme_names_exist():
  for path in re.findall(r"\]\(([\w/.]+)\)", README):
    assert (ROOT / path).exists(), path
  names = settings.flatten(base.get_config())
  for name in re.findall(r"--config\.([a-z_]+(?:\.[a-z_0-9]+)?)", README):
    assert name in names, name
