"""A whole run in one process: stopped in each of its stages and started again, extended, on another mesh."""

import dataclasses
import signal

import numpy as np
import pytest

from apr_jax.checkpoints.policy import load_policy
from apr_jax.config import Config, ConfigError
from apr_jax.data import demonstrations
from apr_jax.files import read_json, read_jsonl
from apr_jax.stopping import StoppedError
from apr_jax.train import evaluations, grpo, run
from apr_jax.train.rl import sample
from apr_jax.train.run import train
from tests.train.small import on_mesh, small_config

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    directory = str(tmp_path_factory.mktemp("data"))
    changes = {"data.directory": directory, "sft.optimizer.schedule": "constant", "grpo.num_steps": 2}
    return small_config(**changes, **{"data.facts_share": 0.2, "sft.number_waves": 0.1, "model.embed_dim": 64})


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The folder of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("whole")
    train(config, workdir)
    return workdir


def _signal_when_called(monkeypatch, module, name, at=1):
    """SIGTERM comes when the function is called for the `at`-th time."""
    original, calls = getattr(module, name), iter(range(1, 1000))

    def called(*args, **kwargs):
        if next(calls) == at:
            signal.raise_signal(signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, called)


STAGES = {
    "data building": (demonstrations, "load_split", 1),
    "tokenising": (run, "train_iterator", 1),
    "SFT": (run, "train_sft", 1),
    "evaluation before": (evaluations, "evaluate", 2),
    "rollouts": (sample, "choose_problems", 2),
    "validation": (grpo, "_validate", 2),
    "evaluation after": (evaluations, "evaluate", 2),
}


def test_stopped_in_every_stage_and_started_again_equals_undisturbed(config, whole, tmp_path, monkeypatch):
    steps = []
    for module, name, at in STAGES.values():
        with monkeypatch.context() as patch:
            _signal_when_called(patch, module, name, at)
            with pytest.raises(StoppedError):
                train(config, tmp_path)
        steps.append(len(read_jsonl(tmp_path / "metrics.jsonl")))
    # SFT does a step before it asks. The rest of its steps, then one step of GRPO, then the other.
    assert steps == [0, 0, 1, 6, 7, 8, 8]
    train(config, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(("field", "value"), [("data.facts_share", 0.0), ("sft.number_waves", 0.0)])
def test_facts_and_waves_change_what_is_learnt(config, whole, tmp_path, field, value):
    section, name = field.split(".")
    changed = dataclasses.replace(getattr(config, section), **{name: value})
    shorter = dataclasses.replace(config, **{section: changed}, grpo=dataclasses.replace(config.grpo, num_steps=0))
    train(shorter, tmp_path)
    losses = [read_jsonl(folder / "metrics.jsonl")[0]["loss"] for folder in (tmp_path, whole)]
    assert losses[0] != losses[1]


def test_the_best_policy_of_a_run_has_a_name(config, whole):
    records = read_jsonl(whole / "metrics.jsonl")
    assert ["validation_accuracy" in record for record in records] == [False] * 6 + [True, False]
    model, _, _ = load_policy(whole / "best")
    assert model == config.model
    assert (whole / "checkpoints" / "grpo" / "best.json").exists()


def test_a_finished_run_goes_on_to_more_steps_as_if_it_had_been_meant_to(config, whole, tmp_path):
    def longer(config, sft, rl):
        steps = {"sft": dataclasses.replace(config.sft, num_steps=sft)}
        return dataclasses.replace(config, **steps, grpo=dataclasses.replace(config.grpo, num_steps=rl))

    sft_alone = longer(config, 3, 0)
    train(sft_alone, tmp_path)
    train(longer(config, 6, 0), tmp_path)
    train(longer(config, 6, 1), tmp_path)
    train(config, tmp_path)
    ours, theirs = read_jsonl(tmp_path / "metrics.jsonl"), read_jsonl(whole / "metrics.jsonl")
    assert ours == theirs
    with pytest.raises(ConfigError, match=r"sft\.num_steps=9: SFT ended at step 6 and GRPO started"):
        train(longer(config, 9, 2), tmp_path)


def test_resumed_on_another_mesh_it_trains_on_the_same_batches(config, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        _signal_when_called(patch, run, "train_sft")
        with pytest.raises(StoppedError):
            train(config, tmp_path)
    sft = dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, num_steps=0))
    train(on_mesh(sft, data=2, fsdp=2), tmp_path)
    ours, theirs = read_jsonl(tmp_path / "metrics.jsonl"), read_jsonl(whole / "metrics.jsonl")[:6]
    assert [record["tokens"] for record in ours] == [record["tokens"] for record in theirs]
    for name in ("loss", "grad_norm", "token_accuracy"):
        np.testing.assert_allclose([r[name] for r in ours], [r[name] for r in theirs], rtol=1e-5, err_msg=name)


def test_lanes_that_the_memory_decides_stay_with_the_run(config, tmp_path, monkeypatch):
    engine = dataclasses.replace(config.engine, lanes=-1, pages=-1)
    config = dataclasses.replace(config, engine=engine, grpo=dataclasses.replace(config.grpo, num_steps=0))
    chosen = []
    for gigabytes in (0.002, 1.0):
        monkeypatch.setattr("apr_jax.engine.memory.memory_limit", lambda mesh, size=gigabytes: int(size * 1e9))
        train(config, tmp_path)
        chosen.append(read_json(tmp_path / "engine.json"))
    assert chosen[0] == chosen[1]
    assert 0 < chosen[0]["lanes"] < 64
    assert read_json(tmp_path / "config.json")["engine"]["lanes"] == -1
