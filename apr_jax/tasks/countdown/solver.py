"""The demonstrators: SoS+ (serial) and APR (parallel) search over Countdown states (paper section 4.1).

Both expand a state into all pairs x operations, keep the `beam` best by heuristic, write them, and put those that are
not final on a heap, from which `beam` states are popped at a time. SoS+ may search an expansion's states depth-first in
place; APR's parent may hand them to children, each of which searches on its own. The heuristic is the reference's
`mult`: over the state's numbers, the summed distance to the nearest factor of the target.
"""

import dataclasses
import functools
import heapq
import math
import operator
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from apr_jax.tasks.base import Call
from apr_jax.tasks.countdown import rules, trace
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.dialect import ChildResult

TOKEN_BUDGETS = tuple(range(512, 4096 + 1, 512))  # what SoS+ is conditioned on (paper section 4.2)

_GENERATION_INDEX = operator.itemgetter(1)  # of a candidate: a tuple of heuristic, generation index, and more


def token_budget(length: int) -> int:
    """Return the smallest budget that `length` tokens keep to, or the largest of all."""
    return next((budget for budget in TOKEN_BUDGETS if budget >= length), TOKEN_BUDGETS[-1])


class Node(NamedTuple):
    """A state of the search. It orders by heuristic, then by age; ages are unique within a problem."""

    heuristic: int
    age: int
    node_id: str
    numbers: list[int]
    operations: str  # quoted and comma-separated, as trace.state_line takes them
    parent: "Node | None"
    generated: str  # the lines that generated it; "" for the problem's root


class Goal(NamedTuple):
    """A state one operation before the target, and the lines of that operation."""

    node: Node
    reached: str


class Delegated(NamedTuple):
    """The result of an expansion whose nodes were searched outside of the heap."""

    goal: Goal | None


# Is given an expansion's nodes before they go to the heap; None leaves them to it.
Delegate = Callable[[list[Node]], Delegated | None]


class Search:
    """The part that all searches of one problem share: its target, its random draws, and the expansion of a state."""

    def __init__(self, problem: Problem, rng: random.Random, task: CountdownConfig) -> None:
        self.problem = problem
        self.rng = rng
        self.shuffle = task.shuffle
        self._guided = task.heuristic == "mult"
        self._max_result = task.max_result or math.inf
        self.root = Node(0, 0, trace.ROOT_ID, list(problem.numbers), "", None, "")
        self._distances = _factor_distances(problem.target)
        self._age = 0

    def breadth_first(
        self,
        root: Node,
        beam: int,
        lines: list[str],
        delegate: Delegate | None = None,
        retry_probability: float = 0.0,
    ) -> Goal | None:
        """Search below `root`, writing to `lines`; the caller has written the root's header and writes the ending.

        An expansion that was delegated in vain is taken up again with `retry_probability`, with the next best `beam`
        operations (iterative broadening: Ginsberg and Harvey 1992), until none is left.
        """
        heap = [root]
        while heap:
            for node in [heapq.heappop(heap) for _ in range(min(beam, len(heap)))]:
                if node is not root:
                    lines.append(self.header(node))
                if len(node.numbers) == 2:
                    goal = self._expand_final(node, beam, lines)
                    if goal is not None:
                        return goal
                    continue
                tried, trying = 0, True
                while trying:
                    nodes, more = self._expand(node, beam, lines, tried)
                    delegated = delegate(nodes) if delegate is not None else None
                    if delegated is None:
                        for generated in nodes:
                            heapq.heappush(heap, generated)
                    elif delegated.goal is not None:
                        return delegated.goal
                    trying = delegated is not None and more and self.rng.random() < retry_probability
                    if trying:
                        tried += beam
                        lines.append(self.header(node))
        return None

    def order(self, nodes: list[Node]) -> list[Node]:
        """Return an expansion's nodes in the order in which they are searched outside of the heap."""
        return sorted(nodes) if self.shuffle else nodes

    def header(self, node: Node) -> str:
        """Return the two lines that begin a node, which are a child's prompt, too."""
        state = trace.state_line(self.problem.target, node.numbers, node.operations)
        return trace.move_line(node.node_id) + state

    def replay(self, goal: Goal, root: Node) -> str:
        """Return the winning path from `root` to the goal."""
        parts = [goal.reached]
        node = goal.node
        while node is not root:
            assert node.parent is not None
            parts += [self.header(node), node.generated]
            node = node.parent
        parts.append(self.header(root))
        return "".join(reversed(parts))

    def _expand(self, node: Node, beam: int, lines: list[str], tried: int = 0) -> tuple[list[Node], bool]:
        """Write the `beam` best operations after the `tried` best, and tell whether more are left."""
        numbers, target, distances = node.numbers, self.problem.target, self._distances
        own = [distances[n] if n <= target else n - target for n in numbers]
        total = sum(own)
        candidates: list[tuple[int, int, int, int, int, str]] = []
        for i in range(len(numbers) - 1):
            for j in range(i + 1, len(numbers)):
                kept = total - own[i] - own[j]
                for result, operation in rules.operations(numbers[i], numbers[j]):
                    if result > self._max_result:
                        continue
                    distance = distances[result] if result <= target else result - target
                    heuristic = kept + distance if self._guided else 0
                    candidates.append((heuristic, len(candidates), i, j, result, operation))
        candidates.sort()
        more = len(candidates) > tried + beam
        candidates = candidates[tried : tried + beam]
        self._arrange(candidates)
        nodes = []
        before = f"{node.operations}, " if node.operations else ""
        for index, (heuristic, _, i, j, result, operation) in enumerate(candidates, start=tried):
            remaining = [*numbers[:i], *numbers[i + 1 : j], *numbers[j + 1 :], result]
            node_id = f"{node.node_id},{index}"
            generated = trace.generated_lines(node_id, target, remaining, operation)
            lines.append(generated)
            self._age += 1
            nodes.append(Node(heuristic, self._age, node_id, remaining, f"{before}'{operation}'", node, generated))
        return nodes, more

    def _expand_final(self, node: Node, beam: int, lines: list[str]) -> Goal | None:
        left, right = node.numbers
        candidates = list(_final_candidates(left, right, self.problem.target, self._max_result))
        del candidates[beam:]
        self._arrange(candidates)
        for _, _, reached, written in candidates:
            lines.append(written)
            if reached:
                return Goal(node, written)
        return None

    def _arrange(self, candidates: list[Any]) -> None:
        """Put the kept operations in the order in which they are written: random, or as they were generated."""
        if self.shuffle:
            self.rng.shuffle(candidates)
        else:
            candidates.sort(key=_GENERATION_INDEX)


