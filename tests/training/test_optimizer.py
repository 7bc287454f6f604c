"""The schedule, and what weight decay and the masks' own rate touch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptive_attention.config import OptimizerConfig
from adaptive_attention.errors import SettingsError
from adaptive_attention.training import optimizer


def test_the_rate_rises_linearly_and_falls_as_a_cosine():
  rate = optimizer.make(OptimizerConfig(), total_steps=1100).learning_rate
  for step, expected in (
    (0, 0.0),
    (50, 5e-4),
    (100, 1e-3),
    (600, (1e-3 + 1e-4) / 2),
    (1100, 1e-4),
    (2000, 1e-4),
  ):
    np.testing.assert_allclose(rate(step), expected, rtol=1e-5)


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 10), (100, 50)])
def test_the_rate_of_odd_settings_is_finite(warmup, total):
  config = OptimizerConfig(warmup_steps=warmup)
  rate = optimizer.learning_rate(config, total)
  assert np.isfinite([rate(i) for i in range(total + 1)]).all()


PARAMS = {
  "kernel": jnp.ones((2, 2)),
  "bias": jnp.ones(2),
  "attention": {"span_logit": jnp.ones(2), "period_logit": jnp.ones(2)},
}


def update(config, grads):
  chain = optimizer.transformation(config, 0.1)
  return chain.update(grads, chain.init(PARAMS), PARAMS)[0]


def test_only_matrices_decay():
  updates = update(OptimizerConfig(), jax.tree.map(jnp.zeros_like, PARAMS))
  np.testing.assert_allclose(updates["kernel"], -0.1 * 0.1)
  assert not np.any(updates["bias"])
  assert not np.any(updates["attention"]["span_logit"])


def test_spans_and_waves_have_their_own_rate():
  config = OptimizerConfig(mask_lr_multiplier=5.0)
  updates = update(config, jax.tree.map(jnp.ones_like, PARAMS))
  ratio = updates["attention"]["span_logit"] / updates["bias"]
  np.testing.assert_allclose(ratio, 5.0, rtol=1e-6)
  ratio = updates["attention"]["period_logit"] / updates["bias"]
  np.testing.assert_allclose(ratio, 5.0, rtol=1e-6)


def test_the_norm_of_each_is_clipped_alone():
  config = OptimizerConfig(clip="tensor", clip_norm=3.0)
  chain = optimizer.transformation(config, 0.1)
  grads = jax.tree.map(lambda p: p, PARAMS) | {"kernel": 100 * jnp.ones((2, 2))}
  _, state = chain.update(grads, chain.init(PARAMS), PARAMS)
  mu = state[1][0].mu  # (1 - beta1) * clipped gradient
  scale = 1 - config.beta1
  np.testing.assert_allclose(mu["kernel"], scale * 3 / 2, rtol=1e-5)
  np.testing.assert_allclose(mu["bias"], scale, rtol=1e-5)


def test_adagrad_divides_by_the_root_of_all_squares():
  config = OptimizerConfig(
    name="adagrad", weight_decay=0.0, clip_norm=1e6, mask_lr_multiplier=2.0
  )
  chain = optimizer.transformation(config, 0.1)
  state = chain.init(PARAMS)
  for gradient, total in ((3.0, 9.0), (4.0, 25.0), (0.0, 25.0)):
    grads = jax.tree.map(lambda p, g=gradient: g * p, PARAMS)
    updates, state = chain.update(grads, state, PARAMS)
    expected = -0.1 * gradient / np.sqrt(total)
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-6)
    np.testing.assert_allclose(
      updates["attention"]["span_logit"], 2 * expected, rtol=1e-6
    )
  # A parameter that never had a gradient stays.
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  updates, _ = chain.update(zeros, chain.init(PARAMS), PARAMS)
  assert not any(np.any(x) for x in jax.tree.leaves(updates))


def test_the_norm_over_all_is_clipped():
  config = OptimizerConfig(clip_norm=1.0)
  chain = optimizer.transformation(config, 0.1)
  grads = jax.tree.map(lambda p: 100 * p, PARAMS)
  _, state = chain.update(grads, chain.init(PARAMS), PARAMS)
  mu = state[1][0].mu  # (1 - beta1) * clipped gradient
  norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(mu)))
  np.testing.assert_allclose(norm, 1 - config.beta1, rtol=1e-5)


def test_it_tells_the_rate_that_it_has():
  config = OptimizerConfig(warmup_steps=2, weight_decay=0.0, beta1=0.0)
  rule = optimizer.make(config, 10)
  state, grads = rule.init(PARAMS), jax.tree.map(jnp.ones_like, PARAMS)
  for step in range(4):
    updates, state = rule.update(grads, state, PARAMS)
    np.testing.assert_allclose(  # of equal gradients Adam takes the sign
      updates["bias"], -rule.learning_rate(step), rtol=1e-4
    )


@pytest.mark.parametrize("train_only", ["masks", "span", "^attention/"])
def test_masks_alone_are_trained(train_only):
  """Nothing else moves, decays, or counts where the gradient is clipped."""
  params = PARAMS | {"attention": {"span_logit": jnp.array([1.0, -2.0])}}
  config = OptimizerConfig(warmup_steps=0, clip_norm=1e-3)
  rule = optimizer.make(config, 10, train_only)

  def loss(params):
    params = rule.trained(params)
    return sum(jnp.sum(jnp.square(x + 1)) for x in jax.tree.leaves(params))

  grads = jax.grad(loss)(params)
  assert optax.tree.norm(grads) == optax.tree.norm(grads["attention"]) > 0
  updates, state = rule.update(grads, rule.init(params), params)
  moved = optax.apply_updates(params, updates)
  assert (moved["attention"]["span_logit"] != np.array([1.0, -2.0])).all()
  moved["attention"] = params["attention"]
  jax.tree.map(np.testing.assert_array_equal, moved, params)
  # The state is that of any run, which may train all parameters later.
  whole = optimizer.make(config, 10).init(params)
  assert [x.shape for x in jax.tree.leaves(whole)] == [
    x.shape for x in jax.tree.leaves(state)
  ]


def test_an_expression_that_finds_nothing_is_named():
  rule = optimizer.make(OptimizerConfig(), 10, "perod")
  with pytest.raises(SettingsError, match="train_only='perod' finds no"):
    rule.init(PARAMS)


@pytest.mark.parametrize(
  ("changes", "expected"),
  [
    ({"name": "sgd"}, "one of ('adamw', 'adagrad')"),
    ({"clip": "norm"}, "one of ('global', 'tensor')"),
    ({"learning_rate": float("nan")}, "a finite number"),
    ({"weight_decay": float("inf")}, "a finite number"),
    ({"warmup_steps": -1}, "at least 0"),
    ({"beta2": 1.0}, "less than 1"),
    ({"clip_norm": 0.0}, "more than 0"),
    ({"min_learning_rate": 1.0}, "at most optimizer.learning_rate=0.001"),
  ],
  ids=str,
)
def test_what_an_optimizer_cannot_have_is_named(changes, expected):
  [(name, value)] = changes.items()
  with pytest.raises(ValueError) as error:
    OptimizerConfig(**changes)
  assert str(error.value) == (
    f"optimizer.{name}={value!r} is not possible; expected {expected}"
  )
