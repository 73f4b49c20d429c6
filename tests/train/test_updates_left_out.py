"""An update that has nothing to learn from, or does not come out finite, changes nothing and is counted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from apr_jax.parallel.mesh import make_mesh
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.rl.update import Updater
from apr_jax.train.state import TrainState, apply_gradients, create_state
from tests.train.small import on_mesh, small_config
from tests.train.test_grpo import CONFIG, TOKENIZER, made_up_rollouts, sequences_of

PARAMS = {"w": jnp.ones((4, 4)), "b": jnp.ones((4,))}
GRADS = {"w": jnp.full((4, 4), 1e-3), "b": jnp.full((4,), 1e-3)}
BROKEN = {
    "b2=1": optax.adamw(1e-3, b2=1.0),
    "b1=1": optax.adamw(1e-3, b1=1.0),
    "rate is NaN": optax.adamw(float("nan")),
    "rate is infinite": optax.sgd(float("inf")),
    "schedule gives NaN": optax.adamw(lambda step: 1e-3 * jnp.sqrt(0.5 - step)),
    "eps=0 at a zero gradient": optax.adamw(1e-3, eps=0.0),
    "weights overflow": optax.sgd(1e38, momentum=0.9),
    "moments overflow": optax.scale_by_adam(b2=0.5),
    "one moment alone": optax.trace(decay=float("nan")),
    "weight decay": optax.adamw(1.0, weight_decay=float("inf")),
}


def _state(optimizer, params=PARAMS):
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


@pytest.mark.parametrize("jitted", [True, False], ids=["jitted", "eager"])
@pytest.mark.parametrize("name", BROKEN)
def test_an_update_that_is_not_finite_leaves_everything_as_it_is(name, jitted):
    optimizer = BROKEN[name]
    grads = {"w": GRADS["w"].at[0, 0].set(0.0), "b": GRADS["b"]}
    if "overflow" in name:
        grads = {"w": GRADS["w"].at[1, 1].set(9e18), "b": GRADS["b"]}
        optimizer = optax.chain(optax.scale(1e10), optimizer)
    state = _state(optimizer)
    apply = (jax.jit if jitted else lambda f: f)(lambda state, grads: apply_gradients(state, grads, 1.0, optimizer))
    while True:
        after, metrics = apply(state, grads)
        if float(metrics["skipped_rate"]) == 1 or int(after.step) > 2:
            break
        state = after
    assert float(metrics["skipped_rate"]) == 1
    assert float(metrics["no_signal_rate"]) == 0
    assert int(after.step) == int(state.step) + 1
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (state.params, state.opt_state))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((after.params, after.opt_state)))


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize(("gradient", "loss"), [(0.0, 0.0), (0.0, 2.0), (-0.0, 0.0)])
def test_a_gradient_of_zero_moves_neither_weights_nor_moments_nor_the_schedule(name, gradient, loss):
    config = dataclasses.replace(small_config().sft.optimizer, name=name, weight_decay=0.1, warmup_steps=4)
    config = dataclasses.replace(config, muon_learning_rate=0.02, learning_rate=1e-3)
    model = small_config().model
    optimizer = make_optimizer(config, 10)
    state = create_state(make_mesh(small_config().mesh), model, optimizer)
    apply = jax.jit(lambda state, grads, loss: apply_gradients(state, grads, loss, optimizer))
    grads = jax.tree.map(lambda p: jnp.ones_like(p) * 1e-3, state.params)
    state, metrics = apply(state, grads, 1.0)  # there is momentum now
    assert (float(metrics["no_signal_rate"]), float(metrics["skipped_rate"])) == (0, 0)
    after, metrics = apply(state, jax.tree.map(lambda g: g * gradient, grads), loss)
    assert (float(metrics["no_signal_rate"]), float(metrics["skipped_rate"])) == (1, 0)
    assert int(after.step) == 2
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (state.params, state.opt_state))


@pytest.mark.heavy
@pytest.mark.parametrize(("kl_coef", "mesh"), [(0.0, {}), (1e-3, {}), (1e-3, {"data": 2, "fsdp": 2})], ids=str)
def test_a_grpo_step_without_a_signal_changes_nothing_under_muon(kl_coef, mesh):
    """With a KL term the gradient is not 0: two compiled programs of one policy differ in their last bits."""
    muon = dataclasses.replace(CONFIG.grpo.optimizer, name="muon", muon_learning_rate=0.02, weight_decay=0.1)
    grpo = dataclasses.replace(CONFIG.grpo, optimizer=muon, kl_coef=kl_coef, inner_updates=2)
    config = on_mesh(dataclasses.replace(CONFIG, grpo=grpo), **mesh)
    updater = Updater(config, make_mesh(config.mesh), TOKENIZER)
    state = create_state(make_mesh(config.mesh), config.model, updater.optimizer)
    before = jax.tree.map(np.array, state)
    sequences = sequences_of(config, made_up_rollouts())
    for sequence in sequences:
        sequence["advantage"][:] = 0.0
    reference = jax.tree.map(jnp.copy, state.params) if kl_coef else None
    state, metrics, _ = updater.update(state, updater.microbatches(sequences), reference)
    assert (float(metrics["no_signal_rate"]), float(metrics["skipped_rate"])) == (1, 0)
    assert int(state.step) == 2
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (before.params, before.opt_state))
    # One that has left its reference learns from the KL term alone.
    if kl_coef:
        reference = jax.tree.map(lambda p: p * 1.5, state.params)
        state, metrics, _ = updater.update(state, updater.microbatches(sequences), reference)
        assert float(metrics["no_signal_rate"]) == 0
        changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), state.params, before.params)
        assert any(jax.tree.leaves(changed))
