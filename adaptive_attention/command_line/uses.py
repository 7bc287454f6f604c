"""The ways to call main.py: a table, and the flags that each of them takes."""

import dataclasses
import fnmatch
import importlib
import inspect


@dataclasses.dataclass(frozen=True)
class Use:
  """One way to call main.py.

  Attributes:
    mode: the name of a file of modes/, whose `run` is called.
    given: what must be given besides, as it is typed.
    does: what it does.
    settings: patterns of the settings that act, as words; a word with "!" names
      those that do not.
    saved: whether the settings are those of a checkpoint.
    without: flags that would do nothing here, although `run` knows them.
  """

  mode: str
  given: str
  does: str
  settings: str
  saved: bool = False
  without: str = ""

  @property
  def name(self) -> str:
    return f"--mode={self.mode} {self.given}".rstrip()

  def acts(self, setting: str) -> bool:
    """Tells whether the setting changes anything."""

    def found(patterns):
      return any(fnmatch.fnmatchcase(setting, p) for p in patterns)

    words = self.settings.split()
    return found(words) and not found(w[1:] for w in words if w[0] == "!")

  def parameters(self) -> dict[str, inspect.Parameter]:
    """Returns the keyword parameters of the mode's `run`, by name."""
    module = importlib.import_module(f"adaptive_attention.modes.{self.mode}")
    return {
      name: parameter
      for name, parameter in inspect.signature(module.run).parameters.items()
      if parameter.kind is parameter.KEYWORD_ONLY
    }

  def flags(self) -> dict[str, object]:
    """Returns the default of each flag that it takes; None if there is none.

    Every use takes the folder and the file of settings; its other flags are the
    keyword parameters of `run`, but for the data.
    """
    known = {"workdir": None, "config": None}
    for name, parameter in self.parameters().items():
      if name != "corpus":
        default = parameter.default
        known[name] = None if default is parameter.empty else default
    return {n: v for n, v in known.items() if n not in self.without.split()}


_PROCESSES = "distributed coordinator_address process_count process_index"
_COMPUTING = "model.dtype model.implementation"
_MEASURING = f"cpu_devices eval_batch_size eval_tokens data.* {_COMPUTING}"
_TRAINING_ON = (
  "seed batch_size accumulation_steps *_every_steps keep_checkpoints "
  "tensorboard wandb model.dropout model.remat model.span_coef optimizer.* "
  "!optimizer.name !optimizer.mask_lr_multiplier"
)
USES = (
  Use(
    "train",
    "--config=FILE",
    "Trains, or goes on from the newest checkpoint of the run.",
    "* !bench.*",
  ),
  Use(
    "eval",
    "",
    "Tells the bits per character of a run's checkpoint.",
    f"{_MEASURING} {_PROCESSES}",
    saved=True,
  ),
  Use(
    "sample",
    "",
    "Writes texts on from a prompt.",
    f"cpu_devices {_COMPUTING}",
    saved=True,
  ),
  Use(
    "export",
    "",
    "Writes a checkpoint's parameters to model.safetensors.",
    "cpu_devices",
    saved=True,
    without="finetune_steps",
  ),
  Use(
    "export",
    "--harden",
    "Rounds spans and periods first, into a run in WORKDIR/hardened.",
    _MEASURING,
    saved=True,
  ),
  Use(
    "export",
    "--harden --finetune_steps=N",
    "Trains that one on for N steps, spans and periods as they are.",
    f"{_MEASURING} {_TRAINING_ON}",
    saved=True,
  ),
  Use(
    "plan",
    "--config=FILE",
    "Counts and compiles what this training would take, and does not train.",
    "* !bench.* " + " ".join(f"!{name}" for name in _PROCESSES.split()),
    without="step",
  ),
  Use(
    "plan",
    "",
    "The same of a run, with the masks that it has learned.",
    "cpu_devices steps batch_size accumulation_steps model.dropout "
    f"model.remat optimizer.name {_COMPUTING}",
    saved=True,
    without="config",
  ),
  Use(
    "bench",
    "",
    "Times attention, steps and decoding on named shapes.",
    "cpu_devices bench.* model.bias model.dtype model.harmonics model.period "
    "model.remat optimizer.name",
    without="config",
  ),
)

EXAMPLES = (
  "python main.py --config configs/quickstart.py --config.steps=1000",
  "python main.py --mode=eval --workdir runs/quickstart --split=test",
  'python main.py --mode=sample --workdir runs/quickstart --prompt="def "',
)
