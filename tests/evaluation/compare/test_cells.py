"""What a comparison refuses before anything runs, and what a cell's fingerprint covers."""

import dataclasses
import pathlib
from typing import ClassVar

import numpy as np
import pytest

from apr_jax.config import ConfigError
from apr_jax.config_dict import from_config_dict, to_dict
from apr_jax.data.tokenizer import BuiltinTokenizer
from apr_jax.evaluation.compare.cells import (
    Asked,
    Policy,
    _engine_for,
    cell_config,
    cell_settings,
    check_programs,
    held_out,
    make_policy,
)
from apr_jax.evaluation.compare.grid import Cell, Row
from apr_jax.model.params import weights_digest
from apr_jax.reasoning.policy_engine import EngineHolder
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.countdown.task import COUNTDOWN
from apr_jax.tasks.generation import generate_problems
from configs.grpo import get_config
from tests.reasoning.fixtures import TOKENIZER

CONFIG = from_config_dict(get_config("smoke"))
ASKED = Asked(COUNTDOWN, (Problem((1, 2), 3), Problem((2, 3), 6)), "mine.jsonl", 0)


def policy(name="a", **changes):
    """Of the smoke configuration with other fields: {"data.num_test": 3}."""
    values = to_dict(CONFIG)
    for field, value in changes.items():
        section, _, key = field.rpartition(".")
        (values[section] if section else values)[key] = value
    return Policy(name, f"runs/{name}", {}, from_config_dict(values), TOKENIZER, "weights")


def cell(program="adaptive", window=512, **changes):
    return dataclasses.replace(Cell(Row(program, program, "a"), None, 0.0, window), **changes)


def test_a_configuration_that_is_given_takes_the_place_of_the_saved_one(tmp_path):
    saved, given = to_dict(CONFIG), get_config("smoke")
    given.rollout.max_children = 3
    assert CONFIG.rollout.max_children != 3
    own = make_policy("a", str(tmp_path), (CONFIG.model, {}, saved), None, {}, None)
    assert own.config == CONFIG
    other = make_policy("a", str(tmp_path), (CONFIG.model, {}, saved), given, {"rollout.max_spawns": 1}, None)
    assert (other.config.rollout.max_children, other.config.rollout.max_spawns) == (3, 1)
    del saved["task"]["max_number"]  # as another version may have saved it
    with pytest.raises(ConfigError, match=r"--policies=a: .*of another version.*--config="):
        make_policy("a", str(tmp_path), (CONFIG.model, {}, saved), None, {}, None)
    assert make_policy("a", str(tmp_path), (CONFIG.model, {}, saved), given, {}, None).config.rollout.max_children == 3


def test_problems_are_the_first_of_the_split_without_its_data_set():
    asked = held_out([policy()], "test", 5)
    assert asked.problems == tuple(generate_problems(CONFIG, "test"))[:5]
    assert (asked.source, asked.seed) == ("test", CONFIG.seed)
    with pytest.raises(ConfigError, match="--num_problems=17 is more than the 16 problems of test"):
        held_out([policy()], "test", 17)


@pytest.mark.parametrize("change", [{"seed": 1}, {"data.num_test": 8}, {"task.max_number": 30}])
def test_problems_that_a_policy_may_know_are_refused(change):
    (field,) = change
    with pytest.raises(ConfigError, match=f"(?s)b had other held-out problems than a.*{field}: .*--problems"):
        held_out([policy(), policy("b", **change)], "test", 4)


def test_policies_that_learnt_from_other_demonstrations_may_be_compared():
    other = policy("b", **{"data.method": "serial", "data.num_train": 99, "task.parent_beams": [3, 8]})
    assert held_out([policy(), other], "test", 4) == held_out([policy()], "test", 4)


def test_a_window_is_told_to_those_who_know_it_and_may_not_be_larger_than_threads():
    assert cell_config(CONFIG, cell(window=256)) == CONFIG
    told = from_config_dict({**to_dict(CONFIG), "task": {**to_dict(CONFIG.task), "context_windows": [128, 256]}})
    assert cell_config(told, cell(window=128)).rollout.context_window == 128
    assert cell_config(told, cell(window=200)).rollout.context_window == told.rollout.context_window
    with pytest.raises(ConfigError, match=r"--context_windows=1024: threads of a hold model\.max_seq_len=512"):
        cell_config(CONFIG, cell(window=1024))


def test_ways_of_reasoning_that_there_are_not_are_named():
    check_programs([cell("adaptive"), cell("cons@3:serial", temperature=1.0)], COUNTDOWN)
    for wrong in ("telepathy", "vote@3:serial"):
        with pytest.raises(ConfigError, match=f"--methods={wrong}"):
            check_programs([cell(wrong)], COUNTDOWN)


