"""Searches over Countdown states: SoS+ (`serial.py`) and those of parents and children (paper section 4.1).

All expand a state into all pairs x operations, keep the `beam` best by heuristic, write them, and put those that are
not final on a heap, from which `beam` states are popped at a time. SoS+ may search an expansion's states depth-first in
place; a parent may hand them to children, each of which searches on its own. The heuristic is the reference's
`mult`: over the state's numbers, the summed distance to the nearest factor of the target. With `task.search_order`
"depth_first" SoS+ and children write an operation, search below it, and then write the next. With `task.attempts` all
four operations on each pair are written, one with too large a result without it (`Exploring Operation: 57*20`), and
before a quotient, or in place of one, what tells if there is one: `Exploring Operation: 57/20, 20*2=40,57 unequal: No
Solution`, and `Exploring Operation: 57/19, 19*3=57,57`.
"""

import functools
import heapq
import math
import operator
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from apr_jax.tasks.base import Call
from apr_jax.tasks.countdown import judging, rules, trace
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.dialect import ChildResult, Ending, ThreadDialect

_GENERATION_INDEX = operator.itemgetter(1)  # of a candidate: a tuple of heuristic, generation index, and more


class Step(NamedTuple):
    """An operation on two of a state's numbers."""

    places: tuple[int, int]  # of the two
    result: int
    operation: str
    before: str  # the lines of attempts before it

    def leaves(self, numbers: Sequence[int]) -> list[int]:
        """Return the numbers that the operation leaves of a state's."""
        first, second = self.places
        return [*numbers[:first], *numbers[first + 1 : second], *numbers[second + 1 :], self.result]


class Node(NamedTuple):
    """A state of the search. It orders by heuristic, then by age; ages are unique within a problem."""

    heuristic: int
    age: int
    node_id: str
    numbers: list[int]
    operations: str  # quoted and comma-separated, as trace.state_line takes them
    parent: "Node | None"
    generated: str  # the lines that generated it; "" for the problem's root

    @property
    def operation(self) -> str:
        """The operation that led to it."""
        return self.operations.rpartition(", ")[2].strip("'")


class Expansion(NamedTuple):
    """Some operations on a state."""

    nodes: list[Node]
    texts: list[str]  # the lines that write each node, attempts before it included
    attempts: str  # lines that follow the last
    more: bool  # operations are left that were not among the best

    @property
    def lines(self) -> list[str]:
        return [*self.texts, self.attempts]


class Goal(NamedTuple):
    """A state one operation before the target, and the lines of that operation."""

    node: Node
    reached: str


class Delegated(NamedTuple):
    """The result of an expansion whose nodes were searched outside of the heap."""

    goal: Goal | None


# Is given an expansion's nodes before they go to the heap; None leaves them to it.
Delegate = Callable[[list[Node]], Delegated | None]


class SearchDialect(ThreadDialect):
    """Threads that end in a replay of their winning path, or in "No solution found."."""

    names_budget = True

    def read_ending(self, text: str) -> Ending:
        return trace.read_ending(text)

    def child_result(self, context: str, completion: str, problem: Problem) -> str:
        """Return how a child that searches ended: solved, wrong_path, no_solution, or why it is malformed."""
        return judging.child_result(context + completion, problem)


