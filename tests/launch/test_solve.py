"""launch/solve.py as a user runs it."""

import functools
import json

import pytest

from tests.launch.test_evaluate import ROOT, launched, make_home

pytestmark = pytest.mark.heavy

solve = functools.partial(launched, "solve.py")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


def test_for_programs_it_writes_one_json_object_and_threads_stay_on_standard_error(home):
    done = solve(home, "27", "3", "9", "18", "--json=-", "--temperature=1", "--seed=2")
    result = json.loads(done.stdout)
    assert (result["target"], result["numbers"], result["checkpoint"]) == (27, [3, 9, 18], "runs/tiny")
    assert (result["temperature"], result["seed"], result["method"]) == (1.0, 2, "adaptive")
    assert (result["solved"], result["solvable"], result["expression"]) == (False, True, None)
    assert 0 < result["sequential_tokens"] <= result["total_tokens"] <= 16  # the run's rollout.max_steps
    assert 0 < result["first_token_ms"] <= result["latency_ms"]
    assert "not trained" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "parent" in line]
    assert "starts" in lines[0]
    assert "ended" in lines[-1]
    assert f"{result['total_tokens']} tokens" in lines[-1]


def test_samples_of_what_the_policy_was_trained_for_are_no_departure(home):
    done = solve(home, "27", "3", "9", "18", "--method=cons@2:adaptive", "--temperature=1", "--json=-")
    assert json.loads(done.stdout)["method"] == "cons@2:adaptive"
    assert "not trained" not in done.stderr


def test_for_people_it_says_what_came_of_it_and_what_the_policy_was_not_trained_for(home):
    given = f"--config={ROOT / 'configs' / 'grpo.py'}:smoke"
    small = ["--config.rollout.max_steps=16", "--config.engine.lanes=4", "--config.engine.prefill_lanes=4"]
    arguments = ("--checkpoint=hugging_face", given, *small, "--method=serial", "--json=result.json")
    done = solve(home, "90", "1", "2", *arguments)
    assert done.stdout.startswith("not solved: max steps; and there is none\n")
    unlike = "2 numbers instead of 3, a target outside 10..40, --method=serial instead of adaptive"
    assert f"The policy was not trained for this: {unlike}." in done.stderr
    assert json.loads((home / "result.json").read_text())["method"] == "serial"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a target and at least two numbers"),
        (["27"], "a target and at least two numbers"),
        (["27", "3", "nine"], "'nine' is no whole number"),
        (["27", "3", "9.5"], "'9.5' is no whole number"),
        (["0", "3", "9"], "must be a positive int"),
        (["27", "3", "9", "--method=adaptiv"], "choose one of"),
        (["27", "3", "9", "--method=cons@4:adaptive"], "samples are all the same"),
        (["27", "3", "9", "--method=direct", "--budget=4"], "leave out the budget of 4"),
        (["27", "3", "9", "--checkpoint=missing"], "no such folder"),
        (["27", "3", "9", "--temperature=-1"], "temperature"),
    ],
)
def test_a_wrong_problem_gets_a_sentence(home, arguments, message):
    done = solve(home, *arguments, check=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_without_a_run_the_policy_of_the_package_solves_the_problem(tmp_path):
    done = solve(tmp_path, "27", "22", "26", "31", "53")
    assert "which comes with apr_jax" in done.stderr
    assert "child 1.1" in done.stderr
    assert done.stdout.splitlines()[0].endswith(" = 27")
