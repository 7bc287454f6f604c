"""Each flag and setting acts or is refused, in each way of calling main.py."""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import pathlib

import pytest

import main as program
from adaptive_attention.command_line import (
  flags,
  help_page,
  prepare,
  workdirs,
)
from adaptive_attention.command_line.uses import EXAMPLES, USES
from adaptive_attention.errors import SettingsError
from adaptive_attention.report import whole
from adaptive_attention.training import (
  parallel,
  processes,
  settings,
)
from configs import base
from tests.conftest import TINY

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = settings.flatten(base.get_config())
BASE = f"--config={ROOT / 'configs' / 'base.py'}"
# For each flag, a value that differs from its defaults.
VALUES = {
  "workdir": "elsewhere",
  "config": BASE.split("=")[1],
  "step": "12",
  "split": "test",
  "protocol": "stride:6",
  "against": "another",
  "against_protocol": "window",
  "compare": "one,two",
  "heads": "0.0",
  "inspect_bytes": 400,
  "prompt": "query",
  "prompt_file": "some/file",
  "tokens": 7,
  "temperature": 0.5,
  "top_k": 3,
  "top_p": 0.25,
  "num": 2,
  "seed": 2**32 - 1,
  "harden": True,
  "finetune_steps": 3,
  "layout": "gpt2",
  "dtype": "bfloat16",
}
by_name = pytest.mark.parametrize("use", USES, ids=lambda use: use.name)


MODES = {
  name: importlib.import_module(f"adaptive_attention.modes.{name}")
  for name in flags.MODES
}


def parse(*argv):
  return flags.parse(["main.py", *argv], ROOT / "configs", base.get_config())


def called(use, *more):
  """Returns the shortest command line of a use, with the flags in `more`."""
  names = [flag.split("=")[0] for flag in more]
  least = [f"--mode={use.mode}", *use.given.split()]
  least = [
    {
      "--config=FILE": BASE,
      "--finetune_steps=N": f"--finetune_steps={VALUES['finetune_steps']}",
      "--inspect_bytes=N": f"--inspect_bytes={VALUES['inspect_bytes']}",
    }.get(word, word)
    for word in least
  ]
  if use.mode not in ("train", "plan", "bench") or use.name == "--mode=plan":
    least.append("--workdir=somewhere")
  return [f for f in least if f.split("=")[0] not in names] + list(more)


@by_name
def test_each_flag_is_taken_or_refused(use):
  for name, value in VALUES.items():
    argv = called(use, f"--{name}={value}")
    if name in use.flags():
      assert parse(*argv).flags[name] == value
      continue
    if use.mode == "plan" and name == "config":
      continue  # that is another use
    said = "means nothing to|add --harden"
    with pytest.raises(SettingsError, match=said) as error:
      parse(*argv)
    assert f"--{name}={value}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mode_is_a_file_of_modes():
  folder = ROOT / "adaptive_attention" / "modes"
  assert {*flags.MODES} == {p.stem for p in folder.glob("[!_]*.py")}


@pytest.mark.parametrize("mode", MODES)
def test_the_parameters_of_a_mode_are_its_flags(mode):
  config, workdir, *named = inspect.signature(
    MODES[mode].run
  ).parameters.values()
  assert (config.name, workdir.name) == ("config", "workdir")
  for parameter in named:
    assert parameter.kind is parameter.KEYWORD_ONLY
    if parameter.name != "corpus":
      flag = flags.FLAGS[parameter.name]
      default = parameter.default
      if default not in (None, parameter.empty):
        # The flag accepts the mode's default.
        argv = ["main.py", f"--{parameter.name}={default}"]
        values = flags._defined()
        values(argv)
        assert values[parameter.name].value == default
        assert type(default) is flag.kind or default in flag.kind


def test_each_flag_is_taken_by_a_mode():
  known = {name for use in USES for name in use.flags()}
  assert known | {"mode"} == flags.FLAGS.keys()
  assert VALUES.keys() == known


