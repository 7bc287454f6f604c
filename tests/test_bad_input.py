"""Whatever is given, a sentence says what is wrong, and all files stay."""

import bz2
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import pathlib
import pickle
import socket
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from adaptive_attention import weight_files, weights
from adaptive_attention.command_line import flags
from adaptive_attention.config import ModelConfig
from adaptive_attention.errors import SettingsError
from adaptive_attention.training import bounds, console, settings
from configs import base
from data import CorpusError, text_file, tokens
from tests.conftest import ROOT

often = hypothesis_settings(
  max_examples=100, deadline=10_000, derandomize=True, database=None
)

# The wrong, the extreme and the strange, as they are typed.
FIELDS = settings.flatten(base.get_config())
NUMBERS = st.integers() | st.floats() | st.integers(-(2**70), 2**70)
TYPED = (
  NUMBERS.map(repr)
  | st.text(max_size=30)
  | st.sampled_from(
    (
      *("", "None", "True", "1e3", "1_0", " 1", "0x10", "1e400", "-0.0"),
      *("\u0663", "\u2028", "\udcff", "\n", "{}", "[1]", "../..", "--config"),
      "a" * 5000,
    )
  )
)
WORDS_TYPED = st.lists(
  TYPED | st.sampled_from([f"--{name}" for name in flags.FLAGS])
)


def settled(typed):
  """Returns the settings that flags give, checked as main.py does."""
  read = flags.parse(
    ["main.py", f"--config={ROOT}/configs/base.py", *typed],
    ROOT / "configs",
    base.get_config(),
  )
  if read is None:  # it asked for help
    return None
  return settings.training_config(settings.check(read.config))


@often
@given(st.sampled_from(sorted(FIELDS)), TYPED)
@example("model.harmonics", str(2**40))
@example("model.n_layer", "1000000000")
@example("model.ramp", "1e-320")
@example("optimizer.learning_rate", "1e308")
@example("batch_size", "1000000000")
def test_a_setting_is_right_or_named(name, value):
  try:
    config = settled([f"--config.{name}={value}"])
  except SettingsError as error:
    said = console.one_line(str(error))
    assert said.isprintable() or not value.isprintable()
    assert name.rpartition(".")[2] in said
  else:
    if config is not None:
      assert_sizes(config)


def assert_sizes(config):
  """What a right setting cannot be, as nothing could be compiled from it."""
  model = config.model
  assert 0 < model.n_layer <= 4096
  assert model.context_tokens + model.memory_tokens < 2**31
  assert config.batch_size * model.context_tokens < 2**31
  numbers = [*vars(model).values(), *vars(config.optimizer).values()]
  for value in numbers:
    if isinstance(value, float):
      assert np.isfinite(np.float32(value))


@often
@given(WORDS_TYPED)
def test_words_are_flags_or_refused(words):
  try:
    settled(words)
  except SettingsError as error:
    assert "\n" not in console.one_line(str(error))


def spoiled(content: bytes):
  """Draws a file's bytes with some changed, cut off or added."""
  change = st.tuples(st.integers(0, len(content) - 1), st.binary(max_size=9))

  def changed(drawn):
    found, changes = bytearray(content), drawn[0]
    for at, new in changes:
      found[at : at + len(new)] = new
    return bytes(found[: drawn[1]]) + drawn[2]

  return st.tuples(
    st.lists(change, max_size=3),
    st.integers(0, len(content)) | st.just(len(content)),
    st.just(b"") | st.binary(max_size=20),
  ).map(changed)


WORDS = b" ".join(b"word %d" % i for i in range(400))


def packed(name):
  """Returns the bytes of a file that each reader of data takes."""
  match name:
    case "a.txt":
      return WORDS
    case "a.gz":
      return gzip.compress(WORDS, mtime=0)
    case "a.bz2":
      return bz2.compress(WORDS)
    case "a.xz":
      return lzma.compress(WORDS)
    case "a.zip":
      return written(lambda f: zipped(f, WORDS))
    case "a.npy":
      return written(lambda f: np.save(f, np.arange(500, dtype=np.uint16)))


def written(write):
  file = io.BytesIO()
  write(file)
  return file.getvalue()


def zipped(file, content):
  with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("inside", content)


def read_data(path):
  """Reads text or tokens as main.py does; returns the first tokens."""
  if bounds.holds_tokens(str(path)):
    corpus = tokens.load(path, 512, path.parent / "cache")
  else:
    corpus = text_file.load(path)
  return np.asarray(corpus.train[:9])


