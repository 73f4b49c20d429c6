"""PASTA on Countdown: a parent that searches beside its children (Jin et al., arXiv 2502.11517).

A parent that has written a state's operations hands all nodes but the first to children, in a spawn as
`tasks/countdown/adaptive.py` has it, and goes on at once: while they search, it searches the first node itself,
below the spawn text, which stays.

    ...
    <Calling Sub Searches>
    <Start Sub Search 0 at level 1> Moving to Node #0,1
    <End Calling Sub Searches>
    Moving to Node #0,0
    Current State: 27:[22, 3], Operations: ['5+17=22']
    ...
    22,27 unequal: No Solution
    <Waiting for Sub Searches>
    <Sub Searches>
    <Goal Reached in Sub Search 0 at level 1 at Node #0,1>
    ... all of the child's text: its prompt, its search and its replay ...
    <End Sub Searches>
    27,27 equal: Goal Reached
    ...

Where the parent finds the goal by itself, it replays the path and ends without waiting. Searched depth-first
(`task.search_order`), a node that is left over alone is the parent's own.
"""

import dataclasses
import random

from apr_jax.tasks.base import Call, CountTokens
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.adaptive import Adaptive, render_spawn
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.countdown.search import Delegated, Goal, Node, Search, last_call
from apr_jax.tasks.dialect import JOIN_BEGIN, JOIN_END, PromiseDialect

SYNC = "<Waiting for Sub Searches>\n"  # the parent waits for every child that it has not heard of


class Pasta(Adaptive, PromiseDialect):
    """The parent searches the first node itself, beside its children."""

    wait = SYNC

    def demonstrate(
        self, problem: Problem, rng: random.Random, section: CountdownConfig, count_tokens: CountTokens, *, budget: bool
    ) -> tuple[Call, ...]:
        """Search as a parent beside its children. With `budget` its prompt names their number.

        A parent's call ends in a spawn or in SYNC; the next one's context is all that was there before, with the
        children's text where they were waited for.
        """
        search = Search(problem, rng, section)
        parent_beam = rng.choice(section.parent_beams)
        parent = _Parent(search, section, child_beam=rng.randint(parent_beam, section.child_beam_max))
        goal = search.breadth_first(search.root, parent_beam, parent.lines, parent.delegate, section.retry_probability)
        parent.calls.append(last_call(search, parent.replayed_from, parent.context, parent.lines, goal, depth=0))
        prompt = self.prompt(problem, len(parent.child_calls) if budget else None)
        own = [dataclasses.replace(call, context=prompt + call.context) for call in parent.calls]
        return (*own, *parent.child_calls)


class _Parent:
    """A parent and its text; `Search.breadth_first` calls `delegate` at each expansion."""

    def __init__(self, search: Search, task: CountdownConfig, child_beam: int) -> None:
        self._search, self._task, self._child_beam = search, task, child_beam
        self.replayed_from = search.root
        self.context = ""  # all after its prompt, up to its current call
        self.lines: list[str] = []  # what it has written since
        self.calls: list[Call] = []
        self.child_calls: list[Call] = []

    def delegate(self, nodes: list[Node]) -> Delegated | None:
        search = self._search
        if len(nodes) == 1 and self._task.search_order == "depth_first":
            return self._own(nodes[0])
        if len(nodes) < 2 or search.rng.random() >= self._task.spawn_probability:
            return None
        own, *handed = search.order(nodes)
        self._end_call(render_spawn([node.node_id for node in handed]))
        texts, goals = [], []
        for index, node in enumerate(handed):
            call, goal = self._child(node)
            self.child_calls.append(call)
            texts += [PASTA.result_line(index, search.result(node, goal), 1), call.context + call.completion]
            goals += [(node, goal)] if goal else []
        found = self._own(own)
        if found.goal is not None:
            return found
        self._end_call(SYNC)
        self.context += "".join([JOIN_BEGIN, *texts, JOIN_END])
        if not goals:
            return Delegated(None)
        self.lines.append(trace.goal_line(search.problem.target))
        return self._reached(*goals[-1 if self._task.parent_replay == "child" else 0])

    def _own(self, node: Node) -> Delegated:
        """Search below a node in the parent's own text."""
        self.lines.append(self._search.header(node))
        goal = self._search.below(node, self._child_beam, self.lines)
        return Delegated(None) if goal is None else self._reached(node, goal)

    def _reached(self, node: Node, goal: Goal) -> Delegated:
        """End with a goal below `node`, from which on its path is replayed if the task says so."""
        if self._task.parent_replay == "child":
            self.replayed_from = node
        return Delegated(goal)

    def _end_call(self, ending: str) -> None:
        written = "".join([*self.lines, ending])
        self.calls.append(Call(self.context, written, 0, True, len(written)))
        self.context += written
        self.lines.clear()

    def _child(self, node: Node) -> tuple[Call, Goal | None]:
        lines: list[str] = []
        goal = self._search.below(node, self._child_beam, lines)
        return last_call(self._search, node, self._search.header(node), lines, goal, depth=1), goal


PASTA = Pasta()
