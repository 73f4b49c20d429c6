"""Samples of a way of reasoning: who is chosen, what is shared, and which names are refused."""

import pytest

from apr_jax.engine.threads import RolloutKey
from apr_jax.reasoning.base import Sample
from apr_jax.reasoning.programs import check_method, make_program
from apr_jax.reasoning.sampling import majority, most_likely, read_wrapper, verified
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.adaptive import render_spawn
from apr_jax.tasks.countdown.task import COUNTDOWN
from tests.reasoning.fixtures import TextScript, settings
from tests.reasoning.forced_engine import ForcedEngine
from tests.reasoning.test_accounting import LAST, LOSES, PROBLEM, REPLAY, STATE_6_4, WINS

SOLVES = LAST + REPLAY  # a serial search: it reaches the goal, then replays
WRONG = LAST + REPLAY.replace("2*3=6", "2+3=6")
SWAPPED = LAST + REPLAY.replace("Operation: 4*6=24", "Operation: 6*4=24")


def run(method, texts, logprob=lambda path: 0.0, problem=PROBLEM, **changes):
    engine = ForcedEngine(TextScript(texts), lanes=8, max_seq_len=512, pages=400, logprob=logprob)
    return engine.run([(RolloutKey(0, 0), make_program(method, problem, settings(**changes)))])[0]


def of(*texts):
    """A script of samples that write these, each in its only call."""
    return {(0, index): [text] for index, text in enumerate(texts)}


def sample(answer=None, mean_logprob=0.0):
    return Sample(answer=answer, status="answered" if answer else "no_solution", reason="", mean_logprob=mean_logprob)


def path(*operations):
    lines = [f"Exploring Operation: {operation}, Resulting Numbers: [1]" for operation in operations]
    return "\n".join([*lines, "24,24 equal: Goal Reached"])


@pytest.mark.parametrize(
    ("answers", "chosen"),
    [
        ([path("2*3=6", "4*6=24"), path("2+3=6", "4*6=24"), path("2+3=6", "4*6=24")], 1),
        ([path("2*3=6", "4*6=24"), path("2+3=5", "4*5=24"), path("3*2=6", "6*4=24")], 0),  # operands that commute
        ([path("1+2=3"), path("4+5=9", "1+2=3", "9-3=6"), path("1+2=3", "4+5=9", "9-3=6")], 1),  # order of steps
        ([None, None, None, path("2*3=6", "4*6=24")], 3),  # no answer is no vote
        ([path("oranges"), path("oranges"), path("2*3=6", "4*6=24")], 2),  # nor is one without operations
        ([path("6-2=4"), path("2-6=4"), path("2-6=4")], 1),  # minus does not commute
        ([path("1+2=3"), path("1+3=4")], 0),  # the first of equals
        ([path("oranges"), None], 0),
    ],
)
def test_most_votes_win(answers, chosen):
    assert majority([sample(answer) for answer in answers], PROBLEM, COUNTDOWN) == chosen


def test_the_most_likely_answer_wins_and_what_has_none_does_not():
    answer = path("2*3=6")
    samples = [
        sample(answer, -0.5),
        sample(answer, -0.2),
        sample(answer, -0.2),
        sample(None, 0.0),
        sample(answer, None),
    ]
    assert most_likely(samples, PROBLEM, COUNTDOWN) == 1
    assert most_likely([sample(None, -1.0), sample(None, 0.0)], PROBLEM, COUNTDOWN) == 0


def test_the_verifier_takes_what_is_right_else_what_answers():
    right = path("2*3=6", "4*6=24")
    assert verified([sample(None), sample(path("1+1=2")), sample(right), sample(right)], PROBLEM, COUNTDOWN) == 2
    assert verified([sample(None), sample(path("1+1=2")), sample(path("1+1=2"))], PROBLEM, COUNTDOWN) == 1
    assert verified([sample(None), sample(None)], PROBLEM, COUNTDOWN) == 0


@pytest.mark.parametrize(
    ("method", "chosen"), [("cons@3:serial", WRONG), ("best@3:serial", SOLVES), ("pass@3:serial", SOLVES)]
)
def test_each_wrapper_answers_as_the_sample_that_it_chooses(method, chosen):
    """Two of three give a wrong answer; the right one, second, is the likeliest."""
    likely = {(0, 0): -0.5, (0, 1): -0.1, (0, 2): -0.5}
    rollout = run(method, of(WRONG, SOLVES, WRONG), likely.get)
    samples = rollout.result.samples
    assert rollout.result.answer == trace.read_answer(chosen)
    assert [s.answer for s in samples] == [trace.read_answer(text) for text in (WRONG, SOLVES, WRONG)]
    assert [s.mean_logprob for s in samples] == pytest.approx([-0.5, -0.1, -0.5])


def test_tries_follow_each_other_up_to_the_first_answer():
    """The first finds nothing, the second replays nothing, the third answers, wrongly; no fourth is asked."""
    texts = [LOSES + trace.NO_SOLUTION, LAST, WRONG, SOLVES]
    rollout = run("retry@4:serial", {(number, 0): [text] for number, text in enumerate(texts)})
    assert rollout.result.answer == trace.read_answer(WRONG)
    assert [call.path for call in rollout.calls] == [(0, 0), (1, 0), (2, 0)]
    assert rollout.sequential_tokens == rollout.generated_tokens == sum(len(call.tokens) for call in rollout.calls)
    assert rollout.work.prefilled == 9, "one prompt for all"
    assert rollout.result.samples == ()


