"""Times a kernel by a compiled loop that runs it many times.

A kernel ends sooner than the host can start it and wait for it, so that many
rounds of it are timed in one call. Each round takes the results of the round
before, so that the compiler can neither move nor leave out any of the work.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

CALL_SECONDS = 0.05  # about what the rounds of a call take together
MOST_ROUNDS = 1000


def rounds_for(seconds_of: Callable[[int], float]) -> int:
  """Returns how many rounds take about CALL_SECONDS.

  Args:
    seconds_of: (rounds) -> how long a call of so many rounds takes; what a call
      takes beside its rounds is made small by asking a second time.
  """
  rounds = 1
  for _ in range(2):
    rounds = _scaled(rounds, seconds_of(rounds))
  return rounds


def _scaled(rounds, seconds):
  wanted = rounds * CALL_SECONDS / max(seconds, 1e-9)
  return int(min(max(round(wanted), 1), MOST_ROUNDS))


def loop(run, kind: str):
  """Returns jitted (rounds, q, k, v, dout, mask) -> what the last round gives.

  The queries of a round are the output of the one before it, or their
  gradient. One number of the results is written into the keys and the values,
  and zero times one number is added to spans and periods. These keep their
  values, but the compiler must lay out keys and count blocks in each round, as
  a training step does.

  Args:
    run: (q, k, v, mask) -> out, all (B, T, H, K).
    kind: "forward", or "both" for forward and all gradients.
  """
  one = _both if kind == "both" else _forward

  def rounds_of(rounds, q, k, v, dout, mask):
    given = q, k, v, mask, tuple(jnp.zeros_like(x) for x in (q, k, v))
    return lax.fori_loop(
      0, rounds, lambda _, carried: one(run, dout, *carried), given
    )

  return jax.jit(rounds_of)


def _forward(run, dout, q, k, v, mask, results):
  del dout
  out = run(q, k, v, mask)
  number = _last(out)
  zero = 0.0 * number.astype(jnp.float32)
  mask = jax.tree.map(lambda x: x + zero.astype(x.dtype), mask)
  return out, _with_first(k, number), _with_first(v, number), mask, results


def _both(run, dout, q, k, v, mask, results):
  """Runs forward and backward; the loop carries all results.

  The compiler would leave out a result that nothing uses.
  """
  del results
  out, pull = jax.vjp(run, q, k, v, mask)
  dq, dk, dv, d_mask = pull(dout)
  number = _last(out) + _last(dq) + _last(dk) + _last(dv)
  mask = jax.tree.map(lambda x, dx: x + 0.0 * dx, mask, d_mask)
  k, v = _with_first(k, number), _with_first(v, number)
  return dq, k, v, mask, (out, dk, dv)


def _last(x):
  """Returns a number of the last token, which depends on all keys.

  The first token attends to itself alone, so that its output is its value.
  """
  return x[(-1,) * x.ndim]


def _with_first(x, number):
  return x.at[(0,) * x.ndim].set(number.astype(x.dtype))
