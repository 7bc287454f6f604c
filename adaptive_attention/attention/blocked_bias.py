"""What masks and distances add to the logits of a block, and its gradient.

The log weights of a head are a table by distance. Along the diagonals of a
block the distance is one number, so a block takes 2 BLOCK - 1 entries of the
table, each shifted into its diagonal.
"""

import jax.numpy as jnp

from adaptive_attention.attention.layout import BLOCK


def skew(x):
  """Returns (..., BLOCK, BLOCK) from (..., BLOCK, 2 BLOCK - 1), row by row.

  The result at [u, w] is x[u, BLOCK - 1 - u + w]: where the last axis of x is
  by the distances of a block, descending, each pair gets what stands at its
  distance. It is one slice of x with one more column and its rows end to end.
  """
  lead = x.shape[:-2]
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)])
  x = x.reshape(*lead, BLOCK * 2 * BLOCK)
  x = x[..., BLOCK - 1 : BLOCK - 1 + BLOCK * (2 * BLOCK - 1)]
  return x.reshape(*lead, BLOCK, 2 * BLOCK - 1)[..., :BLOCK]


def unskew(y):
  """Returns (..., BLOCK, 2 BLOCK - 1) numbers of pairs by their distance.

  It is the transpose of `skew`.
  """
  lead = y.shape[:-2]
  y = jnp.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, BLOCK - 1)])
  y = y.reshape(*lead, BLOCK * (2 * BLOCK - 1))
  y = jnp.pad(y, [(0, 0)] * (y.ndim - 1) + [(BLOCK - 1, 1)])
  return y.reshape(*lead, BLOCK, 2 * BLOCK)[..., :-1]


def of_partial_block(table_HS, h, distance, exists_C):
  """Returns (BLOCK, BLOCK) the log weights of head h in a block.

  Args:
    table_HS: log weights by distance.
    distance: (2 BLOCK - 1,) of the diagonals, descending; -inf stands where
      there is no such distance.
    exists_C: whether there is a key; -inf stands where there is none.
  """
  S = table_HS.shape[1]
  line = table_HS[h, jnp.clip(distance, 0, S - 1)]
  line = jnp.where((distance >= 0) & (distance < S), line, -jnp.inf)
  toeplitz = skew(jnp.broadcast_to(line, (BLOCK, 2 * BLOCK - 1)))
  return jnp.where(exists_C[None], toeplitz, -jnp.inf)


def added_to_table(d_table_S, bias, distance, stride, d_logits_BQC):
  """Returns the gradient of a head's table with a block's gradient added."""
  if bias is None:  # the log weight is zero there, and has no slope
    return d_table_S
  if bias.ndim == 0:  # a full block reads only the entry of its residue
    rho = distance[-1] % stride
    return d_table_S.at[rho].add(jnp.sum(d_logits_BQC))
  line = jnp.sum(unskew(jnp.sum(d_logits_BQC, axis=0)), axis=0)
  return added_at(d_table_S, distance, line)


def at_distances(relative_RK, distance):
  """Returns (2 BLOCK - 1, K), the vectors of distances; zeros beyond R."""
  if relative_RK is None:
    return None
  R = len(relative_RK)
  vectors_DK = relative_RK[jnp.clip(distance, 0, R - 1)]
  return jnp.where((distance < R)[:, None], vectors_DK, 0.0)


def added_at(x, distance, rows):
  """Returns x with rows added at their distances, if x has these.

  A negative distance is an index from the end of x. No pair has such a
  distance, and its row is zero, so that nothing is added there.
  """
  return x.at[distance].add(rows, mode="drop")


def logits(q_BQK, k_BCK, bias, alike_QC, relative_DK):
  """Returns q (k + p) + log m + log w, for queries divided by sqrt(K).

  It is -inf where the query and the key lie in two segments.
  """
  logits_BQC = jnp.einsum("bqk,bck->bqc", q_BQK, k_BCK)
  if relative_DK is not None:
    logits_BQC += skew(jnp.einsum("bqk,dk->bqd", q_BQK, relative_DK))
  if bias is not None:
    logits_BQC += bias[None] if bias.ndim else bias
  if alike_QC is not None:
    logits_BQC = jnp.where(alike_QC[None], logits_BQC, -jnp.inf)
  return logits_BQC
