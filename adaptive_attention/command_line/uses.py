"""What main.py can be called for, with which flags and settings: a table."""

import dataclasses
import fnmatch


@dataclasses.dataclass(frozen=True)
class Use:
  """One way to call main.py.

  Attributes:
    mode: the mode.
    given: what must be given besides, as it is typed.
    does: what it does.
    flags: those it takes, as words.
    settings: patterns of those that act, as words; with "!" of those that do
      not.
  """

  mode: str
  given: str
  does: str
  flags: str
  settings: str = ""

  @property
  def name(self) -> str:
    return f"--mode={self.mode} {self.given}".rstrip()

  def acts(self, setting: str) -> bool:
    """Whether the setting changes anything."""

    def found(patterns):
      return any(fnmatch.fnmatchcase(setting, p) for p in patterns)

    words = self.settings.split()
    return found(words) and not found(w[1:] for w in words if w[0] == "!")


_PROCESSES = "distributed coordinator_address process_count process_index"
_COMPUTING = "model.dtype model.implementation"
_MEASURING = f"cpu_devices eval_batch_size eval_tokens data.* {_COMPUTING}"
_TRAINING_ON = (
  "seed batch_size accumulation_steps *_every_steps keep_checkpoints "
  "tensorboard wandb model.dropout model.remat model.span_coef optimizer.* "
  "!optimizer.name !optimizer.mask_lr_multiplier"
)
_RUN = "workdir config step"
USES = (
  Use(
    "train",
    "--config=FILE",
    "Trains, or goes on from the newest checkpoint of the run.",
    _RUN,
    "* !bench.*",
  ),
  Use(
    "eval",
    "",
    "Tells the bits per character of a run's checkpoint.",
    f"{_RUN} split protocol",
    f"{_MEASURING} {_PROCESSES}",
  ),
  Use(
    "sample",
    "",
    "Writes texts on from a prompt.",
    f"{_RUN} prompt prompt_file tokens temperature top_k top_p num seed",
    f"cpu_devices {_COMPUTING}",
  ),
  Use(
    "export",
    "",
    "Writes a checkpoint's parameters to model.safetensors.",
    f"{_RUN} harden",
    "cpu_devices",
  ),
  Use(
    "export",
    "--harden",
    "Rounds spans and periods first, into a run in WORKDIR/hardened.",
    f"{_RUN} harden finetune_steps",
    _MEASURING,
  ),
  Use(
    "export",
    "--harden --finetune_steps=N",
    "Trains that one on for N steps, spans and periods as they are.",
    f"{_RUN} harden finetune_steps",
    f"{_MEASURING} {_TRAINING_ON}",
  ),
  Use(
    "plan",
    "--config=FILE",
    "Counts and compiles what this training would take, and does not train.",
    "config workdir",
    "* !bench.* " + " ".join(f"!{name}" for name in _PROCESSES.split()),
  ),
  Use(
    "plan",
    "",
    "The same of a run, with the masks that it has learned.",
    "workdir step",
    "cpu_devices steps batch_size accumulation_steps model.dropout "
    f"model.remat optimizer.name {_COMPUTING}",
  ),
  Use(
    "bench",
    "",
    "Times attention, steps and decoding on named shapes.",
    "workdir",
    "cpu_devices bench.* model.bias model.dtype model.harmonics model.period "
    "model.remat optimizer.name",
  ),
)

EXAMPLES = (
  "python main.py --config configs/quickstart.py --config.steps=1000",
  "python main.py --mode=eval --workdir runs/quickstart --split=test",
  'python main.py --mode=sample --workdir runs/quickstart --prompt="def "',
)
