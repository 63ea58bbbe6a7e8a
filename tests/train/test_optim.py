"""The optimizer against optax's own, its schedule, and decay by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowjax.train import optim

PARAMS = {
  "dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones((2,))},
}


def _run(optimizer, steps=4):
  params, state = PARAMS, optimizer.init(PARAMS)
  for i in range(steps):
    grads = jax.tree.map(lambda p, i=i: jnp.sin(p * (i + 1)), params)
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params


@pytest.mark.slow(1)
def test_adamw_is_that_of_optax_with_the_decay_of_kernels_alone():
  config = optim.OptimConfig(
    learning_rate=0.1, weight_decay=0.3, beta2=0.95, clip_norm=0.5
  )
  mask = {"dense": {"kernel": True, "bias": False}}
  reference = optax.chain(
    optax.clip_by_global_norm(0.5),
    optax.adamw(0.1, b2=0.95, weight_decay=0.3, mask=mask),
  )
  ours, theirs = _run(optim.build(config, 100, PARAMS)), _run(reference)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs
  )


def test_a_parameter_without_a_decay_rule_lists_itself():
  config = optim.OptimConfig(weight_decay_rules=((".*/kernel", 1.0),))
  with pytest.raises(ValueError, match="dense/bias"):
    optim.build(config, 10, PARAMS)


@pytest.mark.parametrize(
  ("kind", "last"), [("constant", 1.0), ("cosine", 0.1), ("linear", 0.1)]
)
def test_the_schedule_warms_up_then_follows_its_kind(kind, last):
  config = optim.OptimConfig(
    learning_rate=1.0,
    warmup_steps=4,
    schedule=kind,
    final_learning_rate=0.1,
  )
  rate = optim.schedule(config, 104)
  warm = [float(rate(i)) for i in range(5)]
  np.testing.assert_allclose(warm, [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
  assert float(rate(104)) == pytest.approx(last)
  halfway = {"constant": 1.0, "cosine": 0.55, "linear": 0.55}[kind]
  assert float(rate(54)) == pytest.approx(halfway, rel=1e-5)


@pytest.mark.parametrize(
  "values",
  [
    {"schedule": "cosin"},
    {"learning_rate": 0.0},
    {"beta2": 1.0},
    {"clip_norm": -1.0},
    {"accumulate": 0},
  ],
)
def test_impossible_values_are_refused(values):
  with pytest.raises(ValueError, match=next(iter(values))):
    optim.OptimConfig(**values)
