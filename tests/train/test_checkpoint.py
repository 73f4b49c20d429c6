"""Checkpoints: everything comes back, on any mesh; another configuration is refused by name."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from apr_jax.config import ConfigError, to_dict
from apr_jax.model.hf import save_hf
from apr_jax.model.llama import init_params
from apr_jax.parallel.mesh import make_mesh
from apr_jax.train.checkpoint import (
    Checkpoints,
    has_reference,
    load_policy,
    load_reference,
    save_reference,
)
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.state import TrainState, abstract_params_on, abstract_state, create_state
from tests.train.small import on_mesh, small_config

CONFIG = small_config(**{"sft.optimizer.name": "muon"})


def _state(config=CONFIG, seed=0):
    optimizer = make_optimizer(config.sft.optimizer, 10)
    state = create_state(make_mesh(config.mesh), config.model, optimizer, seed=seed)
    noise = jax.tree.map(
        lambda x: np.arange(x.size, dtype=np.float32).reshape(x.shape).astype(x.dtype), state.opt_state
    )
    return TrainState(state.step + 3, state.params, noise), optimizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    state, _ = _state()
    with Checkpoints(workdir, "sft", CONFIG) as checkpoints:
        checkpoints.save(3, state, {"next": [1, 2], "name": "x"})
    save_reference(workdir, state.params)
    return workdir, state


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "fsdp": 2}], ids=["one device", "another mesh"])
def test_all_of_it_comes_back(saved, mesh):
    workdir, state = saved
    config = on_mesh(CONFIG, **mesh)
    optimizer = make_optimizer(config.sft.optimizer, 10)
    with Checkpoints(workdir, "sft", config) as checkpoints:
        assert checkpoints.latest_step() == 3
        restored, position, _ = checkpoints.restore(abstract_state(make_mesh(config.mesh), config.model, optimizer))
    assert position == {"next": [1, 2], "name": "x"}
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    leaf = jax.tree.leaves(restored.params)[-1]
    assert dict(leaf.sharding.mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1} | mesh


def test_moments_lie_like_their_parameter():
    config = on_mesh(CONFIG, data=1, fsdp=4)
    state, _ = _state(config)
    split = [x for x in jax.tree.leaves(state.params) if not x.sharding.is_fully_replicated]
    assert split
    optimizer = make_optimizer(config.sft.optimizer, 10)
    fresh = create_state(make_mesh(config.mesh), config.model, optimizer)
    moments = [x for x in jax.tree.leaves(fresh.opt_state) if not x.sharding.is_fully_replicated]
    adam_tables = 1  # Adam keeps two moments of the embedding, Muon one of each matrix
    assert len(moments) == len(split) + adam_tables


def test_another_configuration_is_refused_by_name(saved):
    workdir, _ = saved
    other = dataclasses.replace(
        CONFIG, seed=7, sft=dataclasses.replace(CONFIG.sft, rows_per_step=8), name="free", evaluation=CONFIG.evaluation
    )
    with Checkpoints(workdir, "sft", other) as checkpoints, pytest.raises(ConfigError) as error:
        checkpoints.settle()
    assert "seed: 0 saved, 7 now" in str(error.value)
    assert "sft.rows_per_step: 4 saved, 8 now" in str(error.value)
    assert "name" not in str(error.value).replace("--workdir", "").split("configuration:")[1]


def test_reference_is_saved_once(saved):
    workdir, state = saved
    assert has_reference(workdir)
    save_reference(workdir, init_params(CONFIG.model, 5))
    reference = load_reference(workdir, abstract_params_on(make_mesh(CONFIG.mesh), CONFIG.model))
    jax.tree.map(np.testing.assert_array_equal, reference, state.params)


@pytest.mark.parametrize("folder", [".", "checkpoints", "checkpoints/sft", "checkpoints/sft/3"])
def test_policy_loads_from_any_of_its_folders(saved, folder):
    workdir, state = saved
    model, params, config = load_policy(workdir / folder)
    assert model == CONFIG.model
    assert config == to_dict(CONFIG)
    jax.tree.map(np.testing.assert_array_equal, params, state.params)


def test_policy_loads_from_hugging_face_and_nothing_else(saved, tmp_path):
    _, state = saved
    save_hf(tmp_path / "hf", CONFIG.model, state.params, None)
    model, params, config = load_policy(tmp_path / "hf")
    assert config is None
    assert model.embed_dim == CONFIG.model.embed_dim
    jax.tree.map(np.testing.assert_array_equal, params, state.params)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="neither a run folder"):
        load_policy(tmp_path / "empty")


def test_an_incomplete_checkpoint_is_not_seen(saved, tmp_path):
    workdir, _ = saved
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    (copy / "checkpoints" / "sft" / "4.orbax-checkpoint-tmp-123").mkdir()
    with Checkpoints(copy, "sft", CONFIG) as checkpoints:
        assert checkpoints.latest_step() == 3
    assert load_policy(copy)[0] == CONFIG.model
