"""Tasks in words: nested sums and Countdown in the text dialect, which needs no vocabulary of their own.

context      Compute [3+4]*5 modulo 10.
completion   <spawn> .. <thread 1> Compute 3+4 modulo 10. </thread> .. </spawn>   (each tag on its own line)
join         <join> .. <thread 1> 7 </thread> .. </join>
completion   7*5=5
             <result> 5 </result>
"""

import random
import re
from collections.abc import Hashable, Iterator
from types import MappingProxyType
from typing import Any

from apr_jax.tasks.base import Task, Verdict
from apr_jax.tasks.countdown import rules, trace
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.countdown.task import Countdown
from apr_jax.tasks.nested_sums import NestedSums, Sum, operation
from apr_jax.tasks.text_dialect import TextDialect, TextForm, Work

_OPERATION = re.compile(trace.OPERATION)
_MOST_PARTS = 3  # states that a thread of Countdown hands to others at once


class SumsInWords(TextForm):
    """Nested sums, whose brackets are parts."""

    def question(self, problem: Sum) -> str:
        return f"Compute {problem} modulo 10.\n"

    def work(self, problem: Sum, rng: random.Random, section: Any) -> Work:
        parts = tuple(self.work(bracket, rng, section) for bracket in problem.brackets)
        return Work(self.question(problem), "", parts, operation(problem), f"{problem.value}\n")


class CountdownInWords(TextForm):
    """Countdown: a thread tries operations and hands the states that they leave to others, who do likewise."""

    def question(self, problem: Problem) -> str:
        numbers = ", ".join(map(str, problem.numbers))
        return f"Make {problem.target} of {numbers}: use each number once, with + - * and /.\n"

    def work(self, problem: Problem, rng: random.Random, section: CountdownConfig) -> Work:
        return self._search(problem, rng, section.spawn_depth)

    def _search(self, problem: Problem, rng: random.Random, depth: int) -> Work:
        """Search with `depth` levels of threads below. Below two numbers there is nothing to hand out."""
        question, target = self.question(problem), problem.target
        if not depth or len(problem.numbers) == 2:
            tried = list(self._trials(problem, rng))
            path = next((path for text, path in tried if path), "")
            return Work(question, before="".join(text for text, _ in tried), result=path)
        steps = [(text, left) for _, text, left in rules.steps(problem.numbers)]
        rng.shuffle(steps)
        good = [step for step in steps if rules.is_solvable(step[1], target)][:1]
        chosen = good + [step for step in steps if step not in good][: _MOST_PARTS - len(good)]
        rng.shuffle(chosen)
        parts = tuple(self._search(Problem(tuple(left), target), rng, depth - 1) for _, left in chosen)
        before = "".join(f"{text} leaves {', '.join(map(str, left))}.\n" for text, left in chosen)
        paths = (f"{text}\n{part.result}" for (text, _), part in zip(chosen, parts, strict=True) if part.result)
        return Work(question, before, parts, "", next(paths, ""))

    def _trials(self, problem: Problem, rng: random.Random) -> Iterator[tuple[str, str]]:
        """Yield lines of what a thread tries by itself, each with the path if it is one, up to the first path."""
        steps = list(rules.steps(problem.numbers))
        rng.shuffle(steps)
        for _, text, left in steps:
            if left == [problem.target]:
                yield f"{text} is {problem.target}.\n", f"{text}\n"
                return
            if len(left) > 1 and rules.is_solvable(left, problem.target):
                yield f"{text} leaves {', '.join(map(str, left))}.\n", ""
                for line, path in self._trials(Problem(tuple(left), problem.target), rng):
                    yield line, f"{text}\n{path}" if path else ""
                return
            yield f"{text} does not help.\n", ""


class NestedSumsText(NestedSums):
    """Nested sums in words."""

    name = "nested_sums_text"
    dialects = MappingProxyType({"adaptive": TextDialect(SumsInWords())})


class NestedSumsFork(NestedSums):
    """Nested sums in words, whose children see all that their parents wrote, and tell them all that they write."""

    name = "nested_sums_fork"
    dialects = MappingProxyType({"adaptive": TextDialect(SumsInWords(), children="fork", joins="texts")})


class CountdownText(Countdown):
    """Countdown in words. An answer is its operations, one a line."""

    name = "countdown_text"
    dialects = MappingProxyType({"adaptive": TextDialect(CountdownInWords())})

    def verify(self, answer: str | None, problem: Problem) -> Verdict:
        return super().verify(_path(answer, problem), problem)

    def vote(self, answer: str | None) -> Hashable | None:
        return super().vote(_path(answer))

    def express(self, answer: str, problem: Problem) -> str:
        return super().express(_path(answer, problem) or "", problem)

    def path_solves(self, path: str, problem: Problem) -> bool:
        return Task.path_solves(self, path, problem)

    def handed_back(self, text: str) -> str | None:
        return Task.handed_back(self, text)


def _path(answer: str | None, problem: Problem | None = None) -> str | None:
    """Return an answer in words as Countdown's verifier takes it."""
    if answer is None:
        return None
    operations = [line if _OPERATION.fullmatch(line) else "?" for line in answer.split("\n")]
    lines = [f"Exploring Operation: {each}, Resulting Numbers: []\n" for each in operations]
    return "".join([*lines, f"{problem.target},{problem.target} equal: Goal Reached\n" if problem else ""])


NESTED_SUMS_TEXT, NESTED_SUMS_FORK, COUNTDOWN_TEXT = NestedSumsText(), NestedSumsFork(), CountdownText()
