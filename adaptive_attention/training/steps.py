"""One step of training and one of evaluation, as functions of their inputs."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import optax

from adaptive_attention import masks
from adaptive_attention.config import ModelConfig
from adaptive_attention.mask_parameters import mask_params, regularizer
from adaptive_attention.model import Transformer
from adaptive_attention.segment_memory import Groups
from adaptive_attention.state import State, Stateless, init_memory
from adaptive_attention.training import parallel
from adaptive_attention.training.batches import Batch
from adaptive_attention.training.optimizer import Optimizer


@flax.struct.dataclass
class TrainState:
  """What a training step changes: the train state, the same on every device.

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
  """Draws the train state at step 0: parameters from the seed, moments zero."""
  return _drawn(jax.random.key(seed), model, optimizer)


# Traced once, though the room for the train state is counted before it is
# drawn.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _drawn(key, model, optimizer):
  tokens_BT = jnp.zeros((1, model.config.context_tokens), jnp.int32)
  params = model.init(key, tokens_BT)["params"]
  return TrainState(jnp.int32(0), params, optimizer.init(params))


def start_memory(
  config: ModelConfig,
  streams: int,
  groups: tuple[Groups, ...] | None = None,
) -> State | Stateless:
  """Makes the memory of this process' devices, each with `streams` streams.

  Args:
    groups: as in `init_memory`.
  """
  if not config.memory_tokens:
    return Stateless(config.n_layer)
  return parallel.on_each_device(
    lambda: init_memory(config, streams, config.context_tokens, groups)
  )


def make_train_step(model: Transformer, optimizer: Optimizer, seed: int):
  """Makes step(state, memory, batch) -> (state, memory, metrics).

  It runs on all devices. The update is that of the mean over all sequences. If
  the loss or the gradient norm is not finite, train state and memory are
  returned as they were. The metric `stop` is a sum over all devices, so that
  all processes learn of a signal at the same step. Those of `mask_metrics` are
  of the masks after the update.

  The memory, of `start_memory`, holds the A B streams of a device, those of
  each accumulation step side by side.

  Args:
    optimizer: the one of the train state that `init_state` made.
    seed: the number that dropout follows from.
  """

  def step(state: TrainState, memory, batch: Batch):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    key = jax.random.fold_in(key, parallel.device_index())
    tokens_read = jnp.where(batch.restart, jnp.uint32(0), memory.tokens_read)
    local, memory = _gradient(
      *(model, optimizer.trained, state.params),
      *(memory.at(tokens_read), batch.tokens, key),
    )
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
    } | mask_metrics(updated.params, model.config)
    # What was written is not visible until it counts as read. So the memory
    # goes back by its count of tokens.
    memory = memory.at(jnp.where(finite, memory.tokens_read, tokens_read))
    return updated, memory, metrics

  return parallel.train_step(step)


def _gradient(model, trained, params, memory, tokens_ABT, key):
  """Computes the mean gradient over all sequences of a device, part by part.

  Returns:
    ((gradient, (nats, penalty)), the memory of all parts after it).
  """
  A, B, _ = tokens_ABT.shape
  value_and_grad = jax.value_and_grad(
    lambda params, *rest: _loss(trained(params), *rest), has_aux=True
  )

  def accumulate(carry, part):
    total, left = carry
    index, tokens_BT = part
    (_, (aux, left)), grads = value_and_grad(
      params,
      model,
      tokens_BT,
      left.at(memory.tokens_read),  # each part's streams begin where all do
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
  """Computes nats per token plus penalty: (loss, ((nats, penalty), memory)).

  Args:
    tokens_BT: (B, T + 1) int32, inputs and the target after each.
    first_stream: the index in the memory of the first of these sequences.
    key: the key that dropout follows from.
  """
  logits_BTV, memory = model.apply(
    {"params": params},
    tokens_BT[:, :-1],
    train=True,
    state=memory.of_streams(first_stream),
    rngs={"dropout": key},
  )
  nats = jnp.mean(cross_entropy(logits_BTV, tokens_BT[:, 1:]))
  penalty = regularizer(params, model.config)
  return nats + penalty, ((nats, penalty), memory.of_streams(None))


def _updated(optimizer, state, grads) -> TrainState:
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  return TrainState(state.step + 1, params, opt_state)


def _where(condition, tree, otherwise):
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), tree, otherwise)


def mask_metrics(params, config: ModelConfig) -> dict:
  """Returns the masks of all layers, and what of them is told of a step.

  Returns:
    `masks`, (a Mask per layer, (L, H) the share of the distances that each head
    leaves open), and the means over all heads: `open_share`, and `span_mean` in
    tokens.
  """
  layers = mask_params(params, config)
  T = config.max_context_tokens
  shares_LH = jnp.stack([masks.open_share(mask, T) for mask in layers])
  return {
    "masks": (layers, shares_LH),
    "open_share": jnp.mean(shares_LH),
    "span_mean": jnp.mean(jnp.stack([mask.span for mask in layers])),
  }


def make_eval_step(model: Transformer):
  """Makes step(params, memory, tokens_B(T+1)) -> (memory, nats_BT).

  It runs on this process' devices. The nats of a token are those after the
  tokens before it in its row and, with a memory, after those that were read
  before.
  """

  def step(params, memory, tokens):
    logits_BTV, memory = model.apply(
      {"params": params}, tokens[:, :-1], state=memory
    )
    return memory, cross_entropy(logits_BTV, tokens[:, 1:])

  return parallel.eval_step(step)


def cross_entropy(logits_BTV, targets_BT):
  """Returns nats_BT = -log softmax(logits)[target] per token, in float32."""
  return optax.softmax_cross_entropy_with_integer_labels(
    logits_BTV.astype(jnp.float32), targets_BT
  )
