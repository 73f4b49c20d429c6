"""Texts of Countdown as the authors' checkpoints write them: marks are spelt out, and EOS ends each call.

Prompts lack the newline at their end, which the model writes. Traces are those of `tasks/countdown/`. A spawn is a call
like others: it ends with EOS, after SPAWN_END. A thread never writes the beginning of a join: that of a spawn takes its
place. A thread that is cut off is read as if it had ended by itself.
"""

import dataclasses
import random
from collections.abc import Sequence
from types import MappingProxyType

from apr_jax.tasks.base import Call, CountTokens
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.adaptive import ADAPTIVE
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.countdown.search import SearchDialect
from apr_jax.tasks.countdown.serial import SERIAL
from apr_jax.tasks.dialect import CALL_BEGIN, JOIN_BEGIN, ChildResult, Ending, Malformed, SpawnCall, SpawnDialect
from apr_jax.tasks.reference import reading
from apr_jax.tasks.reference.files import ReferenceConfig, traces

_TOKEN_BUDGET = "Token Budget: "


class ReferenceAdaptive(SearchDialect, SpawnDialect):
    """Dialect of APR, whose spawns and endings are read as the released code does (`reading.py`)."""

    reads_cut_off = True
    replaced = MappingProxyType({JOIN_BEGIN.rstrip("\n"): CALL_BEGIN.rstrip("\n")})

    def prompt(self, problem: Problem, budget: int | None = None, window: int | None = None) -> str:
        """Return a root's prompt: `budget` is how many children it may open, `window` the tokens of any thread."""
        return ADAPTIVE.prompt(problem, budget, window).rstrip("\n")

    def child_prompt(self, context: str, window: int | None) -> str:
        return context if window is None else f"{_TOKEN_BUDGET}{window} {context}"

    def asks_for_children(self, text: str, depth: int) -> bool:
        return depth == 0 and reading.ends_in_spawn(text)

    def is_spawn(self, call: Call) -> bool:
        return self.asks_for_children(call.completion, call.depth)

    def read_spawn(self, text: str, *, last_begin: bool = False) -> SpawnCall | Malformed:
        """Read the last spawn of a thread's text, wherever an earlier one began. Reasons are those of `reading`."""
        spawn = reading.read_spawn(text)
        return spawn if isinstance(spawn, Malformed) else SpawnCall(spawn.start, spawn.prompts, spawn.names, None)

    def read_child(self, text: str, name: str) -> ChildResult:
        return ChildResult(name, reading.read_result(text))

    def read_ending(self, text: str) -> Ending:
        """Read a thread's path. One that hands none back has no solution, however it ended."""
        answer = reading.read_result(text)
        return Ending(None, "no_solution", "no_solution") if answer is None else Ending(answer, "answered", "")

    def render_join(self, results: Sequence[ChildResult], level: int | None) -> str:
        return reading.render_join([result.name for result in results], [result.path for result in results])

    def demonstrate(
        self, problem: Problem, rng: random.Random, section: ReferenceConfig, count_tokens: CountTokens, *, budget: bool
    ) -> tuple[Call, ...]:
        theirs = traces(section.traces).get(problem, ()) if section.traces else ()
        if not theirs:
            calls = ADAPTIVE.demonstrate(problem, rng, section, count_tokens, budget=budget)
            return tuple(dataclasses.replace(call, ends_in_spawn=False) for call in calls)
        children = sum(call.depth > 0 for call in theirs)  # each of which writes one call
        return _with_budget(theirs, f"Sub Call Budget: {children} ") if budget else theirs


class ReferenceSerial(SearchDialect):
    """Dialect of SoS+, read as the released code does."""

    reads_cut_off = True

    def prompt(self, problem: Problem, budget: int | None = None, window: int | None = None) -> str:
        return SERIAL.prompt(problem, budget).rstrip("\n")

    def token_budget(self, length: int) -> int:
        return SERIAL.token_budget(length)

    def counts_tokens(self, section: CountdownConfig, *, budget: bool) -> bool:
        return SERIAL.counts_tokens(section, budget=budget)

    def read_ending(self, text: str) -> Ending:
        answer = reading.read_search(text)
        return Ending(None, "no_solution", "no_solution") if answer is None else Ending(answer, "answered", "")

    def demonstrate(
        self, problem: Problem, rng: random.Random, section: ReferenceConfig, count_tokens: CountTokens, *, budget: bool
    ) -> tuple[Call, ...]:
        theirs = traces(section.traces).get(problem, ()) if section.traces else ()
        if not theirs:
            return SERIAL.demonstrate(problem, rng, section, count_tokens, budget=budget)
        length = count_tokens(theirs[0].context + theirs[0].completion)
        return _with_budget(theirs, trace.token_budget(self.token_budget(length))) if budget else theirs


def _with_budget(calls: Sequence[Call], named: str) -> tuple[Call, ...]:
    """Return the calls with a budget named at the beginning of the root's prompt."""
    return tuple(call if call.depth else dataclasses.replace(call, context=named + call.context) for call in calls)
