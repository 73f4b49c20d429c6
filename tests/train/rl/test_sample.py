"""Groups without signal are replaced, up to a cap, and counted."""

import pytest

from apr_jax.data.tokenizer import load_tokenizer
from apr_jax.engine.threads import Rollout
from apr_jax.engine.work_counters import Work
from apr_jax.reasoning.base import Outcome
from apr_jax.tasks import TASKS
from apr_jax.tasks.base import Verdict
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.countdown.task import Countdown
from apr_jax.train.rl.sample import Sampler, choose_problems, rollout_seed
from tests.train.small import small_config

GROUP = 2
PROBLEMS = [Problem((1, 2), 3 + index) for index in range(40)]


class Engine:
    """Rollouts whose answer is their number in the group."""

    def __init__(self):
        self.asked = []

    def run(self, programs, *, seed, temperature, on_progress=None):
        keys = [key for key, _ in programs]
        self.asked.append(list(dict.fromkeys(key.problem for key in keys)))
        outcomes = [Outcome(answer=str(key.sample % GROUP), status="answered", reason="") for key in keys]
        return [Rollout(key, outcome, (), 0, 0.0, Work()) for key, outcome in zip(keys, outcomes, strict=True)]


def _samples(has_signal, max_resamples, steps=(1,)):
    """A sample of each step. Of a group of two the first alone solves the problem, where there is to be a signal."""

    class Scripted(Countdown):
        def verify(self, answer, problem):
            return Verdict(answer == "0" and has_signal(PROBLEMS.index(problem)), "")

    changes = {"grpo.prompts_per_step": 6, "grpo.group_size": GROUP, "grpo.max_resamples": max_resamples}
    config = small_config(**changes | {"data.num_train": 1000, "grpo.advantage_eps": 1e-12})
    engine = Engine()
    sampler = Sampler(config, engine, PROBLEMS, [], load_tokenizer("builtin"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "countdown", Scripted())
        return sampler.samples(steps), engine.asked


def _sample(has_signal, max_resamples):
    (sample,), asked = _samples(has_signal, max_resamples)
    return sample, asked


def test_without_resampling_all_groups_are_kept():
    sample, asked = _sample(lambda _: False, 0)
    assert asked == [choose_problems(40, 6, 0, 1)]
    assert sample.learnt == sample.drawn
    assert (sample.rounds, sample.dropped) == (1, 0)


def test_groups_without_signal_are_replaced_until_the_step_is_full():
    sample, asked = _sample(lambda problem: problem % 3 == 0, 20)
    problems = [problem for round_ in asked for problem in round_]
    assert len(set(problems)) == len(problems)
    kept = [scored.rollout.key.problem for scored in sample.learnt]
    expected = [problem for problem in problems if problem % 3 == 0]
    assert kept == [problem for problem in expected for _ in range(GROUP)]
    assert len(expected) == 6
    assert len(asked[1]) == 6 - sum(problem % 3 == 0 for problem in asked[0])
    assert sample.rounds == len(asked) > 2
    assert sample.dropped == len(problems) - 6
    assert len(sample.drawn) == GROUP * len(problems)
    assert all(scored.problem is PROBLEMS[scored.rollout.key.problem] for scored in sample.drawn)
    assert [scored.advantage for scored in sample.learnt] == pytest.approx([1.0, -1.0] * 6)
    assert [scored.correct for scored in sample.learnt] == [True, False] * 6
    again, _ = _sample(lambda problem: problem % 3 == 0, 20)
    assert [scored.rollout.key for scored in again.drawn] == [scored.rollout.key for scored in sample.drawn]


@pytest.mark.parametrize("max_resamples", [0, 20])
def test_steps_drawn_together_have_the_problems_of_steps_drawn_alone(max_resamples):
    def has_signal(problem):
        return problem % 3 == 0

    together, asked = _samples(has_signal, max_resamples, (5, 6))
    for sample, step in zip(together, (5, 6), strict=True):
        ((alone,), _) = _samples(has_signal, max_resamples, (step,))
        for drawn, drawn_alone in ((sample.drawn, alone.drawn), (sample.learnt, alone.learnt)):
            assert [each.problem for each in drawn] == [each.problem for each in drawn_alone]
            assert [each.reward for each in drawn[::GROUP]] == [each.reward for each in drawn_alone[::GROUP]]
        assert (sample.rounds, sample.dropped) == (alone.rounds, alone.dropped)
    assert len(asked) == max(sample.rounds for sample in together)  # runs of the engine
    keys = [each.rollout.key for sample in together for each in sample.drawn]
    assert len(set(keys)) == len(keys)  # a problem of both steps has other rollouts in each
    assert {each.rollout.key.sample for each in together[1].drawn} == {GROUP, GROUP + 1}


@pytest.mark.parametrize("cap", [1, 3])
def test_the_cap_is_held(cap):
    sample, asked = _sample(lambda _: False, cap)
    assert len(asked) == sample.rounds == 1 + cap
    assert sample.dropped == 6 * (1 + cap)
    assert sample.learnt == []


def test_problems_of_a_step_are_distinct_and_repeatable():
    first = choose_problems(100, 16, seed=3, step=5)
    assert len(set(first)) == 16
    assert first == choose_problems(100, 16, seed=3, step=5)
    assert first != choose_problems(100, 16, seed=3, step=6)
    assert first != choose_problems(100, 16, seed=4, step=5)
    with pytest.raises(ValueError, match="prompts_per_step=16 exceeds the 8 problems"):
        choose_problems(8, 16, seed=0, step=0)
    seeds = {rollout_seed(seed, step) for seed in range(10) for step in range(10)}
    assert len(seeds) == 100
    assert max(seeds) < 2**31