@pytest.mark.parametrize(
  "name", ["a.txt", "a.gz", "a.bz2", "a.xz", "a.zip", "a.npy"]
)
def test_data_are_read_or_refused(tmp_path_factory, name):
  folder = tmp_path_factory.mktemp("data")

  @often
  @given(spoiled(packed(name)))
  def check(content):
    path = folder / name
    path.write_bytes(content)
    try:
      read_data(path)
    except CorpusError as error:
      assert name in str(error)
    assert path.read_bytes() == content

  check()


def other_than_files(folder):
  """Yields paths that are there, or seem to be, and are no files."""
  (folder / "folder").mkdir()
  (folder / "loop").symlink_to(folder / "loop")
  (folder / "lost").symlink_to(folder / "nothing")
  os.mkfifo(folder / "fifo")
  with socket.socket(socket.AF_UNIX) as server:
    server.bind(str(folder / "socket"))
  for name in ("folder", "loop", "lost", "fifo", "socket", "nothing"):
    yield folder / name
  yield pathlib.Path("/dev/zero")


def test_what_is_no_file(tmp_path):
  for path in other_than_files(tmp_path):
    with pytest.raises(CorpusError, match="give"):
      read_data(path)
    for suffix in ("", ".npz", ".safetensors", ".pt"):
      with pytest.raises(weights.WeightsError, match="init_from="):
        weights.load(f"{path}{suffix}", MODEL)


@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_a_file_of_hardly_any_bytes(tmp_path, size):
  for name in ("a.txt", "a.npy"):
    (tmp_path / name).write_bytes(b"\x1f" * size)
    with pytest.raises(CorpusError, match=name):
      read_data(tmp_path / name)


MODEL = ModelConfig(n_layer=1, n_head=2, width=8, context_tokens=4)


class Trap:
  """What a pickle would call if it were read."""

  def __init__(self, path):
    self._path = path

  def __reduce__(self):
    return (pathlib.Path.touch, (self._path,))


def header(fields) -> bytes:
  """A .safetensors of this header, and of eight bytes."""
  text = json.dumps(fields).encode()
  return struct.pack("<Q", len(text)) + text + bytes(8)


def of_shape(shape, ends=(0, 8), kind="F32"):
  return header({"a": {"dtype": kind, "shape": shape, "data_offsets": ends}})


def npy(shape, dtype="<f4") -> bytes:
  fields = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}"
  text = fields.encode().ljust(117) + b"\n"
  return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(8)


@pytest.mark.parametrize(
  "content",
  [
    struct.pack("<Q", 2**63) + b"{}",
    struct.pack("<Q", 2**64 - 1),
    b"",
    b"{}",
    header({}),
    header([]),
    header({"a": 3}),
    of_shape([2**63]),
    of_shape([2**32, 2**32]),
    of_shape([-2]),
    of_shape([2], (0, 2**63)),
    of_shape([2], (8, 0)),
    of_shape([2], kind="F31"),
    of_shape([2]),
  ],
)
def test_hostile_safetensors(tmp_path, content):
  path = tmp_path / "model.safetensors"
  path.write_bytes(content)
  with pytest.raises(weights.WeightsError, match=r"init_from=.*model.safe"):
    weights.load(path, MODEL)


@contextlib.contextmanager
def most_taken():
  """Yields a list that then holds the most bytes that were taken at once."""
  taken = []
  tracemalloc.start()
  try:
    yield taken
  finally:
    taken.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()


@pytest.mark.parametrize(
  "member",
  [
    npy("(2,)"),
    npy(f"({2**62},)"),
    npy(f"({2**40}, {2**40})"),
    npy("(-1,)"),
    npy("(2,)", "|O"),
    npy("(256, 8)"),
    npy("(256, 8)", "|O"),
    npy("(256, 8)", "|V2147483647"),
    npy("(__import__('os').getpid(),)"),
    b"\x93NUMPY\x09\x09" + npy("(256, 8)")[8:],
    b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 24) + b" " * (1 << 24),
    b"",
  ],
)
def test_hostile_npz(tmp_path, member):
  with zipfile.ZipFile(
    tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED
  ) as archive:
    archive.writestr("param/transformer.wte.weight.npy", member)
  with (
    most_taken() as taken,
    pytest.raises(weights.WeightsError, match=r"init_from=.*a\.npz"),
  ):
    weights.load(tmp_path / "a.npz", MODEL)
  assert taken[0] < 1 << 22