class Search:
    """The part that all searches of one problem share: its target, its random draws, and the expansion of a state."""

    def __init__(self, problem: Problem, rng: random.Random, task: CountdownConfig) -> None:
        self.problem = problem
        self.rng = rng
        self.shuffle = task.shuffle
        self._guided = task.heuristic == "mult"
        self._task = task
        self.root = Node(0, 0, trace.ROOT_ID, list(problem.numbers), "", None, "")
        self._distances = _factor_distances(problem.target)
        self._age = 0

    def below(self, root: Node, beam: int, lines: list[str]) -> Goal | None:
        """Search below `root` in the order of `task.search_order`, writing to `lines`."""
        search = self.depth_first if self._task.search_order == "depth_first" else self.breadth_first
        return search(root, beam, lines)

    def breadth_first(
        self, root: Node, beam: int, lines: list[str], delegate: Delegate | None = None, retry_probability: float = 0.0
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
                    expansion = self.expand(node, beam, tried)
                    lines += expansion.lines
                    delegated = delegate(expansion.nodes) if delegate is not None else None
                    if delegated is None:
                        for generated in expansion.nodes:
                            heapq.heappush(heap, generated)
                    elif delegated.goal is not None:
                        return delegated.goal
                    trying = delegated is not None and expansion.more and self.rng.random() < retry_probability
                    if trying:
                        tried += beam
                        lines.append(self.header(node))
        return None

    def depth_first(self, root: Node, beam: int, lines: list[str]) -> Goal | None:
        """Search below `root`, writing to `lines` as `breadth_first` does, but below each operation before the next.

        So whatever a line copies stands close before it, and a search that finds the goal early writes less. With
        `task.restate` it writes a state again whenever it comes back to it, and with `task.restate_operation` below it
        the operation that it comes back from.
        """
        if len(root.numbers) == 2:
            return self._expand_final(root, beam, lines)
        expansion = self.expand(root, beam)
        for node, text in zip(expansion.nodes, expansion.texts, strict=True):
            goal = self.branch(root, node, text, beam, lines)
            if goal is not None:
                return goal
        lines.append(expansion.attempts)
        return None

    def branch(self, root: Node, node: Node, text: str, beam: int, lines: list[str]) -> Goal | None:
        """Write the lines of an operation on `root`'s state, what `depth_first` writes below it, and the way back."""
        lines += [text, self.header(node)]
        goal = self.depth_first(node, beam, lines)
        if goal is not None:
            return goal
        if self._task.restate:
            lines.append(self.header(root))
        if self._task.restate_operation:
            lines.append(trace.operation_line(node.operation))
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

    def result(self, node: Node, goal: Goal | None) -> ChildResult:
        """Return what a child that searched from a node hands back."""
        return ChildResult(node.node_id, self.replay(goal, node)[:-1] if goal else None)

    def expand(self, node: Node, beam: int, tried: int = 0) -> Expansion:
        """Return the `beam` best operations after the `tried` best."""
        numbers, target = node.numbers, self.problem.target
        steps, attempts = usable_steps(numbers, self._task)
        candidates = [(self._rank(numbers, step), index, step) for index, step in enumerate(steps)]
        candidates.sort()
        more = len(candidates) > tried + beam
        candidates = candidates[tried : tried + beam]
        self._arrange(candidates)
        nodes, texts = [], []
        led_here = f"{node.operations}, " if node.operations else ""
        for index, (heuristic, _, step) in enumerate(candidates, start=tried):
            remaining = step.leaves(numbers)
            node_id, operations = f"{node.node_id},{index}", f"{led_here}'{step.operation}'"
            generated = trace.generated_lines(node_id, target, remaining, step.operation)
            texts.append(step.before + generated)
            self._age += 1
            nodes.append(Node(heuristic, self._age, node_id, remaining, operations, node, generated))
        return Expansion(nodes, texts, "" if more else attempts, more)

    def _expand_final(self, node: Node, beam: int, lines: list[str]) -> Goal | None:
        left, right = node.numbers
        target = self.problem.target
        task = self._task
        all_candidates, attempts = _final_candidates(left, right, target, task.max_result, task.attempts)
        candidates = list(all_candidates[:beam])
        self._arrange(candidates)
        for _, _, result, operation, before in candidates:
            written = trace.final_lines(target, result, operation)
            lines.append(before + written)
            if result == target:
                return Goal(node, written)
        if attempts and len(candidates) == len(all_candidates):
            lines.append(attempts)
        return None

    def _rank(self, numbers: Sequence[int], step: Step) -> int:
        """Return the heuristic of what an operation leaves: the summed distance to the nearest factor of the target."""
        if not self._guided:
            return 0
        distances, target = self._distances, self.problem.target
        return sum(distances[n] if n <= target else n - target for n in step.leaves(numbers))

    def _arrange(self, candidates: list[Any]) -> None:
        """Put the kept operations in the order in which they are written: random, or as they were generated."""
        if self.shuffle:
            self.rng.shuffle(candidates)
        else:
            candidates.sort(key=_GENERATION_INDEX)


def usable_steps(numbers: Sequence[int], task: CountdownConfig) -> tuple[list[Step], str]:
    """Return the operations that a search may write on a state, by pair and then in the order + - * /.

    Beside them are the lines of attempts after the last, "" without `task.attempts`.
    """
    steps, attempts = [], ""  # attempts since the last operation
    for i in range(len(numbers) - 1):
        for j in range(i + 1, len(numbers)):
            usable, after = _usable(numbers[i], numbers[j], task.max_result, task.attempts)
            for result, operation, before in usable:
                steps.append(Step((i, j), result, operation, attempts + before))
                attempts = ""
            attempts += after
    return steps, attempts


def last_call(
    search: Search, root: Node, context: str, lines: list[str], goal: Goal | None, depth: int, exits: str = ""
) -> Call:
    """Return the call that ends a thread: its lines, then the path from `root` on, or that there is none."""
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
def _usable(left: int, right: int, max_result: int, attempts: bool) -> tuple[tuple[tuple[int, str, str], ...], str]:
    """Return the operations with results up to `max_result` (0: all), each with its lines of attempts before it.

    Beside them are those of attempts after the last. Without `attempts` there are none.
    """
    usable, tried = [], ""
    bound = max_result or math.inf
    operations = rules.operations(left, right)
    division = trace.division_line(max(left, right), min(left, right), bound) if attempts else ""
    for result, operation in operations:
        tried += division if "/" in operation else ""
        if result <= bound:
            usable.append((result, operation, tried))
            tried = ""
        elif attempts and "/" not in operation:
            tried += trace.attempt_line(operation)
    if len(operations) < len("+-*/"):
        tried += division
    return tuple(usable), tried


@functools.lru_cache(maxsize=1 << 16)
def _final_candidates(
    left: int, right: int, target: int, max_result: int, attempts: bool
) -> tuple[tuple[tuple[int, int, int, str, str], ...], str]:
    """Return the operations on a state's last two numbers, best first, and the attempts after them.

    Of each: heuristic, generation order, result, text, and the attempts before it.
    """
    distances = _factor_distances(target)
    usable, after = _usable(left, right, max_result, attempts)
    ranked = (
        (distances[result] if result <= target else result - target, index, result, operation, before)
        for index, (result, operation, before) in enumerate(usable)
    )
    return tuple(sorted(ranked)), after
