"""A phase goes on from its last checkpoint, and saves what a signal interrupts."""

import jax
import numpy as np
import pytest

from apr_jax.parallel.mesh import make_mesh
from apr_jax.stopping import StoppedError
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.state import TrainState, create_state
from tests.train.small import on_mesh, open_phase, small_config

CONFIG = small_config(**{"sft.optimizer.name": "muon"})
OPTIMIZER = make_optimizer(CONFIG.sft.optimizer, 10)


def _start(phase, config=CONFIG, **how):
    return phase.start(make_mesh(config.mesh), config.model, OPTIMIZER, **how)


def _state():
    state = create_state(make_mesh(CONFIG.mesh), CONFIG.model, OPTIMIZER)
    noise = jax.tree.map(
        lambda x: np.arange(x.size, dtype=np.float32).reshape(x.shape).astype(x.dtype), state.opt_state
    )
    return TrainState(state.step + 3, state.params, noise)


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "fsdp": 2}], ids=["one device", "another mesh"])
def test_it_goes_on_from_its_checkpoint(tmp_path, mesh):
    state, config = _state(), on_mesh(CONFIG, **mesh)
    with open_phase(tmp_path, "sft", CONFIG) as phase:
        phase.skipped.in_a_row = 2
        phase.save(3, state, {"next": 7})
    with open_phase(tmp_path, "sft", config) as phase:
        again, position = _start(phase, config, seed=9)
        assert (position, phase.skipped.in_a_row) == ({"next": 7}, 2)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    leaf = jax.tree.leaves(again.params)[-1]
    assert dict(leaf.sharding.mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1} | mesh


def test_without_a_checkpoint_it_starts_anew(tmp_path):
    with open_phase(tmp_path, "sft", CONFIG) as phase:
        state, position = _start(phase, seed=9)
    assert position is None
    expected = create_state(make_mesh(CONFIG.mesh), CONFIG.model, OPTIMIZER, seed=9)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.mark.parametrize(("step", "saved"), [(0, None), (3, 3), (4, 4)])
def test_a_signal_in_long_work_saves_the_step_before_once(tmp_path, step, saved):
    with open_phase(tmp_path, "grpo", CONFIG) as phase:
        if step == 3:  # saved already
            phase.save(3, _state(), {})
        phase.stop.requested = True
        with pytest.raises(StoppedError), phase.interruptible(step, _state(), {}):
            raise AssertionError("the block does not begin")
        assert phase.checkpoints.latest_step() == saved
