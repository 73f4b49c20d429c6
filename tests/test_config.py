"""The config door: strict, with hints, and with both numbers where two settings disagree."""

import dataclasses
import importlib
import pathlib
import subprocess
import sys
import time
import typing

import pytest
from ml_collections import ConfigDict

from apr_jax import config as config_lib
from apr_jax.config import Config, ConfigError
from apr_jax.config_dict import from_config_dict, to_dict
from apr_jax.reasoning import METHODS
from apr_jax.tasks import TASKS

ROOT = pathlib.Path(__file__).parent.parent
VARIANTS = [
    (name, variant)
    for name in ("grpo", "sft", "benchmark_decode", "benchmark_train")
    for variant in ("laptop", "smoke", "paper", "7b")
]
VARIANTS += [("grpo", "paper_gqa")]
VARIANTS_OF_METHODS = ("adaptive", "serial", "direct", "tree_of_thoughts", "pasta", "nested", "hogwild")
VARIANTS += [("methods", method) for method in VARIANTS_OF_METHODS]
TREE = {"search": "breadth_first", "breadth": 5, "value_samples": 1, "threshold": 0.5}
REWARD = {"sequential_token_price": 0.0, "token_price": 0.0, "thread_price": 0.0, "failures_pay": False}


def load(name: str = "grpo", variant: str = "laptop") -> ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config(variant)


def changed(**fields: object) -> ConfigDict:
    """The laptop config with `section__field=value` replaced, types unchecked as a file could have them."""
    config = load()
    for path, value in fields.items():
        section, _, field = path.partition("__")
        with config.unlocked(), config.ignore_type():
            if field:
                config[section][field] = value
            else:
                config[section] = value
    return config


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_variant_converts_and_comes_back(name: str, variant: str):
    config = from_config_dict(load(name, variant))
    assert from_config_dict(to_dict(config)) == config


def test_unknown_variant_names_the_known_ones():
    with pytest.raises(ValueError, match="laptop, smoke, paper"):
        load(variant="lap")
    with pytest.raises(ValueError, match="choose one of " + ", ".join(VARIANTS_OF_METHODS)):
        load("methods", "search")


