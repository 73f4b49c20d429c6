"""SoS+ on Countdown: one thread, which searches some expansions depth-first in place (paper section 4.1)."""

import dataclasses
import random

from apr_jax.tasks.base import Call, CountTokens
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.countdown.search import Delegated, Goal, Node, Search, SearchDialect, last_call

TOKEN_BUDGETS = tuple(range(512, 4096 + 1, 512))  # what SoS+ is conditioned on (paper section 4.2)


class Serial(SearchDialect):
    """A search as a stream of text."""

    def prompt(self, problem: Problem, budget: int | None = None, window: int | None = None) -> str:
        """Return the prompt; `budget` is the number of tokens that the search may take."""
        return trace.token_budget(budget) + trace.state_line(problem.target, problem.numbers, "")

    def token_budget(self, length: int) -> int:
        """Return the smallest budget that `length` tokens keep to, or the largest of all."""
        return next((budget for budget in TOKEN_BUDGETS if budget >= length), TOKEN_BUDGETS[-1])

    def counts_tokens(self, section: CountdownConfig, *, budget: bool) -> bool:
        return budget

    def demonstrate(
        self, problem: Problem, rng: random.Random, section: CountdownConfig, count_tokens: CountTokens, *, budget: bool
    ) -> tuple[Call, ...]:
        """Search; with `budget` the prompt names the tokens that took, rounded up to a bin."""
        search = Search(problem, rng, section)
        beam = rng.randint(section.serial_beam_min, section.serial_beam_max)
        lines: list[str] = []
        exits: list[str] = []  # lines that leave the sub searches in which the goal was found, the innermost first

        def search_below(root: Node, level: int) -> Goal | None:
            def delegate(nodes: list[Node]) -> Delegated | None:
                if rng.random() >= section.serial_dfs_probability:
                    return None
                for node in search.order(nodes):
                    lines.append(f"Start Sub Search at level {level + 1}: {search.header(node)}")
                    leave = f"Exit Sub Search at level {level + 1}\n"
                    goal = search_below(node, level + 1)
                    if goal is not None:
                        exits.append(leave)
                        return Delegated(goal)
                    lines.append(f"{trace.NO_SOLUTION}{leave}No solution found in sub search\n")
                return Delegated(None)

            return search.breadth_first(root, beam, lines, delegate)

        if section.search_order == "depth_first":
            goal = search.depth_first(search.root, beam, lines)
        else:
            goal = search_below(search.root, 0)
        call = last_call(search, search.root, self.prompt(problem), lines, goal, depth=0, exits="".join(exits))
        if budget:
            length = count_tokens(call.context + call.completion)
            call = dataclasses.replace(call, context=self.prompt(problem, self.token_budget(length)))
        return (call,)


SERIAL = Serial()
