"""The ways to call main.py: a table of them, and the flags that each takes."""

import dataclasses
import fnmatch
import importlib
import inspect


@dataclasses.dataclass(frozen=True)
class Use:
  """One way to call main.py.

  Attributes:
    mode: the name of a file of modes/, whose `run` is called.
    given: the flags that must be given too, as they are typed.
    does: a sentence about what it does.
    settings: patterns of the settings that act, as words; a word with "!" names
      settings that do not act.
    saved: whether the settings are those of a checkpoint.
    without: flags that would do nothing here, although `run` takes them.
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
    """Returns the default of each flag that it takes; None without a default.

    Every use takes the folder and the file of settings. Its other flags are the
    keyword parameters of `run`, except the data.
    """
    known = {"workdir": None, "config": None}
    for name, parameter in self.parameters().items():
      if name != "corpus":
        default = parameter.default
        known[name] = None if default is parameter.empty else default
    return {n: v for n, v in known.items() if n not in self.without.split()}


_PROCESSES = (
  "distributed coordinator_address process_count process_index "
  "heartbeat_seconds"
)
_COMPUTING = "model.dtype model.implementation"
_MEASURING = f"cpu_devices eval_batch_size eval_tokens data.* {_COMPUTING}"
_TRAINING_ON = (
  "seed batch_size accumulation_steps *_every_steps keep_checkpoints "
  "tensorboard wandb report model.dropout model.remat model.span_coef "
  "optimizer.* !optimizer.name !optimizer.mask_lr_multiplier"
)
USES = (
  Use(
    "train",
    "--config=FILE",
    "Trains, or goes on from the newest checkpoint of the run.",
    "* !bench.* !target",
  ),
  Use(
    "eval",
    "",
    "Evaluates a run's checkpoint in bits per character.",
    f"{_MEASURING} {_PROCESSES}",
    saved=True,
  ),
  Use(
    "sample",
    "",
    "Continues a prompt with texts that the model writes.",
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
    "Rounds spans and periods first, and saves a run in WORKDIR/hardened.",
    _MEASURING,
    saved=True,
  ),
  Use(
    "export",
    "--harden --finetune_steps=N",
    "Trains that run on for N steps with its spans and periods fixed.",
    f"{_MEASURING} {_TRAINING_ON}",
    saved=True,
  ),
  Use(
    "inspect",
    "",
    "Shows what each head learned; writes tables, figures and report.html.",
    f"cpu_devices {_COMPUTING}",
    saved=True,
  ),
  Use(
    "inspect",
    "--inspect_bytes=N",
    "Also tells how the loss of N bytes changes without a part of each head.",
    f"cpu_devices eval_batch_size data.* {_COMPUTING}",
    saved=True,
  ),
  Use(
    "plan",
    "--config=FILE",
    "Counts and compiles what a training run would take, and does not train.",
    "* !bench.* !stop_seconds "
    + " ".join(f"!{name}" for name in _PROCESSES.split()),
    without="step",
  ),
  Use(
    "plan",
    "",
    "Does the same for a saved run, with the masks that it has learned.",
    "cpu_devices target steps batch_size accumulation_steps train_only "
    "model.dropout "
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