def adaptive_calls(
    problem: Problem,
    rng: random.Random,
    task: CountdownConfig,
    count_tokens: Callable[[str], int] | None,
    *,
    budget: bool,
) -> tuple[Call, ...]:
    """Demonstrate APR: a parent hands expansions to children, which do so, too, down to `task.spawn_depth` levels.

    A thread's calls come in order, and after them those of each of its children, with all below it, in spawn order.
    With `budget` the parent's prompt names how many children it opens; with `task.context_windows` every thread's
    prompt names the smallest that holds its longest call, or the largest of all. Raises ValueError where windows are
    asked for without `count_tokens`.
    """
    if task.context_windows and count_tokens is None:
        raise ValueError("a context window counts tokens: pass count_tokens")
    search = Search(problem, rng, task)
    parent_beam = search.rng.choice(task.parent_beams)
    child_beam = search.rng.randint(parent_beam, task.child_beam_max)
    thread = _Thread(search, task, search.root, child_beam, depth=0)
    thread.search_below(parent_beam)
    return tuple(thread.calls(count_tokens, budget=budget))


class _Thread:
    """One thread of APR, and the threads that it spawned."""

    def __init__(self, search: Search, task: CountdownConfig, root: Node, child_beam: int, depth: int) -> None:
        self._search, self._task, self._root, self._child_beam, self._depth = search, task, root, child_beam, depth
        self._context = ""  # what it has after its prompt when its current call begins
        self._lines: list[str] = []  # what it has written since
        self._own: list[Call] = []  # contexts without what a prompt names before the node
        self._children: list[_Thread] = []
        self.goal: Goal | None = None

    def search_below(self, beam: int) -> None:
        """Run the search to its end."""
        search, root = self._search, self._root
        self.goal = search.breadth_first(root, beam, self._lines, self._delegate, self._task.retry_probability)
        context = search.header(root) + self._context
        self._own.append(last_call(search, root, context, self._lines, self.goal, self._depth))

    def calls(self, count_tokens: Callable[[str], int] | None, *, budget: bool) -> list[Call]:
        """Return its own calls, then those of the threads below it."""
        prefix = trace.call_budget_text(len(self._children)) if budget and self._depth == 0 else ""
        if count_tokens is not None and self._task.context_windows:
            longest = max(  # with BOS, and EOS where it follows
                count_tokens(prefix + call.context + call.completion) + 1 + (not call.ends_in_spawn)
                for call in self._own
            )
            prefix += _context_window(longest, self._task.context_windows, count_tokens)
        calls = [dataclasses.replace(call, context=prefix + call.context) for call in self._own]
        for child in self._children:
            calls += child.calls(count_tokens, budget=budget)
        return calls

    def _delegate(self, nodes: list[Node]) -> Delegated | None:
        task, search, level = self._task, self._search, self._depth + 1
        if level > task.spawn_depth or len(nodes) < 2 or search.rng.random() >= task.spawn_probability:
            return None
        nodes = search.order(nodes)
        context, written = search.header(self._root) + self._context, "".join(self._lines)
        written_spawn = written + trace.render_spawn([node.node_id for node in nodes], level)
        self._own.append(Call(context, written_spawn, self._depth, True, len(written_spawn)))
        results, goals = [], []
        for node in nodes:
            child = _Thread(search, task, node, self._child_beam, level)
            child.search_below(self._child_beam)
            self._children.append(child)
            results.append(ChildResult(node.node_id, search.replay(child.goal, node)[:-1] if child.goal else None))
            goals += [child.goal] if child.goal else []
        self._context += written + trace.render_join(results, level)
        self._lines.clear()
        if not goals:
            return Delegated(None)
        self._lines.append(trace.goal_line(search.problem.target))
        return Delegated(goals[0])


