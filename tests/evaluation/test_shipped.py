"""The policies that come with the package: of today's configuration, and as good as their cards say."""

import pathlib
import random
import re

import pytest

import apr_jax
from apr_jax.checkpoints.identity import find_policy
from apr_jax.config import ConfigError
from apr_jax.config_dict import from_config_dict
from apr_jax.evaluation.rollout_sources import policy_folder
from apr_jax.policies import DEFAULT, SHIPPED

FILES = {"README.md", "apr_jax.json", "config.json", "generation_config.json", "model.safetensors"}

POLICIES = list(SHIPPED.values())


@pytest.mark.parametrize("folder", POLICIES, ids=lambda folder: folder.name)
def test_it_is_a_small_folder_whose_configuration_is_of_this_version(folder):
    method = "serial" if folder.name.endswith("_serial") else "adaptive"
    assert {path.name for path in folder.iterdir()} >= FILES | ({"dialect.json"} if method == "adaptive" else set())
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 20e6
    saved = find_policy(folder).config  # a new field goes to config_dict._ADDED, with the effect of before
    assert from_config_dict(saved).data.method == method


def test_an_installed_package_has_it():
    setup = (pathlib.Path(__file__).parents[2] / "setup.py").read_text()
    patterns = re.findall(r'"(policies/[^"]*)"', setup)
    package = DEFAULT.parents[1]
    held = {path for pattern in patterns for path in package.glob(pattern)}
    assert held >= {path for folder in POLICIES for path in folder.iterdir() if path.is_file()}


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("laptop", 200),
        ("multiplication", 60),
        ("multiplication_serial", 30),
        ("countdown4", 24),
        ("countdown4_first_success", 24),
        ("countdown4_rl", 24),
        ("countdown4_serial", 24),
    ],
)
def test_it_solves_what_its_card_says(name, number):
    """The card's figure is of 1,000 held-out problems; some others lie within five standard errors of it."""
    card = re.search(r"solves ([0-9.]+) % of", (SHIPPED[name] / "README.md").read_text())
    assert card, "the card names no figure"
    expected = float(card[1]) / 100
    policy = apr_jax.load(name, overrides={"mesh.data": 2})  # a test has eight devices, which take longer
    rng = random.Random(20)
    sample = policy.task.sampler(policy.config, "test")  # of targets that training has seen
    problems = [sample(rng) for _ in range(number)]
    solved = sum(solution.solved for solution in policy.solve(problems)) / len(problems)
    error = (expected * (1 - expected) / len(problems)) ** 0.5
    assert abs(solved - expected) <= 5 * error


def test_a_name_finds_a_policy_unless_there_is_such_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert policy_folder("multiplication") == SHIPPED["multiplication"]
    assert policy_folder(None) == DEFAULT
    (tmp_path / "multiplication").mkdir()
    assert policy_folder("multiplication") == pathlib.Path("multiplication")
    with pytest.raises(ConfigError, match="no such folder"):
        policy_folder("multiply")
