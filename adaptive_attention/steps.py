"""One step of training and one of evaluation, as functions of their inputs."""

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

from adaptive_attention import losses, masks, optimizer, parallel
from adaptive_attention.model import ModelConfig, Transformer, mask_params


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


def make_train_step(config):
  """step(state, tokens_NAB(T+1), stop_N) -> (state, metrics), over devices.

  A counts the accumulation steps, B the sequences of one. The update is that
  of the mean over all sequences. If the loss or the gradient norm is not
  finite the state is returned as it was. `stop` is summed over all devices
  into the metrics, so that all processes learn of a signal at the same step;
  `masks` are those of all layers after the update, to be counted by the host.
  """
  model_config = ModelConfig(**config.model)
  schedule = optimizer.learning_rate(config.optimizer, config.steps)
  seed = config.seed

  def loss_fn(params, tokens, key, apply_fn):
    tokens = tokens.astype(jnp.int32)
    logits_BTV = apply_fn(
      {"params": params}, tokens[:, :-1], train=True, rngs={"dropout": key}
    )
    cross_entropy = jnp.mean(losses.cross_entropy(logits_BTV, tokens[:, 1:]))
    penalty = losses.regularizer(params, model_config)
    return cross_entropy + penalty, (cross_entropy, penalty)

  def step(state, tokens_ABT, stop):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    key = jax.random.fold_in(key, parallel.device_index())

    def accumulate(total, part):
      index, tokens_BT = part
      (_, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params, tokens_BT, jax.random.fold_in(key, index), state.apply_fn
      )
      return jax.tree.map(jnp.add, total, (grads, aux)), None

    A = tokens_ABT.shape[0]
    zeros = (jax.tree.map(jnp.zeros_like, state.params), (0.0, 0.0))
    sums, _ = jax.lax.scan(accumulate, zeros, (jnp.arange(A), tokens_ABT))
    grads, (cross_entropy, penalty) = parallel.mean(
      jax.tree.map(lambda x: x / A, sums)
    )
    loss = cross_entropy + penalty
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updated = state.apply_gradients(grads=grads)
    updated = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old), updated, state
    )
    metrics = {
      "loss": loss,
      "cross_entropy": cross_entropy,
      "learning_rate": schedule(state.step),
      "grad_norm": grad_norm,
      "stop": parallel.total(stop),
      "masks": mask_params(updated.params, model_config),
    } | mask_metrics(updated.params, model_config)
    return updated, metrics

  return parallel.train_step(step)


def batch_shapes(config):
  """The shapes of what a training step takes besides the state."""
  N, A = parallel.local_device_count(), config.accumulation_steps
  B = config.batch_size // (parallel.device_count() * A)
  T = config.model.context_tokens
  return (
    jax.ShapeDtypeStruct((N, A, B, T + 1), jnp.uint8),
    jax.ShapeDtypeStruct((N,), jnp.int32),
  )


def mask_metrics(params, config: ModelConfig):
  """Means over all heads: span in tokens, open share of the distances."""
  layers = mask_params(params, config)
  T = config.context_tokens
  return {
    "span_mean": jnp.mean(jnp.stack([mask.span for mask in layers])),
    "open_share": jnp.mean(
      jnp.stack([masks.open_share(mask, T) for mask in layers])
    ),
  }


def make_eval_step(config: ModelConfig):
  """step(params, tokens_NB(T+1)) -> nats_NBT of each byte after its window."""
  model = Transformer(config)

  def step(params, tokens):
    tokens = tokens.astype(jnp.int32)
    logits_BTV = model.apply({"params": params}, tokens[:, :-1])
    return losses.cross_entropy(logits_BTV, tokens[:, 1:])

  return parallel.eval_step(step)
