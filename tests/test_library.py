"""`import apr_jax`: loading a policy and solving problems with it."""

import pathlib
import subprocess
import sys

import pytest

import apr_jax
from apr_jax.checkpoints.manager import Checkpoints
from apr_jax.config import ConfigError
from apr_jax.data.tokenizer import load_tokenizer
from apr_jax.evaluation.run import evaluate
from apr_jax.library import Policy
from apr_jax.model.params import init_params
from apr_jax.model.weights.hf import save_hf
from apr_jax.reasoning.serial import serial
from apr_jax.reasoning.settings import make_settings
from apr_jax.tasks.countdown.rules import Problem
from configs.grpo import get_config
from tests.reasoning.fixtures import SMALL, TOKENIZER, Replay, demonstrations
from tests.reasoning.scripted_engine import ScriptedEngine
from tests.train.small import small_config

CONFIG = small_config(**{"model.max_seq_len": 64, "rollout.max_steps": 16, "engine.lanes": 4})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with random weights."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    params = init_params(CONFIG.model, 0)
    with Checkpoints(run, "sft", CONFIG) as checkpoints:
        checkpoints.save(1, {"policy": params}, {})
    return run


@pytest.fixture(scope="module")
def policy(run):
    return apr_jax.load(run)


class Scripted(Policy):
    """A policy whose engine writes what demonstrations wrote."""

    demos = tuple(demonstrations(SMALL, "adaptive", 12))

    def engine_for(self, method):
        class Engine(ScriptedEngine):
            def run(self, programs, *, observer=None, **how):
                return super().run(programs, **how)

        return Engine(Replay(self.demos))


def test_importing_it_loads_nothing_heavy():
    heavy = ("jax", "numpy", "orbax", "tensorflow_datasets", "absl")
    program = f"import sys, apr_jax; dir(apr_jax); print([name for name in {heavy} if name in sys.modules])"
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_front_door_offers_what_it_names():
    assert {"load", "Policy", "Solution", "Problem"} <= set(dir(apr_jax))
    assert apr_jax.Problem is Problem
    with pytest.raises(AttributeError, match="no attribute 'solve_all'"):
        apr_jax.solve_all  # noqa: B018


def test_solutions_are_verified_and_expressed():
    demos = Scripted.demos
    solutions = Scripted(CONFIG, TOKENIZER, {}).solve([(demo.problem.target, demo.problem.numbers) for demo in demos])
    assert {solution.solved for solution in solutions} == {True, False}
    for demo, solution in zip(demos, solutions, strict=True):
        assert (solution.problem, solution.solved, solution.answer) == (demo.problem, demo.correct, demo.answer)
        assert solution.num_threads == 1 + sum(call.depth > 0 for call in demo.calls)
        assert solution.total_tokens >= solution.sequential_tokens > 0
        assert solution.record["correct"] == solution.solved
        assert (solution.expression is not None) == solution.solved
        assert (solution.reason == "correct") == solution.solved


def test_it_decodes_what_an_evaluation_decodes(policy):
    problems = [Problem((3, 7, 12), 33), Problem((4, 4, 8), 24), Problem((1, 2, 3), 10)]
    seen = set()
    solutions = policy.solve(problems, temperature=1.0, seed=3, observer=lambda key, *_: seen.add(key.problem))
    _, records = evaluate(
        policy.engine,
        problems,
        method="adaptive",
        settings=make_settings(policy.config, policy.tokenizer),
        seed=3,
        temperature=1.0,
        keep_calls=0,
    )
    times = {"latency_ms"}
    assert [{k: v for k, v in s.record.items() if k not in times} for s in solutions] == [
        {k: v for k, v in record.items() if k not in times} for record in records
    ]
    assert seen == {0, 1, 2}


def test_what_a_method_uses_is_compiled_before_it_is_timed(monkeypatch):
    made = []

    class Engine:
        def __init__(self, *_, expects_groups):
            made.append((expects_groups, self))
            self.is_warm = False

        def warm_up(self):
            self.is_warm = True

    monkeypatch.setattr("apr_jax.library.policy_engine", Engine)
    policy = Policy(CONFIG, TOKENIZER, {})
    methods = ("adaptive", "cons@4:serial", "cons@2:hogwild", "hogwild", "adaptive")
    engines: list[object] = [policy.engine_for(method) for method in methods]
    assert [expects_groups for expects_groups, _ in made] == [False, True]  # the second can do all
    (_, plain), (_, shared) = made
    assert engines == [plain, plain, shared, shared, shared]
    assert engines[-1] is policy.engine
    assert plain.is_warm
    assert shared.is_warm


def test_a_method_is_a_name_or_a_program_of_ones_own(policy):
    def mine(problem, settings):
        return (yield from serial(problem, settings))

    problems = [(33, [3, 7, 12])]
    (by_name,) = policy.solve(problems, method="serial", temperature=1.0)
    (own,) = policy.solve(problems, method=mine, temperature=1.0)
    assert (by_name.record["method"], own.record["method"]) == ("serial", "mine")
    assert [call.tokens.tolist() for call in by_name.rollout.calls] == [
        call.tokens.tolist() for call in own.rollout.calls
    ]
    with pytest.raises(ValueError, match="choose one of"):
        policy.solve(problems, method="parallel")


@pytest.mark.parametrize("problem", [(33, [3]), (0, [3, 4]), (33, [3, "4"])])
def test_what_is_no_problem_is_refused(policy, problem):
    with pytest.raises(ValueError, match="Problem"):
        policy.solve([problem])


def test_a_hugging_face_folder_needs_a_configuration(policy, tmp_path):
    save_hf(tmp_path, policy.config.model, policy.params, load_tokenizer("builtin"))
    with pytest.raises(ConfigError, match="brings no configuration"):
        apr_jax.load(tmp_path)
    loaded = apr_jax.load(tmp_path, fallback=get_config("smoke"), overrides={"seed": 5})
    assert (loaded.config.seed, loaded.config.model.embed_dim) == (5, CONFIG.model.embed_dim)
    assert type(loaded.tokenizer).__name__ == "HuggingFaceTokenizer"


def test_overrides_change_the_policys_own_configuration(run):
    assert apr_jax.load(run, overrides={"engine.lanes": 8}).config.engine.lanes == 8
    assert apr_jax.load(run).config == CONFIG
    with pytest.raises(ConfigError, match="contradicts"):
        apr_jax.load(run, overrides={"model.num_layers": 7})
