"""The parts of the reproduction: each after what it needs, done once by the command that it has."""

import dataclasses
import pathlib

import pytest

from apr_jax.config import ConfigError
from apr_jax.config_dict import from_config_dict
from apr_jax.reproduce.parts import Record, choose, make_parts
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.train.run import check_training
from configs import countdown4

PARTS = make_parts(pathlib.Path("work"), "configs/countdown4.py", quick=False)


def _flag(part, name):
    return next(flag.partition("=")[2] for flag in part.flags if flag.startswith(f"--{name}="))


@pytest.mark.parametrize("quick", [False, True])
def test_every_part_comes_after_those_that_it_needs(quick):
    parts = make_parts(pathlib.Path("work"), "configs/countdown4.py", quick=quick)
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    for index, part in enumerate(parts):
        assert set(part.needs) <= set(names[:index]), part.name
    assert len({_flag(part, "workdir") for part in parts}) == len(parts)


@pytest.mark.parametrize("quick", [False, True])
def test_what_a_part_reads_is_made_by_one_that_it_needs(quick):
    parts = make_parts(pathlib.Path("work"), "configs/countdown4.py", quick=quick)
    made = {part.name: _flag(part, "workdir") for part in parts}
    for part in parts:
        read = [flag.partition("=")[2] for flag in part.flags if flag.startswith(("--start=", "--checkpoint="))]
        read += [
            named.partition("=")[2]
            for flag in part.flags
            if flag.startswith("--policies=")
            for named in flag.partition("=")[2].split(",")
        ]
        assert sorted(read) == sorted(made[name] for name in part.needs), part.name


@pytest.mark.parametrize("quick", [False, True])
def test_other_methods_meet_the_problems_that_serial_met(quick):
    parts = {part.name: part for part in make_parts(pathlib.Path("work"), "configs/countdown4.py", quick=quick)}
    windows, methods = parts["compare_windows"], parts["compare_methods"]
    assert _flag(windows, "num_problems") == _flag(methods, "num_problems")
    assert "serial" in windows.needs


@pytest.mark.parametrize("words", ["", "gpu"])
@pytest.mark.parametrize("quick", [False, True])
def test_every_training_has_a_configuration_and_the_same_rollouts_of_rl(quick, words):
    parts = make_parts(pathlib.Path("work"), "configs/countdown4.py", words, quick=quick)
    variants = [_flag(part, "config").partition(":")[2] for part in parts if part.program == "train.py"]
    configs = [from_config_dict(countdown4.get_config(variant)) for variant in variants]
    rollouts = {c.grpo.num_steps * c.grpo.prompts_per_step * c.grpo.group_size for c in configs if c.grpo.num_steps}
    assert len(rollouts) == 1
    assert len({config.name for config in configs}) == len(configs)
    assert {config.model.compute_dtype for config in configs} == {"bfloat16" if words else "float32"}
    for config in configs:
        check_training(config)


@pytest.mark.parametrize(
    "variant",
    [
        "",
        "adaptive.path",
        "adaptive.fast",
        "rl",
        "adaptive_rl",
        "adaptive..rl",
        "adaptive.wide",
        "hogwild.rl",
        "serial.nested",
    ],
)
def test_other_variants_are_refused(variant):
    with pytest.raises(ValueError, match="no such variant; choose one of adaptive"):
        countdown4.get_config(variant)


@pytest.mark.parametrize("variant", ["adaptive.nested", "adaptive_budget.nested.rl", "adaptive.nested.rl.path.gpu"])
def test_children_may_spawn_too(variant):
    config = from_config_dict(countdown4.get_config(variant))
    check_training(config)
    assert isinstance(config.task, CountdownConfig)
    assert config.task.spawn_depth == config.rollout.max_depth == 2


def test_names_choose_parts_in_their_order():
    assert choose(PARTS, []) == PARTS
    assert [part.name for part in choose(PARTS, ["serial", "facts"])] == ["facts", "serial"]
    with pytest.raises(ConfigError, match="no part sereal; --list shows"):
        choose(PARTS, ["facts", "sereal"])


def test_a_part_is_done_by_its_own_command_and_its_time_adds_up(tmp_path):
    part, named = PARTS[1], {part.name: part for part in PARTS}
    record = Record(tmp_path)
    assert record.missing(part, named) == ["facts"]
    record.add(part, 10.0, done=False)
    assert not record.is_done(part)
    record.add(part, 5.5, done=True)
    again = Record(tmp_path)
    assert again.is_done(part)
    assert again.seconds(part) == 15.5
    other = dataclasses.replace(part, flags=(*part.flags, "--config.seed=1"))
    assert not again.is_done(other)
    assert again.seconds(other) == 0.0
