"""SFT: the loss falls, accumulation and sharding change nothing, resumed = uninterrupted."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apr_jax.files import read_jsonl
from apr_jax.model.params import graphdef, init_params
from apr_jax.model.views.training import training_rows
from apr_jax.parallel.mesh import make_mesh
from apr_jax.stopping import StoppedError, StopSignal
from apr_jax.train.optimizer import make_optimizer, schedule
from apr_jax.train.scorer import to_mesh
from apr_jax.train.sft import make_sft_step, normalise, train_sft
from apr_jax.train.state import create_state
from tests.train.small import on_mesh, open_phase, random_rows, small_config

pytestmark = pytest.mark.heavy

CONFIG = small_config()


class Rows:
    """Endless random batches with a position."""

    def __init__(self, config, epoch=1_000_000):
        self.config, self.epoch, self.position = config, epoch, 0

    def __next__(self):
        rows = random_rows(self.config.model.vocab_size, self.config.sft.row_len, 40, self.position % self.epoch)
        self.position += 1
        return {name: rows_BT[: self.config.sft.rows_per_step] for name, rows_BT in rows.items()}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def _one_step(config, rows, microbatches, order=None):
    mesh = make_mesh(config.mesh)
    sgd = dataclasses.replace(config.sft.optimizer, name="adamw", clip_norm=0.0)
    optimizer = make_optimizer(sgd, 10)
    step = make_sft_step(config.model, optimizer, schedule(sgd, 10, 1.0), mesh)
    rows = {**rows, "weights": normalise(rows["weights"])}
    if order is not None:
        rows = {name: rows_BT[order] for name, rows_BT in rows.items()}
    state, metrics = step(create_state(mesh, config.model, optimizer), to_mesh(rows, mesh, microbatches))
    moment = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(state.opt_state)}
    grads = {name: np.asarray(x) / (1 - sgd.b1) for name, x in moment.items() if ".mu" in name}
    assert grads
    return {name: float(value) for name, value in metrics.items()}, grads


def test_moments_are_split_over_data_and_parameters_are_not():
    config = on_mesh(CONFIG, data=2, fsdp=2)
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(config.sft.optimizer, 10)
    state = create_state(mesh, config.model, optimizer)
    step = make_sft_step(config.model, optimizer, schedule(config.sft.optimizer, 10, 1.0), mesh)
    rows = next(Rows(config))
    state, _ = step(state, to_mesh({**rows, "weights": normalise(rows["weights"])}, mesh, 1))

    def parts(tree):
        matrices = [x for x in jax.tree.leaves(tree) if x.ndim == 2]
        assert matrices
        return {x.size // x.addressable_shards[0].data.size for x in matrices}

    assert parts(state.params) == {2}
    assert parts(state.opt_state) == {4}


@pytest.mark.parametrize(
    ("microbatches", "shuffled"),
    [(4, False), (1, True)],
    ids=["accumulated", "shuffled"],
)
def test_same_gradient_however_the_batch_is_cut(microbatches, shuffled):
    config = CONFIG
    rows = random_rows(config.model.vocab_size, 64, 30)
    rows = {name: rows_BT[:8] for name, rows_BT in rows.items()}
    order = np.random.default_rng(1).permutation(8) if shuffled else None
    expected, expected_grads = _one_step(config, rows, 1)
    actual, grads = _one_step(config, rows, microbatches, order)
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-5, err_msg=name)
    for name, value in expected_grads.items():
        np.testing.assert_allclose(grads[name], value, atol=1e-6, err_msg=name)


def test_loss_is_the_weighted_mean_of_an_independent_forward():
    rows = random_rows(CONFIG.model.vocab_size, 64, 12)
    metrics, _ = _one_step(CONFIG, rows, 1)
    params, structure = init_params(CONFIG.model, 0), graphdef(CONFIG.model)

    @jax.jit
    def forward(tokens):
        model = nnx.merge(structure, params)
        return jax.nn.log_softmax(model.logits(model(tokens, training_rows(CONFIG.model, jnp.arange(len(tokens))))[0]))

    total = correct = 0.0
    for row in range(len(rows["tokens"])):  # one sequence at a time, unpacked
        for segment in range(1, rows["segment_ids"][row].max() + 1):
            inside = rows["segment_ids"][row] == segment
            tokens, targets, weights = (rows[name][row][inside] for name in ("tokens", "targets", "weights"))
            logprobs = np.asarray(forward(np.pad(tokens, (0, 64 - len(tokens)))))[: len(tokens)]
            total += -np.sum(weights * logprobs[np.arange(len(tokens)), targets])
            correct += np.sum((logprobs.argmax(-1) == targets) & (weights > 0))
    np.testing.assert_allclose(metrics["loss"], total / rows["weights"].sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["token_accuracy"], correct / (rows["weights"] > 0).sum(), rtol=1e-5)


def train_on(config, workdir, stop=None, rows=None):
    held_out = random_rows(config.model.vocab_size, config.sft.row_len, 6, seed=10**6)
    with open_phase(workdir, "sft", config, stop) as phase:
        return train_sft(
            config.sft,
            config.model,
            make_mesh(config.mesh),
            phase,
            rows=rows or Rows(config),
            validation_rows=held_out,
            seed=config.seed,
        )


_MEMORISE = {
    "sft.num_steps": 60,
    "sft.checkpoint_every": 100,
    "sft.validate_every": 100,
    "sft.optimizer.learning_rate": 0.02,
}


def test_loss_falls_on_what_can_be_memorised(tmp_path):
    config = small_config(**_MEMORISE)
    train_on(config, tmp_path, rows=Rows(config, epoch=1))
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 61))
    assert records[-1]["loss"] < 0.5 * records[0]["loss"]
    assert records[-1]["token_accuracy"] > records[0]["token_accuracy"] + 0.3


class StopAt(StopSignal):
    """As if a signal came in step `step`."""

    def __init__(self, rows, step):
        super().__init__()
        self._rows, self._step = rows, step

    @property
    def requested(self):
        return self._rows.position >= self._step

    @requested.setter
    def requested(self, value):
        pass


def test_training_starts_from_given_weights(tmp_path):
    given = jax.tree.map(lambda x: x + 1, init_params(CONFIG.model, 0))
    still = dataclasses.replace(CONFIG.sft, num_steps=0)
    held_out = random_rows(CONFIG.model.vocab_size, CONFIG.sft.row_len, 6)
    how = {
        "rows": Rows(CONFIG),
        "validation_rows": held_out,
        "seed": 0,
        "params": given,
    }
    with open_phase(tmp_path, "sft", CONFIG) as phase:
        trained = train_sft(still, CONFIG.model, make_mesh(CONFIG.mesh), phase, **how)
    jax.tree.map(np.testing.assert_array_equal, trained, given)


def test_stopped_and_resumed_equals_uninterrupted(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = train_on(CONFIG, whole)
    rows = Rows(CONFIG)
    with pytest.raises(StoppedError):
        train_on(CONFIG, parts, StopAt(rows, 3), rows)
    assert len(read_jsonl(parts / "metrics.jsonl")) == 3
    with (parts / "metrics.jsonl").open("a") as file:  # what a killed run leaves: later steps, and a torn line
        file.write(json.dumps({"step": 4, "phase": "sft", "loss": -1.0}) + '\n{"step": 5, "ph')
    actual = train_on(CONFIG, parts)
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    records = read_jsonl(whole / "metrics.jsonl")
    assert ["validation_loss" in record for record in records] == [False, False, True] * 2
    assert not {"seconds", "tokens_per_second"} & set(records[0])
    assert read_jsonl(whole / "timings.jsonl")[0]["seconds"] > 0


def test_normalise():
    weights = normalise(np.asarray([[1, 0, 3]], np.float32))
    np.testing.assert_allclose(weights, [[0.25, 0, 0.75]])
    with pytest.raises(ValueError, match="no token to learn from"):
        normalise(np.zeros((2, 3), np.float32))
