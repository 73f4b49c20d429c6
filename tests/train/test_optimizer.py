"""Schedules at named steps, what Muon updates, and clipping."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax.contrib
import pytest

from apr_jax.model.params import init_params
from apr_jax.train.optimizer import make_optimizer, muon_dimensions, schedule
from tests.train.small import small_config

CONFIG = small_config()


def _config(**changes):
    return dataclasses.replace(CONFIG.sft.optimizer, **changes)


def test_cosine_schedule_at_its_ends():
    config = _config(schedule="cosine", warmup_steps=10, initial_scale=0.1, final_scale=0.01)
    rate = schedule(config, 110, peak=2.0)
    values = [float(rate(step)) for step in (0, 5, 10, 60, 110, 200)]
    np.testing.assert_allclose(values, [0.2, 1.1, 2.0, (2.0 + 0.02) / 2, 0.02, 0.02], rtol=1e-5)


def test_trapezoid_falls_in_its_last_steps_only():
    config = _config(schedule="trapezoid", warmup_steps=10, initial_scale=0.0, final_scale=0.1, decay_steps=20)
    rate = schedule(config, 110, peak=2.0)
    values = [float(rate(step)) for step in (0, 5, 10, 90, 100, 110, 200)]
    np.testing.assert_allclose(values, [0, 1.0, 2.0, 2.0, 1.1, 0.2, 0.2], rtol=1e-5)
    short = schedule(config, 20, peak=2.0)  # shorter than warm-up and decay together: the decay gives way
    np.testing.assert_allclose([float(short(step)) for step in (10, 20)], [2.0, 0.2], rtol=1e-5)


def test_constant_schedule():
    rate = schedule(_config(schedule="constant", warmup_steps=4, initial_scale=0.0), 10, peak=1.0)
    np.testing.assert_allclose([float(rate(step)) for step in (0, 2, 4, 100)], [0, 0.5, 1, 1])
    rate = schedule(_config(schedule="constant", warmup_steps=0, initial_scale=0.0), 10, peak=1.0)
    assert float(rate(0)) == 1


def test_muon_updates_hidden_matrices_and_adam_the_rest():
    params = init_params(CONFIG.model, 0)
    dimensions = muon_dimensions(params)
    names = {
        jax.tree_util.keystr(path): leaf is not None
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            dimensions, is_leaf=lambda x: x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)
        )
    }
    muon = {name.split("'")[-2] for name, is_muon in names.items() if is_muon}
    assert muon == {"query", "key", "value", "out", "gate", "up", "down"}
    adam = [name for name, is_muon in names.items() if not is_muon]
    assert any("embedding" in name for name in adam)
    assert any("scale" in name for name in adam)


@pytest.mark.heavy
def test_first_update_has_the_size_that_each_rule_says():
    params = init_params(CONFIG.model, 0)
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)
    config = _config(
        name="muon", schedule="constant", warmup_steps=0, weight_decay=0.0, learning_rate=1e-3, muon_learning_rate=0.02
    )
    optimizer = make_optimizer(config, 10)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = jax.tree_util.keystr(path)
        if "embedding" in name or "scale" in name:
            nesterov = 1 + config.b1 / (1 + config.b1)  # Dozat 2016: Adam's first update, and its look-ahead
            np.testing.assert_allclose(jnp.abs(update), jnp.full(update.shape, 1e-3 * nesterov), rtol=0.02)
        else:  # near-orthogonal: singular values about 1 (Newton-Schulz leaves 0.7 to 1.2), scaled for width
            scale = 0.02 * max(1.0, update.shape[1] / update.shape[0]) ** 0.5
            values = jnp.linalg.svd(update, compute_uv=False) / scale
            assert float(values.min()) > 0.5, name
            assert float(values.max()) < 1.3, name


def test_weight_decay_shrinks_matrices_only():
    params = init_params(CONFIG.model, 0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for name in ("adamw", "muon"):
        config = _config(name=name, schedule="constant", warmup_steps=0, weight_decay=0.5)
        optimizer = make_optimizer(config, 10)
        updates, _ = optimizer.update(zeros, optimizer.init(params), params)
        for path, update in jax.tree_util.tree_leaves_with_path(updates):
            moved = bool(jnp.abs(update).max() > 0)
            is_table = name == "muon" and "embedding" in jax.tree_util.keystr(path)
            assert moved == (update.ndim == 2 and not is_table), (name, path)


@pytest.mark.parametrize(("clip", "expected"), [(1.0, 0.5), (100.0, 5.0), (0.0, 5.0)])
def test_clipping_is_by_global_norm(clip, expected):
    # With b1 = 0.5 the first moment after one step is half the clipped gradient.
    params = {"a": jnp.zeros((2,)), "b": jnp.zeros((2,))}
    grads = {"a": jnp.asarray([6.0, 0.0]), "b": jnp.asarray([0.0, 8.0])}
    optimizer = make_optimizer(_config(name="adamw", b1=0.5, clip_norm=clip), 10)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    moment = optax.tree.get(state, "mu")
    np.testing.assert_allclose(optax.tree.norm(moment), expected, rtol=1e-6)
