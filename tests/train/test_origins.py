"""A run that began with one policy never goes on, or reports, as if it had begun with another."""

import dataclasses
import json
import shutil

import pytest

from apr_jax.checkpoints.manager import Checkpoints
from apr_jax.config import ConfigError
from apr_jax.config_dict import from_config_dict
from apr_jax.data.tokenizer import BuiltinTokenizer
from apr_jax.files import FileError
from apr_jax.model.params import init_params, weights_digest
from apr_jax.train.origins import Given, Origins
from apr_jax.train.run import train
from tests.train.small import small_config, small_config_dict


class OtherTokenizer(BuiltinTokenizer):
    """A vocabulary that begins threads with another token."""

    def __init__(self):
        super().__init__()
        self.bos_id = self.eos_id


@pytest.fixture
def origins(tmp_path):
    return Origins(tmp_path, BuiltinTokenizer())


def given(phase, weights, path="runs/a"):
    return Given(phase, path, {}, weights)


@pytest.mark.parametrize("phase", ["sft", "grpo"])
@pytest.mark.parametrize("began", ["aaaa", None])
def test_a_phase_that_has_begun_takes_the_same_policy_alone(phase, began, origins, tmp_path):
    origins.note(phase, tmp_path / "a" if began else None, began, has_begun=False)
    if began:
        origins.check(given(phase, began, "moved/elsewhere"))
    for other in ("bbbb", "aaab"):
        with pytest.raises(ConfigError, match=f"began with .*, and --.*=runs/a holds {other}; leave the flag out"):
            origins.check(given(phase, other))
    again = Origins(tmp_path, OtherTokenizer())
    with pytest.raises(ConfigError, match="began with"):
        again.check(given(phase, began))


def test_a_phase_that_was_not_noted_takes_none(origins):
    with pytest.raises(ConfigError, match="a policy that was not noted"):
        origins.check(given("sft", "aaaa"))
    origins.note("grpo", None, "aaaa", has_begun=True)  # a folder of before there were notes goes on
    origins.note("sft", None, None, has_begun=False)
    with pytest.raises(ConfigError, match="fresh weights"):
        origins.check(given("sft", "aaaa"))


def test_a_reference_policy_that_was_exchanged_is_refused(origins):
    origins.note("grpo", None, "aaaa", has_begun=False)
    origins.note("grpo", None, "aaaa", has_begun=True)
    with pytest.raises(ConfigError, match=r"GRPO began with the policy aaaa of its own SFT, and would go on from bbbb"):
        origins.note("grpo", None, "bbbb", has_begun=True)
    origins.note("grpo", None, "bbbb", has_begun=False)  # SFT went on to more steps
    origins.check(given("grpo", "bbbb"))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"sft": 3}', '{"sft": {"weights": "a"}}', "\0", '{"sft": null}', "[" * 10_000]
)
def test_a_damaged_note_is_named(content, origins, tmp_path):
    path = tmp_path / "checkpoints" / "origins.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(FileError, match=f"{path}: ") as refusal:
        origins.check(given("sft", "aaaa"))
    assert "\n" not in str(refusal.value)


def policy(folder, config, seed):
    params = init_params(config.model, seed)
    with Checkpoints(folder, "sft", config) as checkpoints:
        checkpoints.save(1, {"policy": params}, {})
    return folder, weights_digest(params)


def evaluated(workdir):
    return json.loads((workdir / "evaluations" / "before.json").read_text())["settings"]["weights"]


@pytest.mark.heavy
def test_a_used_folder_refuses_another_policy_and_evaluates_what_it_holds(tmp_path):
    values = small_config_dict(str(tmp_path / "data"))
    values.grpo.num_steps = 0
    config = from_config_dict(values)
    (one, first), (other, second) = (policy(tmp_path / f"policy{seed}", config, seed) for seed in (0, 1))
    workdir = tmp_path / "run"
    summary = train(config, workdir, one)
    assert evaluated(workdir) == first
    files = {path: path.read_bytes() for path in workdir.rglob("*.json")}
    for flags in ((other, None), (None, one), (None, other)):
        with pytest.raises(ConfigError, match=f"{workdir} began with"):
            train(config, workdir, *flags)
    assert {path: path.read_bytes() for path in workdir.rglob("*.json")} == files, "a refusal writes nothing"
    config_of_other = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=2))
    for flags in ((one, None), (None, one)):
        with pytest.raises(ConfigError, match=r"model\.num_layers: 1 there, 2 here"):
            train(config_of_other, tmp_path / "never", *flags)
    assert not (tmp_path / "never").exists()
    moved = shutil.copytree(one, tmp_path / "moved")
    for flags in ((moved, None), (None, None)):
        assert train(config, workdir, *flags) == summary
    # The evaluations that are done were another policy's: they are done again.
    shutil.rmtree(workdir / "checkpoints")
    train(config, workdir, other)
    assert evaluated(workdir) == second


@pytest.mark.heavy
def test_sft_that_has_begun_refuses_another_start(tmp_path):
    config = small_config(
        **{
            "data.directory": str(tmp_path / "data"),
            "grpo.num_steps": 0,
            "sft.num_steps": 2,
            "sft.optimizer.schedule": "constant",
        }
    )
    (one, _), (other, _) = (policy(tmp_path / f"policy{seed}", config, seed) for seed in (0, 1))
    train(config, tmp_path / "run", None, one)
    longer = dataclasses.replace(config, sft=dataclasses.replace(config.sft, num_steps=3))
    for flags in ((None, other), (other, None)):
        with pytest.raises(ConfigError, match=f"{tmp_path / 'run'} began with"):
            train(longer, tmp_path / "run", *flags)
    train(longer, tmp_path / "run", None, one)
    train(config, tmp_path / "fresh")
    with pytest.raises(ConfigError, match="began with fresh weights, and --start="):
        train(longer, tmp_path / "fresh", None, one)
