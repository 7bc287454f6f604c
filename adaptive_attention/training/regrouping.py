"""How much each head keeps of a segment memory, as spans move in training.

A head keeps what it reaches, and a margin. Rings are made anew for the masks of
a step in two cases: a head has used up three quarters of its margin, or the
step is saved or evaluated and a quarter of all bytes can go. They are replaced
after the step that follows. That does not depend on where a run was
interrupted, so that a resumed run computes the same. A span may outgrow the
last quarter of its margin within these two steps: the head then lacks its
farthest keys until the rings are replaced.

A step whose rings have other lengths is another program, which is compiled.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from adaptive_attention import segment_memory
from adaptive_attention.attention.head_groups import Group
from adaptive_attention.config import ModelConfig
from adaptive_attention.masks import Mask
from adaptive_attention.segment_memory import Groups, memory_groups
from adaptive_attention.state import State
from adaptive_attention.training import console, parallel

_LEFT = 1 / 4  # of the margin of a head, before its ring is made longer
_WORTH = 0.75  # rings that become shorter take at most so much of the bytes


def groups_for(
  layers: Sequence[Mask], config: ModelConfig
) -> tuple[Groups, ...]:
  """Returns the groups of a memory that has read nothing, for these masks."""
  return memory_groups(layers, config, config.context_tokens)


def serves(
  groups: tuple[Groups, ...],
  layers: Sequence[Mask],
  config: ModelConfig,
  *,
  shrinks: bool,
) -> bool:
  """Tells whether a memory of these groups can go on as it is.

  It is called after each step, and computes nothing on a device.

  Args:
    layers: the mask of each layer.
    shrinks: whether to let go of what is not needed.
  """
  if not segment_memory.holds(groups, layers, config, _LEFT):
    return False
  if not shrinks:
    return True
  sizes = segment_memory.sizes(config, config.context_tokens)
  rows, needed = (
    sum(map(sizes.all_rows, of_layers))
    for of_layers in (groups, groups_for(layers, config))
  )
  return needed > _WORTH * rows


def regrouped(
  memory: State, layers: Sequence[Mask], config: ModelConfig
) -> State:
  """Returns the memory of this process' devices in rings for these masks.

  A line says how many bytes it takes, before and after.

  Args:
    memory: the memory, with the devices' axis N in front.
    layers: the mask of each layer.
  """
  T = config.context_tokens
  read = int(np.asarray(memory.tokens_read)[0])
  held_LG = [layer.held(read) for layer in memory.layers]
  groups = memory_groups(layers, config, T, held_LG)
  moved = parallel.each_device(lambda state: state.regrouped(groups, T), memory)
  parallel.drop_programs()
  changed = sum(
    old != new for old, new in zip(memory.groups, groups, strict=True)
  )
  reach_LG = segment_memory.reaches(layers, config, T)
  beyond = sum(
    int(reach_G[h]) > group.rows
    for reach_G, of_layer in zip(reach_LG, memory.groups, strict=True)
    for group in of_layer
    for h in group.heads
  )
  console.say(
    f"memory     follows the spans of {changed} of {len(groups)} layer(s): "
    f"{console.bytes_text(device_bytes(memory))} -> "
    f"{console.bytes_text(device_bytes(moved))} per device"
    + (f"; {beyond} head(s) reach further than was held" if beyond else "")
  )
  return moved


def device_bytes(memory: State) -> int:
  """Returns the bytes of a memory's keys and values on a device."""
  return memory.nbytes // parallel.local_device_count()


def say(memory: State, config: ModelConfig, streams: int):
  """Prints the bytes of a memory on a device, and what they could become.

  Args:
    streams: how many streams a device has.
  """
  T = config.context_tokens
  rows = segment_memory.ring_rows(config.memory_tokens, T)
  heads = config.n_layer * config.n_kv_head
  most = streams * heads * rows * config.key_value_bytes
  said = (
    f"{console.bytes_text(device_bytes(memory))} of keys and values per device "
    f"for what heads reach, {console.bytes_text(most)} if each held all of it"
  )
  if config.wave is not None and config.wave.integer:
    said += "; waves save none of it, as what a query skips later ones read"
  console.say(f"memory     {said}")


def record(memory: State) -> list:
  """Returns the groups of a memory as JSON; `from_meta` reads it."""
  return [
    [[list(group.heads), group.rows] for group in layer]
    for layer in memory.groups
  ]


def from_meta(meta: Mapping, config: ModelConfig) -> tuple[Groups, ...] | None:
  """Returns the groups of a checkpoint's memory; None if it says none.

  Args:
    meta: of the checkpoint, with the `record` of its memory, if it has one.
  """
  if "memory_groups" not in meta:
    return None
  queries = config.n_head // config.n_kv_head
  return tuple(
    tuple(Group(tuple(heads), queries, 1, rows, (0,)) for heads, rows in layer)
    for layer in meta["memory_groups"]
  )
