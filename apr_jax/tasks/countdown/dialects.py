"""Countdown's dialects: its texts (`trace.py`, `*_traces.py`) as the programs of `reasoning/` ask for them."""

import random
from collections.abc import Hashable, Sequence
from types import MappingProxyType
from typing import Protocol

from apr_jax.tasks.base import Call, CountTokens
from apr_jax.tasks.countdown import (
    direct_traces,
    hogwild_traces,
    judging,
    pasta_traces,
    rules,
    solver,
    thought_traces,
    trace,
)
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.countdown.thought_traces import Numbers
from apr_jax.tasks.dialect import (
    VALUES,
    ChildResult,
    Dialect,
    Ending,
    Malformed,
    PromiseDialect,
    Proposal,
    SpawnCall,
    SpelledSpawnDialect,
    ThoughtDialect,
    ThreadDialect,
    WorkerDialect,
)


class _Demonstrator(Protocol):
    """A solver that writes training sequences (`Dialect.demonstrate`)."""

    def __call__(
        self,
        problem: Problem,
        rng: random.Random,
        task: CountdownConfig,
        count_tokens: CountTokens | None,
        *,
        budget: bool,
    ) -> tuple[Call, ...]: ...


class _Demonstrated(Dialect):
    """A dialect whose demonstrations a solver writes."""

    def __init__(self, solve: _Demonstrator) -> None:
        self._solve = solve

    def demonstrate(
        self,
        problem: Problem,
        rng: random.Random,
        section: CountdownConfig,
        count_tokens: CountTokens | None,
        *,
        budget: bool,
    ) -> tuple[Call, ...]:
        return self._solve(problem, rng, section, count_tokens, budget=budget)


class Serial(_Demonstrated, ThreadDialect):
    """SoS+: a search as a stream of text."""

    def prompt(self, problem: Problem, budget: int | None = None, window: int | None = None) -> str:
        return trace.serial_prompt(problem, budget)

    def read_ending(self, text: str) -> Ending:
        return trace.read_ending(text)

    def token_budget(self, length: int) -> int:
        return solver.token_budget(length)

    def counts_tokens(self, section: CountdownConfig, *, budget: bool) -> bool:
        return budget

    def child_result(self, context: str, completion: str, problem: Problem) -> str:
        return judging.child_result(context + completion, problem)


class Direct(_Demonstrated, ThreadDialect):
    """The winning path alone."""

    def prompt(self, problem: Problem, budget: int | None = None, window: int | None = None) -> str:
        return trace.parent_prompt(problem)

    def read_ending(self, text: str) -> Ending:
        path = trace.read_path(text)
        return Ending(None, "malformed", "unfinished") if path is None else Ending(path, "answered", "")

    def child_result(self, context: str, completion: str, problem: Problem) -> str:
        path, _, reason = self.read_ending(context + completion)
        return reason or ("solved" if rules.verify(path, problem).correct else "wrong_path")


class Adaptive(_Demonstrated, SpelledSpawnDialect):
    """APR: a spawn names nodes, and a child searches from one of them."""

    def prompt(self, problem: Problem, budget: int | None = None, window: int | None = None) -> str:
        return trace.parent_prompt(problem, budget, window)

    def child_prompt(self, context: str, window: int | None) -> str:
        return trace.in_window(context, window)

    def read_ending(self, text: str) -> Ending:
        return trace.read_ending(text)

    def read_spawn(self, text: str, *, last_begin: bool = False) -> SpawnCall | Malformed:
        return trace.parse_spawn(text, last_begin=last_begin)

    def read_child(self, text: str, name: str) -> ChildResult | Malformed:
        return trace.read_child_result(text, name)

    def render_join(self, results: Sequence[ChildResult], level: int | None) -> str:
        return trace.render_join(results, level or 1)

    def spawnable(self, text: str) -> list[str]:
        return trace.spawnable_nodes(text)

    def spawn_line(self, index: int, level: int, name: str) -> str:
        return trace.spawn_line(index, level, name)

    def may_name_more(self, added: str) -> bool:
        return "Generated Node" in added

    def counts_tokens(self, section: CountdownConfig, *, budget: bool) -> bool:
        return bool(section.context_windows)

    def child_result(self, context: str, completion: str, problem: Problem) -> str:
        return judging.child_result(context + completion, problem)


class Pasta(Adaptive, PromiseDialect):
    """PASTA: the parent searches the first node itself, beside its children."""

    wait = pasta_traces.SYNC

    def result_line(self, index: int, result: ChildResult, level: int | None) -> str:
        return trace.result_line(index, result, level or 1)


class Hogwild(Serial, WorkerDialect):
    """Two workers that share out the operations."""

    num_workers = hogwild_traces.NUM_WORKERS

    def prompt(self, problem: Problem, budget: int | None = None, window: int | None = None) -> str:
        return hogwild_traces.prompt(problem)

    def header(self, worker: int) -> str:
        return hogwild_traces.header(worker)

    def read_ending(self, text: str) -> Ending:
        return Ending(None, "no_solution", "left") if hogwild_traces.has_left(text) else trace.read_ending(text)

    def counts_tokens(self, section: CountdownConfig, *, budget: bool) -> bool:
        return True


class Thoughts(_Demonstrated, ThoughtDialect):
    """Tree of Thoughts: operations on the numbers that are left are proposed, and what is then left is judged."""

    def root(self, problem: Problem) -> Numbers:
        return problem.numbers

    def steps_left(self, state: Numbers) -> int:
        return len(state) - 1

    def key(self, state: Numbers) -> Hashable:
        return tuple(sorted(state))

    def proposer_prompt(self, problem: Problem, state: Numbers) -> str:
        return thought_traces.proposer_prompt(problem.target, state)

    def evaluator_prompt(self, problem: Problem, state: Numbers) -> str:
        return thought_traces.evaluator_prompt(problem.target, state)

    def read_proposals(self, text: str, state: Numbers) -> tuple[list[Proposal], list[str]]:
        return thought_traces.read_proposals(text, state)

    def read_value(self, text: str) -> float | None:
        verdict = thought_traces.read_verdict(text)
        return None if verdict is None else VALUES[verdict]

    def render_answer(self, problem: Problem, lines: Sequence[str], state: Numbers) -> str | None:
        return thought_traces.render_answer(lines, problem.target) if state == (problem.target,) else None

    def demonstrated_answer(self, problem: Problem, calls: Sequence[Call]) -> str | None:
        return thought_traces.demonstrated_answer(problem, calls)

    def child_result(self, context: str, completion: str, problem: Problem) -> str:
        return thought_traces.read_verdict(completion) or "proposed"


DIALECTS = MappingProxyType(
    {
        "adaptive": Adaptive(solver.adaptive_calls),
        "direct": Direct(direct_traces.direct_calls),
        "hogwild": Hogwild(hogwild_traces.hogwild_calls),
        "pasta": Pasta(pasta_traces.pasta_calls),
        "serial": Serial(solver.serial_calls),
        "tree_of_thoughts": Thoughts(thought_traces.tree_calls),
    }
)
