"""launch/compare.py as a user runs it."""

import functools
import json

import pytest

from apr_jax.model.llama import init_params
from apr_jax.parallel.mesh import make_mesh
from apr_jax.train.checkpoint import Checkpoints
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.state import create_state
from tests.launch.test_evaluate import launched, small_config

_compare = functools.partial(launched, "compare.py")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two runs of one configuration, as training leaves them."""
    home = tmp_path_factory.mktemp("home")
    config = small_config(home)
    optimizer = make_optimizer(config.sft.optimizer, 1)
    for seed, name in enumerate(("one", "two")):
        state = create_state(make_mesh(config.mesh), config.model, optimizer, init_params(config.model, seed))
        with Checkpoints(home / name, "sft", config) as checkpoints:
            checkpoints.save(1, state, {})
        record = {"step": 1, "phase": "grpo", "accuracy": 0.5, "sequential_tokens": 300.0}
        (home / name / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return home


def test_two_runs(home):
    arguments = ("--policies=a=one,b=two,c=one", "--num_problems=3", "--json=out.json", "--figure=runs.svg")
    done = _compare(home, *arguments)
    assert "b against a (95 %, paired):" in done.stdout
    document = json.loads((home / "out.json").read_text())
    assert set(document["summaries"]) == {"a", "b", "c"}
    for difference in document["differences"]["c"].values():  # the same policy
        assert difference["change"] == difference["change_low"] == 0
    tokens = document["differences"]["b"]["sequential_tokens"]
    assert tokens["second"] == document["summaries"]["b"]["sequential_tokens"]
    assert (home / "runs.svg").read_text().count("<svg") == 1


@pytest.mark.parametrize("policies", ["a=one", "a=one,b=nowhere"])
def test_what_cannot_be_compared_is_said_at_once(home, policies):
    done = _compare(home, f"--policies={policies}", check=2)
    assert "--policies" in done.stderr
    assert "Traceback" not in done.stderr
