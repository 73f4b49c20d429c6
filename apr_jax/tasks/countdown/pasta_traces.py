"""PASTA's grammar on Countdown searches, and its demonstrations (Jin et al., arXiv 2502.11517).

A parent that has written a state's operations hands all nodes but the first to children, in a spawn as
`tasks/countdown/trace.py` has it, and goes on at once: while they search, it searches the first node itself,
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

Where the parent finds the goal by itself, it replays the path and ends without waiting.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence

from apr_jax.tasks.base import Call
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.countdown.solver import Delegated, Goal, Node, Search, last_call
from apr_jax.tasks.dialect import JOIN_BEGIN, JOIN_END, ChildResult

SYNC = "<Waiting for Sub Searches>\n"  # the parent waits for every child that it has not heard of


def render_texts(results: Sequence[tuple[ChildResult, str]], level: int = 1) -> str:
    """Return what follows SYNC: each child's line of `trace.render_join` and all its text, which ends in a newline."""
    parts = [JOIN_BEGIN]
    for index, (result, text) in enumerate(results):
        parts += [trace.result_line(index, result, level), text]
    return "".join([*parts, JOIN_END])


def pasta_calls(
    problem: Problem,
    rng: random.Random,
    task: CountdownConfig,
    count_tokens: Callable[[str], int] | None,
    *,
    budget: bool,
) -> tuple[Call, ...]:
    """Return the calls of a parent that searches beside its children. With `budget` its prompt names their number.

    A parent's call ends in a spawn or in SYNC; the next one's context is all that was there before, with the children's
    text where they were waited for. Calls come as in `Demonstration`.
    """
    search = Search(problem, rng, task)
    parent_beam = rng.choice(task.parent_beams)
    parent = _Parent(search, task, child_beam=rng.randint(parent_beam, task.child_beam_max))
    goal = search.breadth_first(search.root, parent_beam, parent.lines, parent.delegate, task.retry_probability)
    parent.calls.append(last_call(search, search.root, parent.context, parent.lines, goal, depth=0))
    prompt = trace.parent_prompt(problem, len(parent.child_calls) if budget else None)
    own = [dataclasses.replace(call, context=prompt + call.context) for call in parent.calls]
    return (*own, *parent.child_calls)


class _Parent:
    """A parent and its text; `Search.breadth_first` calls `delegate` at each expansion."""

    def __init__(self, search: Search, task: CountdownConfig, child_beam: int) -> None:
        self._search, self._task, self._child_beam = search, task, child_beam
        self.context = ""  # all after its prompt, up to its current call
        self.lines: list[str] = []  # what it has written since
        self.calls: list[Call] = []
        self.child_calls: list[Call] = []

    def delegate(self, nodes: list[Node]) -> Delegated | None:
        search = self._search
        if len(nodes) < 2 or search.rng.random() >= self._task.spawn_probability:
            return None
        own, *handed = search.order(nodes)
        self._end_call(trace.render_spawn([node.node_id for node in handed]))
        results, goals = [], []
        for node in handed:
            call, goal = self._child(node)
            self.child_calls.append(call)
            path = search.replay(goal, node)[:-1] if goal else None
            results.append((ChildResult(node.node_id, path), call.context + call.completion))
            goals += [goal] if goal else []
        self.lines.append(search.header(own))
        goal = search.breadth_first(own, self._child_beam, self.lines)
        if goal is not None:
            return Delegated(goal)
        self._end_call(SYNC)
        self.context += render_texts(results)
        if not goals:
            return Delegated(None)
        self.lines.append(trace.goal_line(search.problem.target))
        return Delegated(goals[0])

    def _end_call(self, ending: str) -> None:
        written = "".join([*self.lines, ending])
        self.calls.append(Call(self.context, written, 0, True, len(written)))
        self.context += written
        self.lines.clear()

    def _child(self, node: Node) -> tuple[Call, Goal | None]:
        lines: list[str] = []
        goal = self._search.breadth_first(node, self._child_beam, lines)
        return last_call(self._search, node, self._search.header(node), lines, goal, depth=1), goal
