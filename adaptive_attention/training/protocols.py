"""How a split is read: its parts, and what a prediction may attend to.

"window": disjoint windows. "stride:N": windows that start every N tokens, of
whose predictions the last N count. "memory": the split is read like one stream
with the model's memory, cut into several; each but the first is warmed with the
tokens before it that its predictions depend on: through L layers up to L
memories, or less far where the reaches are short. "memory:N": the same with a
memory of N tokens, whatever the model was trained with.
"""

import dataclasses
import re

from adaptive_attention.config import ModelConfig
from adaptive_attention.errors import SettingsError


def default(config: ModelConfig) -> str:
  """Returns "memory" for a model that has one, else "window"."""
  return "memory" if config.memory_tokens else "window"


def check(protocol: str, config: ModelConfig):
  """Checks that a protocol is known and fits the model.

  Raises:
    SettingsError: it is not "window", "memory", "memory:N" or "stride:N", the
      stride is not in 1..context, or the model has no memory.
  """
  match re.fullmatch(r"window|memory(?::\d+)?|stride:(\d+)", protocol):
    case None:
      raise SettingsError(
        f"--protocol={protocol} is unknown; expected window, stride:N, memory "
        "or memory:N"
      )
    case found if found[1] is not None:
      if not 1 <= int(found[1]) <= config.context_tokens:
        raise SettingsError(
          f"--protocol={protocol} is not possible; expected a stride from 1 to "
          f"the context of {config.context_tokens} tokens"
        )
  if protocol == "memory" and not config.memory_tokens:
    raise SettingsError(
      "--protocol=memory needs a model that was trained with "
      "model.memory_tokens; choose window, stride:N or memory:N"
    )
  if protocol not in ("memory", f"memory:{config.memory_tokens}") and (
    reads_streams(protocol)
  ):
    raise SettingsError(
      f"--protocol={protocol} needs a model of that memory, not of "
      f"{config.memory_tokens} tokens; `model_for` makes one"
    )


def model_for(protocol: str, config: ModelConfig) -> ModelConfig:
  """Returns the settings by which a protocol reads a model.

  "memory:N" gives it a memory of N tokens, whatever it was trained with.

  Raises:
    SettingsError: as `check`, or the model cannot have that memory.
  """
  if found := re.fullmatch(r"memory:(\d+)", protocol):
    config = _with_memory(config, int(found[1]), protocol)
  check(protocol, config)
  return config


def _with_memory(config, N, protocol):
  try:
    changed = dataclasses.replace(config, memory_tokens=N, remat="none")
  except ValueError as error:
    raise SettingsError(f"--protocol={protocol}: {error}") from error
  vectors = changed.relative_tokens, config.relative_tokens
  if N < 1 or (config.position == "relative" and vectors[0] != vectors[1]):
    raise SettingsError(
      f"--protocol={protocol} is not possible; expected a memory of 1 token or "
      "more and, where model.position='relative' without spans, of the "
      f"{config.memory_tokens} that vectors were learned for"
    )
  return changed


def memory_of(protocol: str, config: ModelConfig) -> int:
  """Returns how many tokens before its own row a prediction may attend to."""
  return config.memory_tokens if reads_streams(protocol) else 0


def reads_streams(protocol: str) -> bool:
  """Returns whether a split is read on and on, with a memory."""
  return protocol.split(":")[0] == "memory"
