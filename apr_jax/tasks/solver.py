"""The demonstrators: SoS+ (serial) and APR (parallel) search over Countdown states (paper section 4.1).

Both expand a state into all pairs x operations, keep the `beam` best by heuristic, write them, and put those that are
not final on a heap, from which `beam` states are popped at a time. SoS+ may search an expansion's states depth-first in
place; APR's parent may hand them to children, each of which searches on its own. The heuristic is the reference's
`mult`: over the state's numbers, the summed distance to the nearest factor of the target.
"""

import dataclasses
import functools
import heapq
import operator
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from apr_jax.config import TaskConfig
from apr_jax.tasks import countdown, trace
from apr_jax.tasks.countdown import Problem
from apr_jax.tasks.trace import Call, ChildResult

TOKEN_BUDGETS = tuple(range(512, 4096 + 1, 512))  # what SoS+ is conditioned on (paper section 4.2)

_GENERATION_INDEX = operator.itemgetter(1)  # of a candidate: a tuple of heuristic, generation index, and more


def token_budget(length: int) -> int:
    """The smallest budget that `length` tokens keep to, or the largest of all."""
    return next((budget for budget in TOKEN_BUDGETS if budget >= length), TOKEN_BUDGETS[-1])


class _Node(NamedTuple):
    """A state of the search. It orders by heuristic, then by age; ages are unique within a problem."""

    heuristic: int
    age: int
    node_id: str
    numbers: list[int]
    operations: str  # quoted and comma-separated, as trace.state_line takes them
    parent: "_Node | None"
    generated: str  # the lines that generated it; "" for the problem's root


class _Goal(NamedTuple):
    """A state one operation before the target, and the lines of that operation."""

    node: _Node
    reached: str


class _Delegated(NamedTuple):
    """What came of an expansion's nodes that were searched outside of the heap."""

    goal: _Goal | None


# Is given an expansion's nodes before they go to the heap; None leaves them to it.
_Delegate = Callable[[list[_Node]], _Delegated | None]


class _Search:
    """What every search of one problem shares: its target, its random draws, and how a state is expanded."""

    def __init__(self, problem: Problem, rng: random.Random, task: TaskConfig) -> None:
        self.problem = problem
        self.rng = rng
        self.shuffle = task.shuffle
        self._guided = task.heuristic == "mult"
        self.root = _Node(0, 0, trace.ROOT_ID, list(problem.numbers), "", None, "")
        self._distances = _factor_distances(problem.target)
        self._age = 0

    def breadth_first(
        self,
        root: _Node,
        beam: int,
        lines: list[str],
        delegate: _Delegate | None = None,
        retry_probability: float = 0.0,
    ) -> _Goal | None:
        """Searches below `root`, writing to `lines`; the caller has written the root's header and writes the ending.

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

    def order(self, nodes: list[_Node]) -> list[_Node]:
        """The order in which an expansion's nodes are searched outside of the heap."""
        return sorted(nodes) if self.shuffle else nodes

    def header(self, node: _Node) -> str:
        """The two lines that begin a node, which are a child's prompt, too."""
        state = trace.state_line(self.problem.target, node.numbers, node.operations)
        return trace.move_line(node.node_id) + state

    def replay(self, goal: _Goal, root: _Node) -> str:
        """The winning path from `root` to the goal."""
        parts = [goal.reached]
        node = goal.node
        while node is not root:
            assert node.parent is not None
            parts += [self.header(node), node.generated]
            node = node.parent
        parts.append(self.header(root))
        return "".join(reversed(parts))

    def _expand(self, node: _Node, beam: int, lines: list[str], tried: int = 0) -> tuple[list[_Node], bool]:
        """Writes the `beam` best operations that come after the `tried` best; also tells whether more are left."""
        numbers, target, distances = node.numbers, self.problem.target, self._distances
        own = [distances[n] if n <= target else n - target for n in numbers]
        total = sum(own)
        candidates: list[tuple[int, int, int, int, int, str]] = []
        for i in range(len(numbers) - 1):
            for j in range(i + 1, len(numbers)):
                kept = total - own[i] - own[j]
                for result, operation in countdown.operations(numbers[i], numbers[j]):
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
            nodes.append(_Node(heuristic, self._age, node_id, remaining, f"{before}'{operation}'", node, generated))
        return nodes, more

    def _expand_final(self, node: _Node, beam: int, lines: list[str]) -> _Goal | None:
        left, right = node.numbers
        candidates = list(_final_candidates(left, right, self.problem.target))
        del candidates[beam:]
        self._arrange(candidates)
        for _, _, reached, written in candidates:
            lines.append(written)
            if reached:
                return _Goal(node, written)
        return None

    def _arrange(self, candidates: list[Any]) -> None:
        """Puts the kept operations in the order in which they are written: random, or as they were generated."""
        if self.shuffle:
            self.rng.shuffle(candidates)
        else:
            candidates.sort(key=_GENERATION_INDEX)