def _context_window(length: int, windows: Sequence[int], count_tokens: Callable[[str], int]) -> str:
    """Name the smallest window that holds `length` tokens and its own name, or the largest of all."""
    named = [(window, trace.token_budget_text(window)) for window in windows]
    return next((text for window, text in named if length + count_tokens(text) <= window), named[-1][1])


def serial_calls(
    problem: Problem,
    rng: random.Random,
    task: CountdownConfig,
    count_tokens: Callable[[str], int] | None,
    *,
    budget: bool,
) -> tuple[Call, ...]:
    """Demonstrate SoS+: one thread, which searches some expansions depth-first in place.

    With `budget` its prompt names the tokens it takes, rounded up to a bin. Raises ValueError where they are asked for
    without `count_tokens`.
    """
    if budget and count_tokens is None:
        raise ValueError("a serial budget counts tokens: pass count_tokens")
    search = Search(problem, rng, task)
    beam = search.rng.randint(task.serial_beam_min, task.serial_beam_max)
    lines: list[str] = []
    exits: list[str] = []  # lines that leave the sub searches in which the goal was found, the innermost first

    def search_below(root: Node, level: int) -> Goal | None:
        def delegate(nodes: list[Node]) -> Delegated | None:
            if search.rng.random() >= task.serial_dfs_probability:
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

    goal = search_below(search.root, 0)
    prompt = trace.serial_prompt(search.problem)
    call = last_call(search, search.root, prompt, lines, goal, depth=0, exits="".join(exits))
    if budget and count_tokens is not None:
        length = count_tokens(call.context + call.completion)
        call = dataclasses.replace(call, context=trace.serial_prompt(search.problem, token_budget(length)))
    return (call,)


def last_call(
    search: Search, root: Node, context: str, lines: list[str], goal: Goal | None, depth: int, exits: str = ""
) -> Call:
    """Return the call that ends a thread: its lines, then its replay of the winning path or that there is none."""
    searched = "".join(lines)
    if goal is None:
        completion = searched + trace.NO_SOLUTION
        return Call(context, completion, depth, False, len(completion))
    return Call(context, searched + search.replay(goal, root) + exits, depth, False, len(searched))


@functools.lru_cache(maxsize=1024)
def _factor_distances(target: int) -> tuple[int, ...]:
    """Return for each n in 0..target its distance to the nearest factor of the target in 2..target."""
    factors = [factor for factor in range(2, target) if target % factor == 0] + [target]
    return tuple(min(abs(n - factor) for factor in factors) for n in range(target + 1))


@functools.lru_cache(maxsize=1 << 16)
def _final_candidates(left: int, right: int, target: int, max_result: float) -> tuple[tuple[int, int, bool, str], ...]:
    """Return the operations on a state's last two numbers, best first: heuristic, generation order, success, lines."""
    distances = _factor_distances(target)
    return tuple(
        sorted(
            (
                distances[result] if result <= target else result - target,
                index,
                result == target,
                trace.final_lines(target, result, operation),
            )
            for index, (result, operation) in enumerate(rules.operations(left, right))
            if result <= max_result
        )
    )
