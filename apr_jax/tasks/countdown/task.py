"""Countdown: make a target out of given numbers (Pan et al., arXiv 2504.15466, section 4.1)."""

import functools
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from apr_jax.config import Config, ConfigError
from apr_jax.tasks.base import Split, Task, Verdict
from apr_jax.tasks.countdown import facts, judging, rules, trace
from apr_jax.tasks.countdown.adaptive import ADAPTIVE
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.direct import DIRECT
from apr_jax.tasks.countdown.hogwild import HOGWILD
from apr_jax.tasks.countdown.pasta import PASTA
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.countdown.serial import SERIAL
from apr_jax.tasks.countdown.thoughts import THOUGHTS
from apr_jax.tasks.dialect import Dialect, Malformed

_MOST_NUMBERS = 6  # for which it is quickly known whether there is a solution


class Countdown(Task):
    """Countdown's problems, verifier and texts; `tasks/countdown/` has the parts."""

    name = "countdown"
    section: type[CountdownConfig] = CountdownConfig
    problem_fields = ("num_numbers", "min_number", "max_number", "min_target", "max_target", "num_unseen_targets")
    dialects: Mapping[str, Dialect] = MappingProxyType(
        {
            "adaptive": ADAPTIVE,
            "direct": DIRECT,
            "hogwild": HOGWILD,
            "pasta": PASTA,
            "serial": SERIAL,
            "tree_of_thoughts": THOUGHTS,
        }
    )
    example = "27 22 26 31 53"

    claims_answer = staticmethod(rules.claims_goal)
    departures = staticmethod(rules.departures)
    draw_fact = staticmethod(facts.draw_fact)
    path_solves = staticmethod(judging.path_solves)

    def sampler(self, config: Config, split: Split | None) -> Callable[[random.Random], Problem]:
        task = config.task
        assert isinstance(task, CountdownConfig)
        targets = None if split is None else _targets(task, config.seed, unseen=split == "test_unseen_targets")
        return functools.partial(rules.sample_problem, task=task, targets=targets)

    def verify(self, answer: str | None, problem: Problem) -> Verdict:
        return rules.verify(answer, problem)

    def describe(self, problem: Problem) -> dict[str, Any]:
        return {"numbers": list(problem.numbers), "target": problem.target}

    def read_problem(self, value: Any) -> Problem:
        if isinstance(value, Problem):
            return value
        if isinstance(value, tuple):
            target, numbers = value
            return Problem(tuple(numbers) if isinstance(numbers, list | tuple) else numbers, target)
        if isinstance(value, str):
            return trace.read_problem(value)
        numbers = value.get("numbers", value.get("nums")) if isinstance(value, dict) else None
        if numbers is None or "target" not in value:
            raise ValueError("no object with numbers and target, and no prompt")
        if not isinstance(numbers, list):
            raise ValueError(f"numbers={numbers!r} is not a list")
        return Problem(tuple(numbers), value["target"])

    def count_operations(self, text: str, context: str = "") -> tuple[int, int]:
        return judging.count_operations(text)

    def read_words(self, words: Sequence[str]) -> Problem:
        for word in words:
            if not (word.isascii() and word.isdecimal() and len(word) < 100):
                raise ValueError(f"{word[:100]!r} is no whole number")
        if len(words) < 3:
            raise ValueError(f"a problem is a target and at least two numbers, and here are {len(words)}")
        target, *numbers = map(int, words)
        return Problem(tuple(numbers), target)

    def key(self, problem: Problem) -> Hashable:
        return problem.key

    def vote(self, answer: str | None) -> Hashable | None:
        return rules.canonical_path(answer)

    def express(self, answer: str, problem: Problem) -> str:
        return rules.express(answer, problem)

    def equation(self, expression: str, problem: Problem) -> str:
        return f"{expression} = {problem.target}"

    def is_solvable(self, problem: Problem) -> bool | None:
        return rules.is_solvable(problem.numbers, problem.target) if len(problem.numbers) <= _MOST_NUMBERS else None

    def handed_back(self, text: str) -> str | None:
        result = trace.read_child(text, trace.thread_node(text) or "")
        return None if isinstance(result, Malformed) else result.path


def _targets(task: CountdownConfig, seed: int, *, unseen: bool) -> tuple[int, ...]:
    """Return the targets of the split test_unseen_targets, or those of all others."""
    targets = range(task.min_target, task.max_target + 1)
    if task.num_unseen_targets >= len(targets):
        raise ConfigError(
            f"task.num_unseen_targets={task.num_unseen_targets} leaves none of the {len(targets)} targets "
            f"{task.min_target}..{task.max_target} to train on"
        )
    set_aside = sorted(random.Random(f"{seed}/unseen_targets").sample(targets, task.num_unseen_targets))
    return tuple(target for target in targets if (target in set_aside) == unseen)


COUNTDOWN = Countdown()