def adaptive_calls(
    problem: Problem, rng: random.Random, task: TaskConfig, count_tokens: Callable[[str], int] | None, *, budget: bool
) -> tuple[Call, ...]:
    """APR: a parent that hands expansions to children. With `budget` its prompt names how many it opens."""
    search = _Search(problem, rng, task)
    parent_beam = search.rng.choice(task.parent_beams)
    child_beam = search.rng.randint(parent_beam, task.child_beam_max)
    context = ""  # what the parent has after its prompt when its current call begins
    lines: list[str] = []  # what it has written since
    spawning_calls: list[tuple[str, str]] = []
    child_calls: list[Call] = []

    def delegate(nodes: list[_Node]) -> _Delegated | None:
        nonlocal context
        if len(nodes) < 2 or search.rng.random() >= task.spawn_probability:
            return None
        nodes = search.order(nodes)
        written = "".join(lines)
        spawning_calls.append((context, written + trace.render_spawn([node.node_id for node in nodes])))
        results, goals = [], []
        for node in nodes:
            call, goal = _child_call(search, node, child_beam)
            child_calls.append(call)
            results.append(ChildResult(node.node_id, search.replay(goal, node)[:-1] if goal else None))
            goals += [goal] if goal else []
        context += written + trace.render_join(results)
        lines.clear()
        if not goals:
            return _Delegated(None)
        lines.append(trace.goal_line(search.problem.target))
        return _Delegated(goals[0])

    goal = search.breadth_first(search.root, parent_beam, lines, delegate, task.retry_probability)
    prompt = trace.parent_prompt(search.problem, len(child_calls) if budget else None)
    calls = [Call(prompt + before, completion, 0, True, len(completion)) for before, completion in spawning_calls]
    return (*calls, _last_call(search, search.root, prompt + context, lines, goal, depth=0), *child_calls)


def _child_call(search: _Search, node: _Node, beam: int) -> tuple[Call, _Goal | None]:
    lines: list[str] = []
    goal = search.breadth_first(node, beam, lines)
    return _last_call(search, node, search.header(node), lines, goal, depth=1), goal


def serial_calls(
    problem: Problem, rng: random.Random, task: TaskConfig, count_tokens: Callable[[str], int] | None, *, budget: bool
) -> tuple[Call, ...]:
    """SoS+: one thread, which searches some expansions depth-first in place.

    With `budget` its prompt names the tokens it takes, rounded up to a bin. Raises ValueError where they are asked for
    without `count_tokens`.
    """
    if budget and count_tokens is None:
        raise ValueError("a serial budget counts tokens: pass count_tokens")
    search = _Search(problem, rng, task)
    beam = search.rng.randint(task.serial_beam_min, task.serial_beam_max)
    lines: list[str] = []
    exits: list[str] = []  # lines that leave the sub searches in which the goal was found, the innermost first

    def search_below(root: _Node, level: int) -> _Goal | None:
        def delegate(nodes: list[_Node]) -> _Delegated | None:
            if search.rng.random() >= task.serial_dfs_probability:
                return None
            for node in search.order(nodes):
                lines.append(f"Start Sub Search at level {level + 1}: {search.header(node)}")
                leave = f"Exit Sub Search at level {level + 1}\n"
                goal = search_below(node, level + 1)
                if goal is not None:
                    exits.append(leave)
                    return _Delegated(goal)
                lines.append(f"{trace.NO_SOLUTION}{leave}No solution found in sub search\n")
            return _Delegated(None)

        return search.breadth_first(root, beam, lines, delegate)

    goal = search_below(search.root, 0)
    prompt = trace.serial_prompt(search.problem)
    call = _last_call(search, search.root, prompt, lines, goal, depth=0, exits="".join(exits))
    if budget and count_tokens is not None:
        length = count_tokens(call.context + call.completion)
        call = dataclasses.replace(call, context=trace.serial_prompt(search.problem, token_budget(length)))
    return (call,)


def _last_call(
    search: _Search, root: _Node, context: str, lines: list[str], goal: _Goal | None, depth: int, exits: str = ""
) -> Call:
    """The call that ends a thread: its lines, then its replay of the winning path or that there is none."""
    searched = "".join(lines)
    if goal is None:
        completion = searched + trace.NO_SOLUTION
        return Call(context, completion, depth, False, len(completion))
    return Call(context, searched + search.replay(goal, root) + exits, depth, False, len(searched))


@functools.lru_cache(maxsize=1024)
def _factor_distances(target: int) -> tuple[int, ...]:
    """For each n in 0..target, its distance to the nearest factor of the target in 2..target (beyond: n - target)."""
    factors = [factor for factor in range(2, target) if target % factor == 0] + [target]
    return tuple(min(abs(n - factor) for factor in factors) for n in range(target + 1))


@functools.lru_cache(maxsize=1 << 16)
def _final_candidates(left: int, right: int, target: int) -> tuple[tuple[int, int, bool, str], ...]:
    """The operations on a state's last two numbers, best first: heuristic, generation order, success, lines."""
    distances = _factor_distances(target)
    return tuple(
        sorted(
            (
                distances[result] if result <= target else result - target,
                index,
                result == target,
                trace.final_lines(target, result, operation),
            )
            for index, (result, operation) in enumerate(countdown.operations(left, right))
        )
    )