def test_every_method_has_a_variant():
    assert {load("methods", variant).data.method for variant in VARIANTS_OF_METHODS} == set(METHODS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model__nlayers": 3}, r"model\.nlayers: no such field; did you mean num_layers\?"),
        ({"rollout__temprature": 1.0}, r"rollout\.temprature: no such field; did you mean temperature\?"),
        ({"modle": 3}, r"modle: no such field; did you mean model\?"),
        ({"model__num_layers": "3"}, r"model\.num_layers='3': wrong type, it takes int, not str"),
        ({"model__num_layers": True}, r"model\.num_layers=True: wrong type"),
        ({"model": 3}, r"model=3: wrong type, it takes a section"),
        ({"model__attention": "cudn"}, r"model\.attention='cudn': .* did you mean 'cudnn'\?"),
        ({"model__num_kv_heads": 2}, r"num_heads=3 must be a multiple of model\.num_kv_heads=2"),
        ({"model__head_dim": 3}, r"head_dim=3 must be even"),
        ({"mesh__data": 3}, r"sft\.microbatches=8 must be a multiple of mesh\.data \* mesh\.fsdp = 3"),
        ({"mesh__tensor": 2}, r"num_kv_heads=3 must be a multiple of mesh\.tensor=2"),
        ({"mesh__fsdp": 5}, r"embed_dim=192 must be a multiple of mesh\.fsdp=5"),
        ({"mesh__fsdp": 3, "mesh__data": 2}, r"=8 must be a multiple of mesh\.data \* mesh\.fsdp = 6"),
        ({"mesh__fsdp": 3}, r"=8 must be a multiple of mesh\.fsdp = 3"),
        ({"mesh__data": 0}, r"mesh\.data=0 must be at least 1, or -1: as the devices allow"),
        ({"mesh__data": -2}, r"mesh\.data=-2 must be at least 1, or -1"),
        ({"mesh__fsdp": -1}, r"mesh\.fsdp=-1 must be at least 1$"),
        ({"engine__pages": 10}, r"engine\.pages=10 leaves 9 usable pages .* tokens needs 32"),
        ({"engine__lanes": 0}, r"engine\.lanes=0 must be at least 1"),
        ({"rollout__num_lanes": 64}, r"rollout\.num_lanes: no such field"),
        ({"sft__row_len": 256}, r"sft\.row_len=256 is shorter than model\.max_seq_len=512"),
        ({"sft__microbatches": 3}, r"rows_per_step=8 must be a multiple of sft\.microbatches=3"),
        ({"grpo__group_size": 1}, r"group_size=1: an advantage needs at least 2"),
        ({"grpo__credit": "use"}, r"grpo\.credit='use': choose one of .* did you mean 'used'\?"),
        ({"grpo__clip_ratio_high": -0.1}, r"grpo\.clip_ratio_high=-0\.1 must be at least 0"),
        ({"grpo__length_normaliser": 0}, r"grpo\.length_normaliser=0 must be at least 1"),
        ({"grpo__max_resamples": 400}, r"max_resamples=400 may ask for 12832 problems .*num_train=10000"),
        ({"grpo__overlap": 1}, r"overlap=1 learns from rollouts of an earlier policy.*set grpo\.importance_cap"),
        (
            {"grpo__overlap": 1, "grpo__importance_cap": 2.0, "grpo__num_steps": 7},
            r"grpo\.num_steps=7 must be a multiple of grpo\.overlap \+ 1 = 2",
        ),
        (
            {"grpo__overlap": 1, "grpo__importance_cap": 2.0, "grpo__checkpoint_every": 1},
            r"grpo\.checkpoint_every=1 must be a multiple of grpo\.overlap \+ 1 = 2",
        ),
        ({"grpo__credit": "child"}, r"grpo\.credit='child': choose one of 'rollout', 'used'"),
        ({"grpo__reward": dict(REWARD, thread_price=-1.0)}, r"grpo\.reward\.thread_price=-1\.0 must be a number >= 0"),
        ({"grpo__reward": dict(REWARD, price=1.0)}, r"grpo\.reward\.price: no such field"),
        ({"rollout__temperature": -1.0}, r"temperature=-1\.0 must be >= 0"),
        ({"task__parent_beams": (5, 11)}, r"parent_beams=\(5, 11\) holds 11, which is above task\.child_beam_max=8"),
        ({"task__parent_beams": ()}, r"parent_beams=\(\): name at least one beam"),
        ({"task__parent_beams": 5}, r"parent_beams=5: wrong type, it takes a list of int"),
        ({"task__parent_beams": [5, "9"]}, r"parent_beams\[1\]='9': wrong type, it takes int"),
        ({"task__spawn_probability": 1.5}, r"spawn_probability=1\.5 must lie in \[0, 1\]"),
        ({"task": {"depth": 3}}, r"task\.name: missing; name one of countdown"),
        ({"task__name": "countdwn"}, r"task\.name='countdwn': choose one of .*; did you mean 'countdown'\?"),
        ({"task__num_numbers": 1}, r"at least 2 numbers"),
        ({"task__spawn_depth": 0}, r"task\.spawn_depth=0 must be at least 1"),
        ({"task__spawn_depth": 2}, r"task\.spawn_depth=2 is above rollout\.max_depth=1"),
        (
            {"task__spawn_depth": 2, "rollout__max_depth": 2, "data__method": "serial"},
            r"task\.spawn_depth=2: only data\.method='adaptive' has children that spawn",
        ),
        ({"task__context_windows": (256, 128)}, r"context_windows=\(256, 128\): name distinct sizes from 1, in order"),
        ({"task__context_windows": (256,), "data__method": "serial"}, r"only data\.method='adaptive' names windows"),
        ({"task__context_windows": (256, 1024)}, r"holds one above model\.max_seq_len=512"),
        (
            {"task__context_windows": (256, 512), "rollout__context_window": 300},
            r"rollout\.context_window=300 must be 0 or one of task\.context_windows=\(256, 512\)",
        ),
        ({"tree_of_thoughts": dict(TREE, breadth=0)}, r"tree_of_thoughts\.breadth=0 must be at least 1"),
        ({"tree_of_thoughts": dict(TREE, search="dfs")}, r"tree_of_thoughts\.search='dfs': choose one of 'breadth"),
        ({"data__method": "tree_of_thoughts", "data__condition_on_budget": True}, r"has no budget to name"),
        ({"data__method": "hogwild", "data__condition_on_budget": True}, r"has no budget to name"),
        ({"data__num_train": 0}, r"data\.num_train=0 must be at least 1"),
    ],
)
def test_bad_settings_say_what_to_do(fields: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        from_config_dict(changed(**fields))


def test_a_missing_field_is_named():
    values = to_dict(from_config_dict(load()))
    del values["model"]["num_layers"]
    with pytest.raises(ConfigError, match=r"model\.num_layers: missing; it takes int"):
        from_config_dict(values)


def test_whole_numbers_serve_as_floats():
    assert from_config_dict(changed(rollout__temperature=1)).rollout.temperature == 1.0


def test_a_bad_override_ends_the_trainer_in_two_seconds_with_exit_code_2(tmp_path: pathlib.Path):
    command = [sys.executable, "launch/train.py", "--config=configs/grpo.py:smoke", f"--workdir={tmp_path}"]
    start = time.monotonic()
    result = subprocess.run([*command, "--config.engine.pages=8"], cwd=ROOT, capture_output=True, text=True)
    seconds = time.monotonic() - start
    assert result.returncode == 2, result.stderr
    assert "engine.pages=8" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
    # The bound that matters, two seconds on an idle machine, is measured by hand; a test must not time a busy one.
    assert seconds < 60


def _read_fields() -> set[str]:
    """Attribute names read anywhere in the package outside the config's own checks."""
    import ast

    names = set()
    for path in [*ROOT.glob("apr_jax/**/*.py"), *ROOT.glob("launch/*.py")]:
        if path.name != "config.py":
            names |= {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
    return names


def test_every_option_is_read():
    sections = [hint for hint in typing.get_type_hints(Config).values() if dataclasses.is_dataclass(hint)]
    assert len(sections) == 12
    sections += [task.section for task in TASKS.values()]
    sections += [config_lib.OptimizerConfig, config_lib.RewardConfig]
    fields = {f.name for section in sections for f in dataclasses.fields(section)}
    assert fields - _read_fields() == set()