@by_name
def test_each_setting_is_taken_or_refused(use):
  for name, value in SETTINGS.items():
    value = value if value != "" else "x"
    argv = called(use, f"--config.{name}={value}")
    if use.acts(name):
      assert name in parse(*argv).overrides
      continue
    with pytest.raises(SettingsError, match="means nothing to") as error:
      parse(*argv)
    assert f"--config.{name}={value}" in str(error.value)


def test_no_setting_is_without_a_use():
  for name in SETTINGS:
    assert any(use.acts(name) for use in USES), name
  for use in USES:
    for word in use.settings.split():
      pattern = dataclasses.replace(use, settings=word.lstrip("!"))
      assert any(map(pattern.acts, SETTINGS)), f"{word} is not a setting"


@pytest.fixture
def stubs(monkeypatch, tiny):
  """Replaces each mode's run; returns the arguments that it is called with."""
  calls = []

  def saved(given, workdir, _):
    calls.append(given)
    return settings.check(tiny), 12, []

  def stub(run):
    @functools.wraps(run)  # the signature too
    def called(*args, **named):
      calls.append((args, named))

    return called

  monkeypatch.setattr(parallel, "start", lambda *_, **__: None)
  monkeypatch.setattr(prepare, "header", lambda *_: [])
  monkeypatch.setattr(prepare, "saved_settings", saved)
  for module in MODES.values():
    monkeypatch.setattr(module, "run", stub(module.run))
  return calls


@by_name
def test_each_flag_that_is_taken_reaches_the_run(use, stubs, text):
  tiny = [f"--config.{name}={value}" for name, value in TINY.items()]
  for name in use.flags():
    if name == "config" and not use.given.startswith("--config"):
      continue  # here it only names the folder; see below
    if (name, use.name) in (
      ("finetune_steps", "--mode=export --harden"),
      ("inspect_bytes", "--mode=inspect"),
    ):
      continue  # that is the next use
    stubs.clear()
    argv = called(use, f"--{name}={VALUES[name]}")
    if use.given == "--config=FILE":
      argv += [*tiny, f"--config.data.path={text}"]
    assert program.main(["main.py", *argv]) == 0
    (_, workdir), named = stubs[-1]
    typed = parse(*argv)  # with --harden it is another use
    given = dict(typed.flags)
    assert name in given
    named_folder = given.pop("workdir", None)
    file = given.pop("config", None)
    assert str(workdir) == (
      named_folder or f"runs/{'base' if file else use.mode}"
    )
    reads = typed.use.acts("data.path") and use.mode != "plan"
    assert (named.pop("corpus", None) is not None) == reads
    if use.saved:
      assert stubs[0].flags.get("step") == given.pop("step", None)
      assert named.pop("step") == 12
    assert named == given


def test_a_mode_has_the_same_defaults_without_its_flags(stubs):
  """A flag that is not given is not passed on."""
  sampled = ["--mode=sample", "--workdir=somewhere", "--prompt=x"]
  assert program.main(["main.py", *sampled]) == 0
  assert stubs[-1][1] == {"prompt": "x", "step": 12}


@pytest.mark.parametrize(
  ("config", "folder"),
  [
    ("configs/enwik8.py", "runs/enwik8"),
    ("configs/deep.py:a/b", "runs/deep_a%2Fb"),
  ],
)
def test_a_config_names_the_folder(config, folder):
  given = dataclasses.replace(
    parse("--mode=eval", "--workdir=x"), flags={"config": config}
  )
  assert workdirs.of(given) == pathlib.Path(folder)


class Noting:
  """A config that notes which of its settings are read by name."""

  def __init__(self, config, noted, prefix=""):
    vars(self).update(_config=config, _noted=noted, _prefix=prefix)

  def __getitem__(self, name):
    value = self._config[name]
    if hasattr(value, "items"):
      return Noting(value, self._noted, f"{self._prefix}{name}.")
    self._noted.add(self._prefix + name)
    return value

  def __getattr__(self, name):
    return self[name] if name in self._config else getattr(self._config, name)

  def __contains__(self, name):
    return name in self._config

  def __setattr__(self, name, value):
    setattr(self._config, name, value)

  __setitem__ = __setattr__

  def copy_and_resolve_references(self):
    return Noting(self._config.copy_and_resolve_references(), self._noted)


