"""One step of training and one of evaluation, as functions of their inputs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

from adaptive_attention import masks
from adaptive_attention.config import ModelConfig
from adaptive_attention.mask_parameters import mask_params, regularizer
from adaptive_attention.model import Transformer
from adaptive_attention.state import Stateless, init_memory
from adaptive_attention.training import optimizer, parallel


def init_state(config) -> TrainState:
  """The state at step 0: parameters from config.seed, AdamW's moments zero."""
  model = Transformer(ModelConfig(**config.model))

  def init(key):
    tokens_BT = jnp.zeros((1, model.config.context_tokens), jnp.int32)
    return TrainState.create(
      apply_fn=model.apply,
      params=model.init(key, tokens_BT)["params"],
      tx=make_optimizer(config),
    )

  return jax.jit(init)(jax.random.key(config.seed))


def make_optimizer(config) -> optax.GradientTransformation:
  schedule = optimizer.learning_rate(config.optimizer, config.steps)
  return optimizer.make(config.optimizer, schedule)


class Batch(NamedTuple):
  """What the devices take at a step, each leaf with their axis N in front.

  Attributes:
    tokens: (A, B, T + 1) uint8; A accumulation steps of B sequences each.
    stop: int32, whether a signal came in.
    restart: bool, whether the streams start anew with this segment.
  """

  tokens: jax.Array
  stop: jax.Array
  restart: jax.Array


def make_train_step(config):
  """step(state, memory, batch) -> (state, memory, metrics), over devices.

  The update is that of the mean over all sequences. If the loss or the gradient
  norm is not finite state and memory are returned as they were. `stop` is
  summed over all devices into the metrics, so that all processes learn of a
  signal at the same step; `masks` are those of all layers after the update, to
  be counted by the host.

  The memory, of `start_memory`, is None without `model.memory_tokens`. It holds
  the A B streams of a device, those of each accumulation step side by side.
  """
  model_config = ModelConfig(**config.model)
  schedule = optimizer.learning_rate(config.optimizer, config.steps)
  seed = config.seed

  def loss_fn(params, tokens, memory, first_stream, key, apply_fn):
    tokens = tokens.astype(jnp.int32)
    logits_BTV, memory = apply_fn(
      {"params": params},
      tokens[:, :-1],
      train=True,
      state=memory.of_streams(first_stream),
      rngs={"dropout": key},
    )
    nats_BT = cross_entropy(logits_BTV, tokens[:, 1:])
    mean = jnp.mean(nats_BT)
    penalty = regularizer(params, model_config)
    return mean + penalty, ((mean, penalty), memory.of_streams(None))

  def step(state, memory, batch):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    key = jax.random.fold_in(key, parallel.device_index())

    A, B, _ = batch.tokens.shape
    tokens_read = jnp.where(batch.restart, jnp.uint32(0), memory.tokens_read)

    def accumulate(carry, part):
      total, memory = carry
      index, tokens_BT = part
      memory = memory.at(tokens_read)  # Each part's streams begin where all do.
      (_, (aux, memory)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params,
        tokens_BT,
        memory,
        index * B,
        jax.random.fold_in(key, index),
        state.apply_fn,
      )
      return (jax.tree.map(jnp.add, total, (grads, aux)), memory), None

    zeros = (jax.tree.map(jnp.zeros_like, state.params), (0.0, 0.0))
    (sums, memory), _ = jax.lax.scan(
      accumulate, (zeros, memory), (jnp.arange(A), batch.tokens)
    )
    grads, (nats, penalty) = parallel.mean(jax.tree.map(lambda x: x / A, sums))
    loss = nats + penalty
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updated = state.apply_gradients(grads=grads)
    updated = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old), updated, state
    )
    metrics = {
      "loss": loss,
      "cross_entropy": nats,
      "learning_rate": schedule(state.step),
      "grad_norm": grad_norm,
      "stop": parallel.total(batch.stop),
      "masks": mask_params(updated.params, model_config),
    } | mask_metrics(updated.params, model_config)
    # What was written stands where nothing is visible: to go back is to have
    # read nothing.
    memory = memory.at(jnp.where(finite, memory.tokens_read, tokens_read))
    return updated, memory, metrics

  return parallel.train_step(step)


def start_memory(config: ModelConfig, streams: int):
  """The memory of this process' devices, of so many streams each, or None."""
  if not config.memory_tokens:
    return Stateless(config.n_layer)
  return parallel.on_each_device(
    lambda: init_memory(config, streams, config.context_tokens)
  )


def streams_per_device(config) -> int:
  """How many sequences a device reads side by side in training."""
  return config.batch_size // parallel.device_count()


def batch_shapes(config) -> Batch:
  """The shapes of what a training step takes besides state and memory."""
  N, A = parallel.local_device_count(), config.accumulation_steps
  B = config.batch_size // (parallel.device_count() * A)
  T = config.model.context_tokens
  return Batch(
    jax.ShapeDtypeStruct((N, A, B, T + 1), jnp.uint8),
    jax.ShapeDtypeStruct((N,), jnp.int32),
    jax.ShapeDtypeStruct((N,), jnp.bool_),
  )


def mask_metrics(params, config: ModelConfig):
  """Means over all heads: span in tokens, open share of the distances."""
  layers = mask_params(params, config)
  T = config.max_context_tokens
  return {
    "span_mean": jnp.mean(jnp.stack([mask.span for mask in layers])),
    "open_share": jnp.mean(
      jnp.stack([masks.open_share(mask, T) for mask in layers])
    ),
  }


def make_eval_step(config: ModelConfig):
  """step(params, memory, tokens_B(T+1)) -> (memory, nats_BT), over devices.

  Nats of each byte after those before it in its row, or, with a memory, after
  those that were read before.
  """
  model = Transformer(config)

  def step(params, memory, tokens):
    tokens = tokens.astype(jnp.int32)
    logits_BTV, memory = model.apply(
      {"params": params}, tokens[:, :-1], state=memory
    )
    return memory, cross_entropy(logits_BTV, tokens[:, 1:])

  return parallel.eval_step(step)


def cross_entropy(logits_BTV, targets_BT):
  """nats_BT = -log softmax(logits)[target], of each token, in float32."""
  return optax.softmax_cross_entropy_with_integer_labels(
    logits_BTV.astype(jnp.float32), targets_BT
  )
