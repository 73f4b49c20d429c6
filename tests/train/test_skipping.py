"""Steps that are not finite: left out on the device, counted; too many in a row stop the run, with the batch saved."""

import json

import jax
import numpy as np
import pytest

from apr_jax.files import read_jsonl
from apr_jax.parallel.mesh import make_mesh
from apr_jax.train.rl.update import Updater
from apr_jax.train.state import create_state
from tests.train.small import on_mesh, small_config
from tests.train.test_grpo import CONFIG as GRPO_CONFIG
from tests.train.test_grpo import TOKENIZER, made_up_rollouts, sequences_of
from tests.train.test_sft import Rows, train_on

pytestmark = pytest.mark.heavy

SETTINGS = {"sft.num_steps": 3, "sft.optimizer.schedule": "constant", "faults.max_skipped_steps": 2}
CONFIG = small_config(**SETTINGS)


class Spoilt(Rows):
    """The batches of `Rows`, with some positions' weights not a number, or left out."""

    def __init__(self, config, spoilt=(), left_out=()):
        super().__init__(config)
        self._spoilt, self._left_out = spoilt, left_out

    def __next__(self):
        while self.position in self._left_out:
            self.position += 1
        position, rows = self.position, super().__next__()
        if position in self._spoilt:
            rows["weights"] = rows["weights"] * np.float32(np.nan)
        return rows


def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(tmp_path):
    params = train_on(CONFIG, tmp_path / "spoilt", rows=Spoilt(CONFIG, spoilt=[1]))
    shorter = small_config(**SETTINGS | {"sft.num_steps": 2})
    expected = train_on(shorter, tmp_path / "without", rows=Spoilt(CONFIG, left_out=[1]))
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    spoilt, without = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("spoilt", "without"))
    assert [record["skipped_rate"] for record in spoilt] == [0, 1, 0]
    assert spoilt[1]["loss"] is None
    assert spoilt[1]["grad_norm"] is None
    assert spoilt[2]["loss"] == without[1]["loss"]


def test_too_many_in_a_row_stop_the_run_with_the_batch_saved_also_when_it_was_killed_in_between(tmp_path):
    for _ in range(2):  # the second start goes on from step 2, which was the first in the row
        rows = Spoilt(CONFIG, spoilt=[1, 2])
        with pytest.raises(FloatingPointError, match=r"sft step 3: .* in 2 steps in a row") as error:
            train_on(CONFIG, tmp_path, rows=rows)
        [path] = (tmp_path / "skipped").iterdir()
        assert str(path) in str(error.value)
        assert [record["skipped_rate"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 1]
    rows = Spoilt(CONFIG)
    rows.position = 2
    with np.load(path, allow_pickle=False) as saved:
        np.testing.assert_array_equal(saved["tokens"], next(rows)["tokens"])
        assert np.isnan(saved["weights"]).all()
    meta = json.loads((tmp_path / "checkpoints" / "sft" / "2" / "meta" / "metadata").read_text())
    assert meta["skipped_in_a_row"] == 1


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "fsdp": 2}], ids=["one device", "a mesh"])
def test_grpo_leaves_weights_and_moments_as_they_are(mesh):
    config = on_mesh(GRPO_CONFIG, **mesh)
    updater = Updater(config, make_mesh(config.mesh), TOKENIZER)
    state = create_state(make_mesh(config.mesh), config.model, updater.optimizer)
    sequences = sequences_of(config, made_up_rollouts())
    state, metrics, _ = updater.update(state, updater.microbatches(sequences), None)
    before = jax.tree.map(np.array, state)
    assert float(metrics["skipped_rate"]) == 0
    sequences[1]["advantage"][:] = np.inf
    state, metrics, _ = updater.update(state, updater.microbatches(sequences), None)
    assert float(metrics["skipped_rate"]) == 1
    assert int(state.step) == int(before.step) + 1
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (before.params, before.opt_state))
