"""Every number of the configuration has a range; whatever a field is given, the door takes it or names the field."""

import dataclasses
import math
import typing

import pytest

from apr_jax import config as config_lib
from apr_jax.config import Config, ConfigError, Section, check_run
from apr_jax.config_dict import from_config_dict, to_dict
from apr_jax.config_fields import ANY_NUMBER, number_range, ranges_of
from apr_jax.tasks import TASKS
from apr_jax.train.run import train
from configs import methods, nested_sums
from configs.grpo import get_config

NAN, INF = math.nan, math.inf
HOSTILE: list[object] = [
    -1,
    0,
    1,
    -1.5,
    0.5,
    1e300,
    -1e300,
    1e-300,
    NAN,
    INF,
    -INF,
    2**31,
    2**63,
    -(2**63),
    10**400,
    10**5000,
]
HOSTILE += ["x", "", "a/b", "\0", "\ud800", b"x", None, True, False, [], {}, (1,), [NAN], [True], [2**63], object()]
SECTIONS = [kind for kind in vars(config_lib).values() if isinstance(kind, type) and issubclass(kind, Section)][1:]
SECTIONS += [task.section for task in TASKS.values()]


def leaves(values, path=()):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


def replaced(values, path, value):
    key, *rest = path
    return {**values, key: replaced(values[key], rest, value) if rest else value}


CONFIGS = {
    "smoke": get_config("smoke"),
    "nested": methods.get_config("nested"),
    "nested_sums": nested_sums.get_config(),
}
VALUES = {name: to_dict(from_config_dict(config)) for name, config in CONFIGS.items()}
VALUES["smoke"]["model"]["rope_scaling"] = {
    "factor": 8.0,
    "low_frequency_factor": 1.0,
    "high_frequency_factor": 4.0,
    "original_max_seq_len": 256,
}


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_number_has_a_range_of_its_own(section):
    hints = typing.get_type_hints(section, include_extras=True)
    for field in dataclasses.fields(section):
        plain = typing.get_type_hints(section)[field.name]
        if {plain, *typing.get_args(plain)} & {int, float}:
            allowed = number_range(hints[field.name])
            assert allowed is not None, field.name
            assert allowed != ANY_NUMBER, f"{section.__name__}.{field.name}: name its range in its type"
            assert math.isfinite(allowed.low), field.name
            assert math.isfinite(allowed.high), field.name


@pytest.mark.parametrize(
    ("name", "path"), [(name, path) for name, values in VALUES.items() for path in leaves(values)], ids=str
)
def test_whatever_a_field_is_given_the_door_takes_it_or_names_it(name, path):
    field = path[-1]
    for value in HOSTILE:
        try:
            taken = from_config_dict(replaced(VALUES[name], path, value))
        except ConfigError as error:
            text = str(error)
            assert len(text) < 1000, (value, text)
            assert "\n" not in text, (value, text)
            assert field in text or path[0] == "task", (value, text)
        else:
            assert isinstance(taken, Config)
            assert value is not True or isinstance(getattr_path(taken, path), bool)
            assert not isinstance(value, float) or math.isfinite(value)


def getattr_path(config, path):
    for key in path:
        config = getattr(config, key)
    return config


RANGES = {(section.__name__, name): allowed for section in SECTIONS for name, allowed in ranges_of(section).items()}