class NotingUse:
  """Checked settings that note which of them are used."""

  def __init__(self, checked, noted):
    self._checked, self._noted = checked, noted
    self.given = Noting(checked.given, noted)

  @property
  def model(self):
    """It is made of all settings of the model."""
    self._noted.update(n for n in SETTINGS if n.startswith("model."))
    return self._checked.model

  optimizer = None  # it is made of those that are given


def not_run(use):
  """Returns whether a use is not run here.

  Timing is run by the tests of its mode. The plan of a training has the
  settings of train.
  """
  return use.mode == "bench" or use.name == "--mode=plan --config=FILE"


@pytest.fixture(scope="module")
def acting(text, tmp_path_factory):
  """Returns the settings that each use reads, by its name, in a tiny run.

  The uses for which `not_run` is true are left out.
  """
  workdir = tmp_path_factory.mktemp("acting") / "w"
  flags = [f"--config.{name}={value}" for name, value in TINY.items()]
  flags += ["--config.model.n_layer=1", "--config.steps=3"]
  flags += ["--config.model.implementation=reference"]  # it compiles fast
  flags += [f"--config.data.path={text}", BASE]
  read = {use.name: set() for use in USES}
  restored = prepare.saved_settings

  with pytest.MonkeyPatch.context() as patch:
    # The devices of tests exist already, and there are no other processes.
    patch.setattr(parallel, "start", lambda *_, **__: None)
    patch.setattr(processes, "join", lambda **_: None)
    patch.setattr(whole, "_draw", lambda *_: None)  # it has no settings
    for use in USES:
      noted = read[use.name]

      def saved(*args, noted=noted):
        checked, step, said = restored(*args)
        return NotingUse(checked, noted), step, said

      patch.setattr(prepare, "saved_settings", saved)
      if not_run(use):
        continue
      argv = called(use, f"--workdir={workdir}")
      if use.given == "--config=FILE":
        argv = [f for f in argv if f != BASE] + flags
      if use.mode == "sample":
        argv += ["--prompt=x", "--tokens=2"]
      if use.mode == "export":
        argv += ["--step=3"]
      if use.given.startswith("--harden --"):
        (workdir / "hardened").rename(workdir / "hardened before")
      given = parse(*argv)
      given = dataclasses.replace(given, config=Noting(given.config, noted))
      program._run(given)
  return read


@pytest.mark.parametrize(
  "use", [use for use in USES if not not_run(use)], ids=lambda use: use.name
)
def test_each_setting_that_is_taken_is_read(use, acting):
  """All settings of the model are read at once, to make its config."""
  taken = {name for name in SETTINGS if use.acts(name)}
  # data.path decides which other settings of the data are read.
  others = {"data.corpus", "data.cache_dir", "data.bytes_per_token"}
  expected = taken - others
  assert not expected - acting[use.name]


def test_help_lists_each_mode_with_its_flags():
  page = help_page.text(base.get_config())
  for use in USES:
    part = page[page.index(f"{use.name}\n") :].split("\n\n")[0]
    assert all(f"  --{name}" in part for name in use.flags())
  assert "--tokens=500" in page
  assert all(example in page for example in EXAMPLES)
  assert len(EXAMPLES) == 3
  assert max(map(len, page.splitlines())) <= 80
  for example in EXAMPLES:
    words = [word.strip('"') for word in example.split()[2:]]
    with contextlib.chdir(ROOT):
      assert parse(*(word for word in words if word)).use in USES


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpfull", "--helpshort"])
def test_help_is_asked_for(flag, capsys):
  assert program.main(["main.py", "--mode=eval", flag]) == 0
  assert "--mode=train" in capsys.readouterr().out
