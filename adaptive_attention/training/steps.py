"""One step of training and one of evaluation, as functions of their inputs."""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from adaptive_attention import masks
from adaptive_attention.config import ModelConfig
from adaptive_attention.model import (
  Transformer,
  init_memory,
  mask_params,
  regularizer,
)
from adaptive_attention.training import parallel
from adaptive_attention.training.batches import Batch
from adaptive_attention.training.optimizer import Optimizer


@flax.struct.dataclass
class TrainState:
  """What a step of training changes, the same on every device.

  Attributes:
    step: int32, how many steps have been made.
    params: the model's parameters.
    opt_state: the optimizer's moments and counts.
  """

  step: jax.Array
  params: dict
  opt_state: optax.OptState


def init_state(
  model: Transformer, optimizer: Optimizer, seed: int
) -> TrainState:
  """Draws the state at step 0: parameters from the seed, moments zero."""

  def init(key):
    tokens_BT = jnp.zeros((1, model.config.context_tokens), jnp.int32)
    params = model.init(key, tokens_BT)["params"]
    return TrainState(jnp.int32(0), params, optimizer.init(params))

  return jax.jit(init)(jax.random.key(seed))


def start_memory(config: ModelConfig, streams: int):
  """Makes the memory of this process' devices, of so many streams each; None
  for a model without one."""
  if not config.memory_tokens:
    return None
  return parallel.on_each_device(
    lambda: init_memory(config, streams, config.context_tokens)
  )


def make_train_step(model: Transformer, optimizer: Optimizer, seed: int):
  """step(state, memory, batch) -> (state, memory, metrics), over devices.

  The update is that of the mean over all sequences. If the loss or the gradient
  norm is not finite, state and memory are returned as they were. `stop` is
  summed over all devices into the metrics, so that all processes learn of a
  signal at the same step; `masks` are those of all layers after the update, to
  be counted by the host.

  The memory, of `start_memory`, is None without `model.memory_tokens`. It holds
  the A B streams of a device, those of each accumulation step side by side.

  Args:
    optimizer: the one whose state `init_state` made.
    seed: what dropout follows from.
  """

  def step(state: TrainState, memory, batch: Batch):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    key = jax.random.fold_in(key, parallel.device_index())
    begun = _begun(memory, batch.restart)
    local, memory = _gradient(model, state.params, begun, batch.tokens, key)
    grads, (nats, penalty) = parallel.mean(local)
    loss = nats + penalty
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updated = _where(finite, _updated(optimizer, state, grads), state)
    metrics = {
      "loss": loss,
      "cross_entropy": nats,
      "learning_rate": optimizer.learning_rate(state.step),
      "grad_norm": grad_norm,
      "stop": parallel.total(batch.stop),
      "masks": mask_params(updated.params, model.config),
    } | mask_metrics(updated.params, model.config)
    return updated, _kept(finite, memory, begun), metrics

  return parallel.train_step(step)


def _gradient(model, params, memory, tokens_ABT, key):
  """Averages over all sequences of a device, part by part.

  Returns:
    ((gradient, (nats, penalty)), the memory of all parts after it).
  """
  A, B, _ = tokens_ABT.shape
  value_and_grad = jax.value_and_grad(_loss, has_aux=True)

  def accumulate(carry, part):
    total, left = carry
    index, tokens_BT = part
    (_, (aux, left)), grads = value_and_grad(
      params,
      model,
      tokens_BT,
      _as_far_as(left, memory),  # each part's streams begin where all do
      index * B,
      jax.random.fold_in(key, index),
    )
    return (jax.tree.map(jnp.add, total, (grads, aux)), left), None

  zeros = (jax.tree.map(jnp.zeros_like, params), (0.0, 0.0))
  (sums, memory), _ = jax.lax.scan(
    accumulate, (zeros, memory), (jnp.arange(A), tokens_ABT)
  )
  return jax.tree.map(lambda x: x / A, sums), memory


def _loss(params, model, tokens_BT, memory, first_stream, key):
  """Returns nats per token with the penalty: (loss, ((nats, penalty), memory)).

  Args:
    tokens_BT: (B, T + 1) uint8, inputs and the target after each.
    first_stream: the index in the memory of the first of these sequences.
    key: what dropout follows from.
  """
  tokens_BT = tokens_BT.astype(jnp.int32)
  out = model.apply(
    {"params": params},
    tokens_BT[:, :-1],
    train=True,
    memory=memory,
    batch=first_stream,
    rngs={"dropout": key},
  )
  logits_BTV, memory = (out, None) if memory is None else out
  nats = jnp.mean(cross_entropy(logits_BTV, tokens_BT[:, 1:]))
  penalty = regularizer(params, model.config)
  return nats + penalty, ((nats, penalty), memory)


def _updated(optimizer, state, grads) -> TrainState:
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  return TrainState(state.step + 1, params, opt_state)


def _where(condition, tree, otherwise):
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), tree, otherwise)


def _begun(memory, restart):
  """Returns the memory, having read nothing where its streams start anew."""
  if memory is None:
    return None
  return memory.replace(tokens_read=jnp.where(restart, 0, memory.tokens_read))


def _as_far_as(memory, other):
  """Returns the memory, having read as much as the other has."""
  if memory is None:
    return None
  return memory.replace(tokens_read=other.tokens_read)


def _kept(finite, memory, begun):
  """Returns the memory after a step that was made, or before one that failed.

  What was written stands where nothing is looked at: to go back is to have read
  no more.
  """
  if memory is None:
    return None
  return memory.replace(
    tokens_read=jnp.where(finite, memory.tokens_read, begun.tokens_read)
  )


def mask_metrics(params, config: ModelConfig) -> dict[str, jax.Array]:
  """Returns means over all heads: span in tokens, open share of distances."""
  layers = mask_params(params, config)
  T = config.reach_tokens
  return {
    "span_mean": jnp.mean(jnp.stack([mask.span for mask in layers])),
    "open_share": jnp.mean(
      jnp.stack([masks.open_share(mask, T) for mask in layers])
    ),
  }


def make_eval_step(model: Transformer):
  """step(params, memory, tokens_B(T+1)) -> (memory, nats_BT), over devices.

  Nats of each byte after those before it in its row, or, with a memory, after
  those that were read before.
  """

  def step(params, memory, tokens):
    tokens = tokens.astype(jnp.int32)
    out = model.apply({"params": params}, tokens[:, :-1], memory=memory)
    logits_BTV, memory = (out, None) if memory is None else out
    return memory, cross_entropy(logits_BTV, tokens[:, 1:])

  return parallel.eval_step(step)


def cross_entropy(logits_BTV, targets_BT):
  """nats_BT = -log softmax(logits)[target], of each token, in float32."""
  return optax.softmax_cross_entropy_with_integer_labels(
    logits_BTV.astype(jnp.float32), targets_BT
  )
