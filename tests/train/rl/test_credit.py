"""Who has the rollout's advantage, on scripted rollouts."""

import numpy as np
import pytest

from apr_jax.engine.threads import StopReason
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.adaptive import render_spawn
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.countdown.task import COUNTDOWN
from apr_jax.train.rl import credit
from apr_jax.train.rl.sample import score
from tests.reasoning.test_adaptive import GOOD, LAST, PROBLEM, SPAWN, STATE_6_4, TOKENIZER, run
from tests.train.rl.test_sequences import sequences_of
from tests.train.small import small_config

WRONG = "Exploring Operation: 4*6=25, Resulting Numbers: [25]\n24,24 equal: Goal Reached\n"  # claims a goal, falsely
FAILS = {**GOOD, (): [SPAWN, "No solution found.\n"]}
MISCOPIED = {**GOOD, (): [SPAWN, GOOD[()][1].replace("4*6=24", "6*4=24")]}
MISLED = {
    **GOOD,
    (): [SPAWN, GOOD[()][1].replace(LAST, WRONG)],
    (0, 1): [WRONG + STATE_6_4 + WRONG],
}


def _used(texts, **changes):
    rollout = run(texts, **changes)
    shares = credit.used_threads(rollout, TOKENIZER, COUNTDOWN)
    assert len(shares) == len(rollout.calls)
    by_path = {}
    for call, share in zip(rollout.calls, shares, strict=True):
        assert by_path.setdefault(call.path, share) == share
    return by_path


@pytest.mark.parametrize(
    ("texts", "loser", "winner"),
    [
        (GOOD, 0, 1),  # the child whose path the answer replays
        (FAILS, 0, 0),  # nobody took the right path up
        (MISCOPIED, 0, 0),  # right again, in other words than the child's
        (MISLED, 0, 1),  # the wrong answer is the child's: it is blamed
    ],
    ids=["solved", "ignored", "miscopied", "misled"],
)
def test_a_thread_is_used_if_the_answer_contains_its_path(texts, loser, winner):
    assert _used(texts) == {(): 1, (0, 0): loser, (0, 1): winner}


def test_a_chain_of_threads_is_used_as_far_as_its_paths_are():
    problem = Problem((1, 2, 3, 4), 10)
    first = "Exploring Operation: 1+2=3, Resulting Numbers: [3, 4, 3]\n"
    first += "Generated Node #0,0: 10:[3, 4, 3] Operation: 1+2=3\n"
    second = "Exploring Operation: 3+4=7, Resulting Numbers: [3, 7]\n"
    second += "Generated Node #0,0,0: 10:[3, 7] Operation: 3+4=7\n"
    last = "Exploring Operation: 3+7=10, Resulting Numbers: [10]\n10,10 equal: Goal Reached\n"
    lowest = "Moving to Node #0,0,0\nCurrent State: 10:[3, 7], Operations: ['1+2=3', '3+4=7']\n" + last
    middle = "Moving to Node #0,0\nCurrent State: 10:[3, 4, 3], Operations: ['1+2=3']\n" + second + lowest
    whole = "Moving to Node #0\nCurrent State: 10:[1, 2, 3, 4], Operations: []\n" + first + middle
    texts = {
        (): [first + render_spawn(["0,0"]), trace.goal_line(10) + whole],
        (0, 0): [second + render_spawn(["0,0,0"], level=2), trace.goal_line(10) + middle],
        (0, 0, 0, 0): [last + lowest],
    }
    assert _used(texts, problem=problem, max_depth=2) == {(): 1, (0, 0): 1, (0, 0, 0, 0): 1}
    other = texts | {path: [texts[path][0], texts[path][1].replace("3+7=10", "7+3=10")] for path in ((), (0, 0))}
    assert _used(other, problem=problem, max_depth=2) == {(): 1, (0, 0): 1, (0, 0, 0, 0): 0}


def test_a_thread_that_was_cut_off_is_not_used():
    rollout = run(GOOD, engine={"max_steps": 30})
    assert any(call.stop.reason is StopReason.MAX_STEPS for call in rollout.calls)
    assert credit.used_threads(rollout, TOKENIZER, COUNTDOWN).sum() == sum(call.path == () for call in rollout.calls)


def _both(credit_name):
    config = small_config(**{"grpo.group_size": 2, "grpo.credit": credit_name}).grpo
    return score(config, [run(GOOD), run(FAILS)], [PROBLEM] * 2, TOKENIZER, COUNTDOWN)


def test_the_papers_credit_is_every_calls():
    scored = _both("rollout")
    sequences = sequences_of(scored, 0.0)
    assert [np.sign(s["advantage"][-1]) for s in sequences] == [1] * 4 + [-1] * 4


def test_unused_children_learn_nothing_and_still_count_in_the_weights():
    scored, plain = _both("used"), _both("rollout")
    sequences = sequences_of(scored, 0.0)
    # Solved: the root's two calls and the child that won; failed: the root's two calls.
    assert [np.sign(s["advantage"][-1]) for s in sequences] == [1, 1, 1, -1, -1]
    everyone = sequences_of(plain, 0.0)
    kept = [everyone[i] for i in (0, 1, 3, 4, 5)]
    for ours, theirs in zip(sequences, kept, strict=True):
        for name, values in theirs.items():
            np.testing.assert_array_equal(ours[name], values, err_msg=name)
    assert len(sequences_of(scored, 0.1)) == 8  # all have a KL term