def test_settings_that_a_way_of_reasoning_cannot_take_are_refused():
    check_programs([cell("serial", budget=4), cell("direct"), cell("pass@2:hogwild", temperature=1.0)], COUNTDOWN)
    for wrong, changes in (
        ("direct", {"budget": 4}),
        ("cons@2:tree_of_thoughts", {"budget": 4, "temperature": 1.0}),
        ("pass@1:cons@8:serial", {"temperature": 0.0}),
    ):
        with pytest.raises(ConfigError, match=f"--methods={wrong}: method"):
            check_programs([cell("adaptive"), cell(wrong, **changes)], COUNTDOWN)


class Engine:
    """Remembers what it was made and given."""

    made: ClassVar[list["Engine"]] = []

    def __init__(self, config, mesh, tokenizer, params, *, expects_groups):
        del config, mesh, tokenizer
        self.expects_groups, self.weights, self.is_warm = expects_groups, [params], False
        self.made.append(self)

    def warm_up(self):
        self.is_warm = True

    def set_params(self, params):
        self.weights.append(params)


@pytest.fixture
def holder(monkeypatch):
    monkeypatch.setattr("apr_jax.evaluation.compare.cells.policy_engine", Engine)
    monkeypatch.setattr(Engine, "made", [])
    return EngineHolder()


def test_an_engine_expects_groups_where_the_row_shares_a_cache(holder):
    told = policy(**{"task.context_windows": [128, 256], "data.condition_on_budget": True})
    for program in ("adaptive", "cons@2:hogwild", "hogwild"):
        _engine_for(holder, told, cell(program).row)
    assert [(engine.expects_groups, engine.is_warm) for engine in Engine.made] == [(False, True), (True, True)]


def test_no_cell_reads_what_another_computed(holder):
    """Weights that are set, the same or others, make an engine forget its cache."""
    first, other = policy(), dataclasses.replace(policy("b"), params={"other": 1}, weights="others")
    for own in (first, first, other):
        _engine_for(holder, own, cell().row)
    (engine,) = Engine.made
    assert engine.weights == [first.params, first.params, other.params]


class OtherTokenizer(BuiltinTokenizer):
    """The same ids of other texts."""

    def save(self, folder):
        super().save(folder)
        path = pathlib.Path(folder) / "tokenizer.json"
        path.write_text(path.read_text().replace("Moving to", "Going to"))


def settings(own=None, asked=ASKED, **changes):
    own = own or policy()
    return cell_settings(cell(**changes), own, own.config, asked)


@pytest.mark.parametrize(
    "other",
    [
        settings(temperature=1.0),
        settings(budget=4),
        settings(window=256),
        settings(program="serial"),
        settings(asked=dataclasses.replace(ASKED, problems=ASKED.problems[::-1])),
        settings(asked=dataclasses.replace(ASKED, seed=1)),
        settings(asked=dataclasses.replace(ASKED, at_once=1)),
        settings(policy(**{"rollout.max_children": 3})),
        settings(policy(**{"engine.lanes": 16})),
        settings(policy(**{"model.rope_theta": 3.0})),
        settings(dataclasses.replace(policy(), weights="others")),
        settings(dataclasses.replace(policy(), tokenizer=OtherTokenizer())),
        settings(policy(**{"task.context_windows": [128, 256]})),
        settings(policy(**{"data.method": "serial"})),
    ],
)
def test_settings_that_matter_are_in_the_fingerprint(other):
    assert other != settings()


def test_a_tokenizer_is_known_by_what_it_is_and_not_by_its_place(holder):
    assert settings(policy(**{"data.tokenizer": "a/tokenizer.json"})) == settings()
    _engine_for(holder, policy(), cell().row)
    _engine_for(holder, policy(**{"data.tokenizer": "a/tokenizer.json"}), cell().row)
    assert len(Engine.made) == 1
    _engine_for(holder, dataclasses.replace(policy(), tokenizer=OtherTokenizer()), cell().row)
    assert len(Engine.made) == 2, "it bans other tokens"


def test_settings_that_only_training_reads_are_not():
    assert settings(policy(**{"name": "x", "data.num_train": 99, "data.directory": "elsewhere"})) == settings()


def test_weights_are_told_apart():
    params = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)}
    digest = weights_digest(params)
    assert digest == weights_digest({name: array.copy() for name, array in params.items()})
    changed = [{**params, "b": np.full(4, 1e-30, np.float32)}, {**params, "a": np.ones((3, 2), np.float32)}]
    changed.append({"a": params["a"], "c": params["b"]})
    assert len({digest, *map(weights_digest, changed)}) == 4