@pytest.mark.parametrize("key", RANGES, ids=".".join)
def test_both_ends_are_taken_and_what_lies_just_outside_is_not(key):
    allowed = RANGES[key]
    whole = isinstance(allowed.low, int)
    beyond = (allowed.low - 1, allowed.high + 1)
    if not whole:
        beyond = (math.nextafter(allowed.low, -INF), math.nextafter(allowed.high, INF))
    for end in (allowed.low, allowed.high):
        assert allowed.fault(end) is None
        assert type(end) is (int if whole else float)
    for number in (*beyond, NAN, INF, -INF):
        fault = allowed.fault(number)
        assert fault
        with pytest.raises(ConfigError, match=r"somewhere=.* must|somewhere=.*:"):
            config_lib.check_range("somewhere", number, allowed)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("seed", -1, r"seed=-1 must be at least 0"),
        ("seed", 2**63, r"seed=9223372036854775808 must be at most 9,223,372,036,854,775,807"),
        ("seed", 1.0, r"seed=1\.0: wrong type, it takes int, not float"),
        ("name", "runs/mine", r"name='runs/mine' must be a plain name"),
        ("name", "..", r"must be a plain name"),
        ("name", "a\\b", r"must be a plain name"),
        ("name", "a\nb", r"must be a plain name"),
        ("name", "", r"must be a plain name"),
        ("name", "x" * 300, r"must be a plain name"),
        ("data.directory", "", r"data\.directory='' must be a path"),
        ("data.directory", "a\0b", r"must be a path"),
        ("data.directory", "gs://bucket/data", r"data\.directory=gs://bucket/data: the data set must lie on"),
        ("data.directory", "s3://bucket/data", r"must lie on this machine"),
        ("sft.num_steps", -1, r"sft\.num_steps=-1 must be at least 0"),
        ("sft.optimizer.learning_rate", -0.01, r"sft\.optimizer\.learning_rate=-0\.01 must be at least 0"),
        ("grpo.optimizer.learning_rate", NAN, r"grpo\.optimizer\.learning_rate=nan must be a finite number"),
        ("sft.optimizer.b2", 1.0, r"sft\.optimizer\.b2=1\.0 must lie in \[0, 0\.999999\]"),
        ("sft.optimizer.b1", 0.99999999, r"b1=0\.99999999 must lie in"),
        ("sft.optimizer.weight_decay", INF, r"weight_decay=inf must be a finite number"),
        ("grpo.kl_coef", -0.1, r"grpo\.kl_coef=-0\.1 must be at least 0"),
        ("evaluation.also_temperature", -0.5, r"evaluation\.also_temperature=-0\.5 must be >= 0"),
        ("evaluation.temperature", NAN, r"evaluation\.temperature=nan must be a finite number from 0 to"),
        ("rollout.max_depth", -1, r"rollout\.max_depth=-1 must be at least 0"),
        ("data.facts_share", 1, r"data\.facts_share=1 must lie in \[0, 0\.99\]"),
        ("data.replay_weight", -1.0, r"data\.replay_weight=-1\.0 must be at least 0"),
        ("model.rope_theta", 0, r"model\.rope_theta=0 must be at least 1e-06"),
        ("model.rms_norm_eps", 0.0, r"model\.rms_norm_eps=0\.0 must be at least 1e-12"),
        ("model.num_layers", 10**9, r"model\.num_layers=1000000000 must be at most 10,000"),
        ("model.rope_scaling.low_frequency_factor", NAN, r"model\.rope_scaling\.low_frequency_factor=nan must be"),
        ("task.min_target", 0, r"task\.min_target=0 must be at least 1"),
        ("task.min_target", 41, r"task\.min_target=41 is above task\.max_target=40"),
        ("task.max_number", 2**31, r"task\.max_number=2147483648 must be at most 1,000,000"),
        ("task.num_numbers", 9, r"task\.num_numbers=9 must lie in 2\.\.6"),
        ("task.num_unseen_targets", 31, r"num_unseen_targets=31 leaves none of the 31 targets"),
        ("task.max_number", 1, r"none of 10000 draws of 3 numbers in 1\.\.1 reaches a target"),
        ("task.parent_beams", (0,), r"task\.parent_beams\[0\]=0 must be at least 1"),
    ],
)
def test_what_cannot_work_is_refused_at_the_door(path, value, message):
    with pytest.raises(ConfigError, match=message):
        from_config_dict(replaced(VALUES["smoke"], tuple(path.split(".")), value))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mesh.data": 1, "mesh.tensor": 2, "model.vocab_size": 337, "model.num_kv_heads": 2},
            r"vocab_size=337 must be",
        ),
        ({"data.facts_share": 0.5, "task.max_number": 400}, r"facts with results up to 160000 are too many"),
        ({"task.max_result": 5, "task.min_number": 6}, r"task\.max_result=5 is below task\.min_number=6"),
        ({"task.restate": True}, r"task\.restate=True: only task\.search_order='depth_first' comes back to states"),
        ({"task.restate_operation": True}, r"task\.restate_operation=True: .* set task\.restate=True"),
        ({"task.attempts": True, "task.heuristic": "mult"}, r"task\.attempts=True: .* set task\.heuristic='none'"),
    ],
)
def test_two_fields_that_contradict_each_other_are_named(changes, message):
    values = VALUES["smoke"]
    for path, value in changes.items():
        values = replaced(values, tuple(path.split(".")), value)
    with pytest.raises(ConfigError, match=message):
        from_config_dict(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grpo.prompts_per_step": 65}, r"grpo\.prompts_per_step=65 is more than data\.num_train=64"),
        ({"evaluation.num_problems": 17}, r"evaluation\.num_problems=17 is more than data\.num_test=16"),
        (
            {"evaluation.split": "validation", "evaluation.num_problems": 40},
            r"=40 is more than data\.num_validation=16",
        ),
        ({"data.tokenizer": "/nowhere/tokenizer.json"}, r"data\.tokenizer=/nowhere/tokenizer\.json: no such file"),
        ({"rollout.temperature": 0}, r"rollout\.temperature=0\.0: GRPO learns from how rollouts of a problem differ"),
        ({"sft.optimizer.muon_learning_rate": 0.0}, r"sft\.optimizer\.muon_learning_rate=0\.0: Muon would leave"),
        ({"grpo.optimizer.name": "muon"}, r"grpo\.optimizer\.muon_learning_rate=0\.0: Muon would leave"),
        ({"sft.number_waves": 0.5, "model.embed_dim": 32}, r"model\.embed_dim=32 holds no 40 waves"),
    ],
)
def test_a_run_that_would_fail_late_or_learn_nothing_is_refused_before_any_work(tmp_path, changes, message):
    values = VALUES["smoke"]
    for path, value in changes.items():
        values = replaced(values, tuple(path.split(".")), value)
    with pytest.raises(ConfigError, match=message):
        train(from_config_dict(values), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    if "grpo.prompts_per_step" in changes or "rollout.temperature" in changes:  # without GRPO nothing is amiss
        check_run(from_config_dict(replaced(values, ("grpo", "num_steps"), 0)))


def test_a_number_of_thousands_of_digits_is_refused_in_a_line():
    with pytest.raises(ConfigError, match=r"seed=a number of thousands of digits must be at most"):
        from_config_dict(replaced(VALUES["smoke"], ("seed",), 10**5000))


def test_sections_check_themselves_however_they_are_made():
    config: typing.Any = from_config_dict(VALUES["smoke"])
    with pytest.raises(ConfigError, match=r"optimizer\.b2=1\.0 must lie in"):
        dataclasses.replace(config.sft.optimizer, b2=1.0)
    with pytest.raises(ConfigError, match=r"task\.parent_beams=0 must be at least 1"):
        dataclasses.replace(config.task, parent_beams=(4, 0))
