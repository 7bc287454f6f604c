"""Which implementation serves a call on a device, and why no better one."""

from typing import NamedTuple

import jax

from adaptive_attention.attention.layout import BLOCK

IMPLEMENTATIONS = ("blocked", "reference", "pallas_tpu", "pallas_gpu")

# Of one array over all pairs. On an accelerator without a kernel, dense
# attention takes a few launches, and `blocked` some for each of its blocks.
_MOST_PAIRS_BYTES = 1 << 30
# Without a roll of lanes by another count in each row, or products in Triton.
_OLD_TPUS = ("TPU v2", "TPU v3", "TPU v4")
_LEAST_GPU = 8  # the first number of compute capability, as of sm_80


class Call(NamedTuple):
  """What is static of a call of `attend`, as far as a choice depends on it.

  Attributes:
    B, T, S, H, K: streams, queries, keys, heads of queries and their width.
    itemsize: bytes of a number of q, k and v.
    strided: whether a head may have another stride than one.
    relative: whether there are vectors of distances.
    memory: keys without a gradient.
    segments: whether there are `Segments`.
    axes: names of the explicit mesh axes along which arrays are dealt.
  """

  B: int
  T: int
  S: int
  H: int
  K: int
  itemsize: int
  strided: bool
  relative: bool = False
  memory: int = 0
  segments: bool = False
  axes: tuple[str, ...] = ()


class Choice(NamedTuple):
  """What runs.

  Attributes:
    implementation: its name.
    blocks: sizes of its blocks as text; "" for the reference.
    reason: why not a better one; "" where it is the best.
  """

  implementation: str
  blocks: str
  reason: str = ""

  def __str__(self) -> str:
    text = self.implementation
    if self.blocks:
      text += f" in blocks of {self.blocks}"
    return f"{text}, as {self.reason}" if self.reason else text


def call_of(
  q_BTHK,
  k_BSGK,
  *,
  mask,
  memory,
  ring=None,
  relative_RK=None,
  segments=None,
  **others,
) -> Call:
  """Returns the `Call` of these arguments; other arguments decide nothing."""
  del others
  B, T, H, K = q_BTHK.shape
  S = k_BSGK.shape[1] if ring is None else ring.k_NSHK.shape[1]
  strided = mask is not None and mask.wave is not None and mask.wave.integer
  itemsize = q_BTHK.dtype.itemsize
  has = relative_RK is not None, memory, segments is not None
  return Call(B, T, S, H, K, itemsize, strided, *has)


def device():
  """Returns the device that is compiled for: JAX's default one.

  `jax.default_device` changes it, also to one that is not there.
  """
  default = jax.config.jax_default_device
  if default is None or isinstance(default, str):
    return jax.local_devices(backend=default)[0]
  return default


def chosen(
  call: Call, implementation: str | None = None, interpret: object = False
) -> Choice:
  """Returns what serves a call.

  Args:
    implementation: a name to insist on, or None for the best on `device()`.
    interpret: whether a Pallas kernel runs on any device.

  Raises:
    ValueError: an unknown implementation, or nothing to interpret.
    NotImplementedError: a named implementation that cannot serve the call.
  """
  if implementation is not None:
    check_name(implementation)
    if interpret and not implementation.startswith("pallas"):
      raise ValueError(
        f"interpret={interpret!r} is for Pallas kernels and implementation="
        f"{implementation!r} has none; leave it out"
      )
    reason = refusal(call, implementation, interpret)
    if reason:
      raise NotImplementedError(
        f"implementation={implementation!r} does not serve here, as {reason}; "
        "leave it out for the best that serves"
      )
    return Choice(implementation, _blocks_text(call, implementation))
  if interpret:
    raise ValueError(
      f"interpret={interpret!r} needs implementation='pallas_tpu' or "
      "'pallas_gpu', the kernel to interpret"
    )
  return _best(call)


def check_name(implementation):
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"implementation={implementation!r} is unknown; choose one of "
      f"{', '.join(IMPLEMENTATIONS)}, or None for the best that serves"
    )


def _best(call: Call) -> Choice:
  platform = device().platform
  if platform == "cpu" and not call.axes:
    return Choice("blocked", _blocks_text(call, "blocked"))
  name = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}.get(platform)
  if platform == "cpu":
    reason = f"blocked does not serve this call: {refusal(call, 'blocked')}"
  elif name is None:
    reason = f"there is no kernel for the device {device().device_kind}"
  else:
    reason = refusal(call, name)
    if not reason:
      return Choice(name, _blocks_text(call, name))
    reason = f"{name} does not serve this call: {reason}"
  fits = 4 * call.B * call.H * call.T * call.S <= _MOST_PAIRS_BYTES
  other = "reference" if fits or call.axes else "blocked"
  return Choice(other, _blocks_text(call, other), reason)


def refusal(call: Call, implementation: str, interpret: object = False) -> str:
  """Returns why an implementation cannot serve a call; "" if it can."""
  if implementation == "blocked" and call.axes:
    axes = ", ".join(call.axes)
    return f"it does not compute over explicit mesh axes ({axes})"
  if not implementation.startswith("pallas"):
    return ""
  reason = "" if interpret else refusal_of_device(implementation)
  return reason or kernel(implementation).refusal(call)


def refusal_of_device(implementation: str) -> str:
  """Returns why an implementation does not run on `device()`, or ""."""
  if not implementation.startswith("pallas"):
    return ""
  here = device()
  if implementation == "pallas_tpu":
    wanted = "a TPU v5e or later"
    serves = here.platform == "tpu"
    serves &= not here.device_kind.startswith(_OLD_TPUS)
  else:
    wanted = "an NVIDIA GPU of compute capability 8.0 or later"
    capability = str(getattr(here, "compute_capability", "")).split(".")[0]
    serves = here.platform == "gpu" and capability.isdecimal()
    serves = serves and int(capability) >= _LEAST_GPU
  kind = here.device_kind
  return "" if serves else f"it needs {wanted} and the device is {kind}"


def kernel(implementation: str):
  """Returns the module of a Pallas implementation; only its users import it."""
  match implementation:
    case "pallas_tpu":
      from adaptive_attention.attention import pallas_tpu

      return pallas_tpu
    case "pallas_gpu":
      from adaptive_attention.attention import pallas_gpu

      return pallas_gpu


def block_sizes(call: Call, implementation: str) -> tuple[int, int]:
  """Returns the rows of query blocks and of key blocks of the forward pass."""
  if implementation.startswith("pallas"):
    return kernel(implementation).launch(call).forward_blocks
  return BLOCK, BLOCK


def _blocks_text(call, implementation):
  if implementation == "reference":
    return ""
  return " x ".join(map(str, block_sizes(call, implementation)))
