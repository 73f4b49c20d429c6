"""A second task (nested sums) through the entry points: what a user runs, from a policy with random weights."""

import functools
import json

import pytest

from apr_jax.checkpoints.manager import Checkpoints
from apr_jax.model.params import init_params
from tests.launch.test_evaluate import ROOT, launched
from tests.tasks.test_nested_sums import tiny_config

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run of the task."""
    home = tmp_path_factory.mktemp("home")
    config = tiny_config(home / "data")
    with Checkpoints(home / "runs" / "sums", "sft", config) as checkpoints:
        checkpoints.save(1, {"policy": init_params(config.model, 0)}, {})
    return home


def test_solve(home):
    solve = functools.partial(launched, "solve.py", home)
    result = json.loads(solve("[1+2]*3", "--json=-").stdout)
    assert (result["title"], result["method"], result["solvable"]) == ("[1+2]*3", "adaptive", None)
    assert "a problem of nested_sums is written as [3+4]*5" in solve("27", "3", "9", check=2).stderr
    assert "has no dialect for 'serial'" in solve("1+2", "--method=serial", check=2).stderr


def test_evaluate(home):
    (home / "mine.jsonl").write_text('{"title": "1+2"}\n{"title": "[3+4]*5"}\n')
    own = ("--problems=mine.jsonl", "--method=cons@2:adaptive", "--temperature=1", "--json=figures.json")
    launched("evaluate.py", home, *own, "--rollouts=threads.jsonl")
    figures = json.loads((home / "figures.json").read_text())
    assert (figures["num_problems"], len(figures["cons_at_k"])) == (2, 2)
    titles = [json.loads(line)["title"] for line in (home / "threads.jsonl").read_text().splitlines()]
    assert titles == ["1+2", "[3+4]*5"]


def test_compare(home):
    rows = "--methods=sums,cons@2:sums,best@2:sums"
    launched("compare.py", home, rows, "--temperatures=1", "--num_problems=4", "--workdir=comparison")
    results = [json.loads(line) for line in (home / "comparison" / "results.jsonl").read_text().splitlines()]
    assert [row["program"] for row in results] == ["adaptive", "cons@2:adaptive", "best@2:adaptive"]


def test_generate_data(home):
    config = f"--config={ROOT / 'configs' / 'nested_sums.py'}"
    launched("generate_data.py", home, config, "--num_problems=20", "--tokens", "--json=rate.json")
    figures = json.loads((home / "rate.json").read_text())
    assert (figures["problems"], figures["parallel_accuracy"]) == (20, 1.0)
    assert "serial_accuracy" not in figures
    assert 0 < figures["sequential_tokens"] < figures["total_tokens"]