def test_tries_in_vain_end_as_the_last_one():
    rollout = run("retry@2:serial", {(0, 0): [LOSES + trace.NO_SOLUTION], (1, 0): [LAST]})
    assert (rollout.result.answer, rollout.result.status, rollout.result.reason) == (None, "malformed", "no_replay")
    once = run("retry@3:serial", {(0, 0): [SOLVES]})
    alone = run("serial", {(): [SOLVES]})
    assert once.result == alone.result
    assert once.generated_tokens == alone.generated_tokens


def test_tries_of_adaptive_have_the_counts_of_all():
    explored = (
        "Exploring Operation: 2*3=6, Resulting Numbers: [4, 6]\nGenerated Node #0,1: 24:[4, 6] Operation: 2*3=6\n"
    )
    spawn = explored + render_spawn(["0,1"])
    texts = {(0, 0): [spawn, trace.NO_SOLUTION], (0, 0, 0, 0): [LOSES + trace.NO_SOLUTION]}
    texts |= {(1, 0): [spawn, REPLAY], (1, 0, 0, 0): [WINS]}
    outcome = run("retry@2:adaptive", texts).result
    assert (outcome.status, outcome.num_spawns, outcome.num_children) == ("answered", 2, 2)
    assert outcome.child_paths == ((STATE_6_4 + LAST).strip(),)


def test_without_any_answer_the_outcome_is_the_first_samples():
    rollout = run("cons@2:serial", of(LOSES + trace.NO_SOLUTION, LAST))
    assert (rollout.result.answer, rollout.result.status) == (None, "no_solution")
    assert [s.reason for s in rollout.result.samples] == ["no_solution", "no_replay"]


def test_samples_of_adaptive_spawn_and_the_counts_are_of_all():
    explored = (
        "Exploring Operation: 2*3=6, Resulting Numbers: [4, 6]\nGenerated Node #0,1: 24:[4, 6] Operation: 2*3=6\n"
    )
    spawn = explored + render_spawn(["0,1"])
    texts = {(0, 0): [spawn, REPLAY], (0, 1): [trace.NO_SOLUTION], (0, 0, 0, 0): [WINS]}
    rollout = run("cons@2:adaptive", texts)
    outcome = rollout.result
    assert (outcome.status, outcome.num_spawns, outcome.num_children) == ("answered", 1, 1)
    assert outcome.child_paths == ((STATE_6_4 + LAST).strip(),)
    assert {call.path for call in rollout.calls} == {(0, 0), (0, 1), (0, 0, 0, 0)}
    capped = run("cons@2:adaptive", texts, max_total_children=1).result
    assert capped.samples[0].reason == "rollout_children", "the limit is that of all samples together"
    assert run("cons@2:adaptive", texts, max_total_children=2).result == outcome


def test_samples_may_be_of_samples():
    rollout = run(
        "pass@2:cons@2:serial", {(0, i, 0, j): [text] for i in range(2) for j, text in enumerate([WRONG, SOLVES])}
    )
    assert [s.answer for s in rollout.result.samples] == [trace.read_answer(WRONG)] * 2
    assert rollout.work.prefilled == 9, "one prompt for all"


@pytest.mark.parametrize(
    "method",
    [
        "cons@0:serial",
        "cons@x:serial",
        "cons@8",
        "cons:serial",
        "mean@4:serial",
        "@4:serial",
        "cons@4:",
        "cons@-1:serial",
    ],
)
def test_malformed_names_are_told_the_form(method):
    with pytest.raises(ValueError, match=r"NAME@N:METHOD, where NAME is one of best, cons, pass, retry,"):
        make_program(method, PROBLEM, settings())


def test_unknown_inner_methods_are_named():
    with pytest.raises(ValueError, match="method 'sideways': choose one of adaptive"):
        make_program("cons@4:sideways", PROBLEM, settings())
    with pytest.raises(ValueError, match="NAME@N:METHOD"):
        make_program("cons@4:best@0:serial", PROBLEM, settings())


def test_what_has_no_likelihood_is_not_ranked_by_it():
    for inner in ("hogwild", "tree_of_thoughts", "cons@2:serial"):
        with pytest.raises(ValueError, match="writes what could be likely"):
            make_program(f"best@4:{inner}", PROBLEM, settings())
        make_program(f"cons@4:{inner}", PROBLEM, settings())


def test_equal_samples_are_refused():
    for method in ("cons@2:serial", "cons@1:pass@2:serial", "retry@2:serial"):
        with pytest.raises(ValueError, match="temperature 0 its 2 samples are all the same"):
            check_method(method, COUNTDOWN, 0.0)
        check_method(method, COUNTDOWN, 0.1)
    for method in ("serial", "cons@1:serial"):
        check_method(method, COUNTDOWN, 0.0)


def test_a_budget_is_refused_where_no_prompt_names_one():
    for method in ("direct", "hogwild", "tree_of_thoughts", "cons@2:direct", "pass@2:cons@2:hogwild"):
        with pytest.raises(ValueError, match=f"method '{method}'.*leave out the budget of 4"):
            check_method(method, COUNTDOWN, budget=4)
        with pytest.raises(ValueError, match="no budget"):
            make_program(method, PROBLEM, settings(budget=4))
        check_method(method, COUNTDOWN)
    for method in ("serial", "adaptive", "cons@2:pasta"):
        check_method(method, COUNTDOWN, budget=4)


def test_reading_a_wrapper():
    assert read_wrapper("serial") is None
    wrapper = read_wrapper("pass@12:cons@3:adaptive")
    assert (wrapper.num_samples, wrapper.inner) == (12, "cons@3:adaptive")
