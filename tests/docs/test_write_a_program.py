"""docs/write_a_program.md runs from top to bottom, and the program that it writes does what it says."""

import pytest

from apr_jax.checkpoints.manager import Checkpoints
from apr_jax.engine.threads import RolloutKey
from apr_jax.model.params import init_params
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.rules import Problem, verify
from tests.docs.pages import run_page
from tests.reasoning.fixtures import SMALL, TOKENIZER, Replay, TextScript, demonstrations, settings
from tests.reasoning.scripted_engine import ScriptedEngine
from tests.train.small import small_config


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page's names after it ran beside a run with random weights."""
    home = tmp_path_factory.mktemp("home")
    config = small_config(**{"data.directory": str(home / "data")})
    params = init_params(config.model, 0)
    with Checkpoints(home / "runs" / "laptop", "sft", config) as checkpoints:
        checkpoints.save(1, {"policy": params}, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        return run_page("write_a_program.md")


def test_the_page_runs_as_it_stands(page):
    assert page["solution"].record["method"] == "insist"
    assert len(page["problems"]) == 4
    assert sum(len(tokens) for tokens in page["written"][0]) > 0


def test_where_the_parent_does_not_give_up_it_is_adaptive(page):
    demos = [demo for demo in demonstrations(SMALL, "adaptive", 30) if demo.correct]
    assert demos
    for demo in demos:
        (rollout,) = ScriptedEngine(Replay([demo])).run([(RolloutKey(0, 0), page["insist"](demo.problem, settings()))])
        assert rollout.result.answer == demo.answer
        assert rollout.result.num_children == sum(call.depth > 0 for call in demo.calls)


def test_a_parent_that_gives_up_is_told_to_go_on_from_its_root(page):
    demos = demonstrations(SMALL, "adaptive", 200)
    demo = next(d for d in demos if d.correct and sum(call.ends_in_spawn for call in d.calls) == 2)
    first, second, last = (call for call in demo.calls if call.depth == 0)
    header = trace.parent_prompt(demo.problem)
    assert second.completion.startswith(header)
    children = [call for call in demo.calls if call.depth]
    spawned = [call.completion.count("<Start") for call in (first, second)]
    paths = [(spawn, child) for spawn, count in enumerate(spawned) for child in range(count)]
    script: dict[tuple[int, ...], list[str]] = {
        path: [call.completion] for path, call in zip(paths, children, strict=True)
    }
    # As demonstrated, but for giving up after the first join: the program writes the header in place of that.
    script[()] = [first.completion, trace.NO_SOLUTION, second.completion.removeprefix(header), last.completion]
    (rollout,) = ScriptedEngine(TextScript(script)).run([(RolloutKey(0, 0), page["insist"](demo.problem, settings()))])
    assert verify(rollout.result.answer, demo.problem).correct
    third = rollout.calls[2].context.tolist()
    assert TOKENIZER.decode(third) == second.context + header


def test_its_patience_ends(page):
    script = TextScript({(): [trace.NO_SOLUTION] * (page["PATIENCE"] + 1)})
    problem = Problem((2, 3), 5)
    (rollout,) = ScriptedEngine(script).run([(RolloutKey(0, 0), page["insist"](problem, settings()))])
    assert (rollout.result.status, len(rollout.calls)) == ("no_solution", page["PATIENCE"] + 1)
