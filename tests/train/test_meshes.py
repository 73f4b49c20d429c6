"""One device and any mesh train alike: losses and weights after several steps, packed, with gradient accumulation.

The default run covers each axis alone and mixtures; `make test-slow` covers every mesh of 2, 4 and 8 devices.
"""

import functools

import jax
import numpy as np
import pytest

from apr_jax.model.params import init_params
from apr_jax.parallel.mesh import make_mesh
from apr_jax.train.optimizer import make_optimizer, schedule
from apr_jax.train.rl.update import Updater
from apr_jax.train.scorer import to_mesh
from apr_jax.train.sft import make_sft_step, normalise
from apr_jax.train.state import create_state
from tests.train.small import on_mesh, random_rows, small_config
from tests.train.test_grpo import TOKENIZER, made_up_rollouts

pytestmark = pytest.mark.heavy

CONFIG = small_config(
    **{
        "model.num_heads": 8,
        "model.num_kv_heads": 8,
        "model.head_dim": 4,
        "sft.rows_per_step": 16,
        "sft.validation_rows": 8,
        "grpo.rows_per_microbatch": 8,
        "grpo.inner_updates": 2,
        "grpo.group_size": 4,
        "grpo.kl_coef": 0.05,
        "grpo.optimizer.learning_rate": 3e-4,
    }
)
MUON = small_config(
    **{"model.num_heads": 8, "model.num_kv_heads": 8, "model.head_dim": 4, "sft.optimizer.name": "muon"}
)
ONE = (1, 1, 1)
EVERY = [
    (data, fsdp, tensor)
    for devices in (2, 4, 8)
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    for tensor in (1, 2, 4, 8)
    if data * fsdp * tensor == devices
]


def _shapes(*usual):
    return [shape if shape in usual else pytest.param(shape, marks=pytest.mark.slow) for shape in EVERY]


def _on(config, shape):
    return on_mesh(config, **dict(zip(("data", "fsdp", "tensor"), shape, strict=True)))


def _whole(params):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}


@functools.cache
def _sft(shape, microbatches, muon=False):
    """Losses of three steps on packed rows, and the weights after them."""
    config = _on(MUON if muon else CONFIG, shape)
    mesh, settings = make_mesh(config.mesh), config.sft.optimizer
    optimizer = make_optimizer(settings, 10)
    step = make_sft_step(config.model, optimizer, schedule(settings, 10, settings.learning_rate), mesh)
    state, losses = create_state(mesh, config.model, optimizer), []
    for seed in range(3):
        rows = {name: x[:16] for name, x in random_rows(config.model.vocab_size, 64, 60, seed).items()}
        rows["weights"] = normalise(rows["weights"])
        state, metrics = step(state, to_mesh(rows, mesh, microbatches))
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.asarray(losses), _whole(state.params)


@functools.cache
def _grpo(shape):
    """Losses of two steps of two updates each, and the weights after them.

    Several microbatches of packed calls; in the second step they have branches.
    """
    config = _on(CONFIG, shape)
    mesh = make_mesh(config.mesh)
    updater = Updater(config, mesh, TOKENIZER)
    state = create_state(mesh, config.model, updater.optimizer)
    reference, losses = create_state(mesh, config.model, updater.optimizer, seed=1).params, []
    for seed in range(2):
        scored = made_up_rollouts(seed, chained=seed == 1)
        batches = updater.microbatches(updater.sequences(scored))
        state, metrics, _ = updater.update(state, batches, reference)
        losses.append([float(metrics[name]) for name in ("policy_loss", "kl_loss", "grad_norm")])
    return np.asarray(losses), _whole(state.params)


def _assert_same(actual, expected):
    start = _whole(init_params(CONFIG.model, 0))
    assert np.ptp(expected[0][:, 0]) > 1e-3, "the steps differ"
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    moved = max(np.abs(value - start[name]).max() for name, value in expected[1].items())
    assert moved > 1e-4, "the weights moved"
    for name, value in expected[1].items():
        np.testing.assert_allclose(actual[1][name], value, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("shape", _shapes((8, 1, 1), (1, 2, 4)), ids=str)
def test_sft_is_the_same_on_every_mesh(shape):
    _assert_same(_sft(shape, microbatches=2), _sft(ONE, microbatches=1))


@pytest.mark.parametrize("shape", _shapes((1, 4, 1), (2, 2, 2)), ids=str)
def test_grpo_is_the_same_on_every_mesh(shape):
    _assert_same(_grpo(shape), _grpo(ONE))


def test_muon_is_the_same_on_a_mesh_of_all_axes():
    _assert_same(_sft((2, 2, 2), microbatches=1, muon=True), _sft(ONE, microbatches=1, muon=True))