@pytest.mark.parametrize("name", ["transformer.wte.weight", "lm_head.weight"])
def test_an_npz_of_more_than_the_model_takes_is_not_unpacked(tmp_path, name):
  """So many zeros take a thousandth of that in the file."""
  shapes = weights._published_shapes(MODEL)
  params = {name: np.zeros(shape, "f4") for name, shape in shapes.items()}
  params[name] = np.zeros(1 << 24, "f4")
  np.savez_compressed(tmp_path / "a.npz", **params)
  with (
    most_taken() as taken,
    pytest.raises(weights.WeightsError, match=name),
  ):
    weights.load(tmp_path / "a.npz", MODEL)
  assert taken[0] < 1 << 22


@pytest.mark.parametrize("name", ["a.npz", "a.pt", "a.safetensors", "a.npy"])
def test_no_pickle_is_executed(tmp_path, name):
  trap = tmp_path / "sprung"
  array = np.full((256, 8), Trap(trap), dtype=object)
  if name.endswith(".npz"):
    np.savez(tmp_path / name, **{"transformer.wte.weight": array})
  elif name.endswith(".npy"):
    np.save(tmp_path / name, array, allow_pickle=True)
  else:
    (tmp_path / name).write_bytes(pickle.dumps(Trap(trap)))
  with pytest.raises((weights.WeightsError, CorpusError), match=name):
    if name.endswith(".npy"):
      read_data(tmp_path / name)
    else:
      weights.load(tmp_path / name, MODEL)
  assert not trap.exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.npz"])
def test_weights_are_read_or_refused(tmp_path_factory, name):
  path = tmp_path_factory.mktemp("weights") / name
  array = np.arange(256 * 8, dtype=np.float32).reshape(256, 8)
  if name.endswith(".npz"):
    np.savez_compressed(path, **{"transformer.wte.weight": array})
  else:
    weight_files.write_arrays(path, {"a": array}, {"config": "{}"})

  @often
  @given(spoiled(path.read_bytes()))
  def check(content):
    path.write_bytes(content)
    with pytest.raises(weights.WeightsError, match=r"init_from="):
      weights.load(path, MODEL)

  check()


@pytest.mark.parametrize(
  "error",
  [
    "KeyboardInterrupt",
    "GeneratorExit",
    "RecursionError",
    "MemoryError('a\\nb')",
    "BaseException('\\udcff')",
    "type('E', (Exception,), {'__str__': lambda self: 1 / 0})()",
  ],
)
def test_a_config_may_raise_anything(tmp_path, error):
  path = tmp_path / "config.py"
  path.write_text(f"def get_config():\n  raise {error}\n")
  with pytest.raises(SettingsError, match=r"config\.py fails \("):
    flags.parse(
      ["main.py", f"--config={path}"], ROOT / "configs", base.get_config()
    )


def content(folder):
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


@pytest.mark.parametrize(
  "name", ["config.json", "environment.json", "metrics.jsonl", "masks.jsonl"]
)
def test_a_folder_of_another_program_is_left(main, tiny_flags, tmp_path, name):
  """Its files may have our names."""
  (tmp_path / name).write_text('{"step": 9, "model_type": "gpt2"}\n')
  (tmp_path / "weights.bin").write_bytes(b"mine")
  before = content(tmp_path)
  code, _, err = main(*tiny_flags, f"--workdir={tmp_path}")
  assert code == 1
  assert f"workdir {tmp_path} holds {name}" in err
  assert err.count("\n") == 1
  assert content(tmp_path) == before


def test_workdirs_that_cannot_be(main, tiny_flags, tmp_path):
  """Also for root, whom the rights of a folder do not stop."""
  (tmp_path / "file").write_bytes(b"mine")
  (tmp_path / "link").symlink_to(tmp_path / "file")
  (tmp_path / "lost").symlink_to("/proc/nothing")
  before = content(tmp_path)
  for workdir in (
    *(tmp_path / name for name in ("file", "link", "lost", "file/below")),
    "/proc/w",
    "/dev/null",
    f"{tmp_path}/{'a' * 300}",
  ):
    code, _, err = main(*tiny_flags, f"--workdir={workdir}")
    assert code in (1, 2), workdir
    assert err.startswith("main.py: ")
    assert err.count("\n") == 1
    assert str(workdir) in err or "proc" in err
  assert content(tmp_path) == before
