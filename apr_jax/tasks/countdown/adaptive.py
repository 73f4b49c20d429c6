"""APR on Countdown: a spawn names nodes, and a child searches from one of them (Pan et al., arXiv 2504.15466).

prompt      Sub Call Budget: 2 Moving to Node #0
            Current State: 24:[2, 3, 4], Operations: []
completion  ... a search as `search.py` writes it, up to a spawn ...
            <Calling Sub Searches>
            <Start Sub Search 0 at level 1> Moving to Node #0,0
            <Start Sub Search 1 at level 1> Moving to Node #0,1
            <End Calling Sub Searches>
join        <Sub Searches>                                                            in place of the spawn
            <No Solution in Sub Search 0 at level 1 at Node #0,0>
            <Goal Reached in Sub Search 1 at level 1 at Node #0,1>
            ... the winning path of that child, from its node on ...
            <End Sub Searches>
"""

import dataclasses
import random
import re
from collections.abc import Sequence

from apr_jax.tasks.base import Call, CountTokens
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.rules import NUMBER, Problem
from apr_jax.tasks.countdown.search import Delegated, Goal, Node, Search, SearchDialect, last_call
from apr_jax.tasks.countdown.trace import NODE, NUMBERS, OPERATION, ROOT_ID
from apr_jax.tasks.dialect import (
    CALL_BEGIN,
    CALL_END,
    JOIN_BEGIN,
    JOIN_END,
    ChildResult,
    Malformed,
    SpawnCall,
    SpelledSpawnDialect,
)

_SPAWN_LINE = re.compile(rf"<Start Sub Search ({NUMBER}) at level ({NUMBER})> Moving to Node #({NODE})")
_GENERATED_LINE = re.compile(
    rf"^Generated Node #({NODE}): ({NUMBER}):\[({NUMBERS})\] Operation: ({OPERATION})$", re.MULTILINE
)


class Adaptive(SearchDialect, SpelledSpawnDialect):
    """The dialect whose spawns name nodes, and whose joins hold the children's winning paths."""

    def prompt(self, problem: Problem, budget: int | None = None, window: int | None = None) -> str:
        """Return a root's prompt: `budget` is how many children it may open, `window` the tokens of any thread."""
        return _call_budget(budget) + self.child_prompt(trace.root_prompt(problem), window)

    def child_prompt(self, context: str, window: int | None) -> str:
        return trace.token_budget(window) + context

    def read_spawn(self, text: str, *, last_begin: bool = False) -> SpawnCall | Malformed:
        """Read the spawn that ends a thread's text.

        A child's prompt is built from the line that generated its node and from the operations on the way there: those
        of the thread's own prompt, then those of the generated nodes. Reasons: no_call_end, no_call_begin,
        unknown_prompt, empty_spawn, malformed_spawn_line, wrong_index, wrong_level, duplicate_node, unknown_node,
        ambiguous_node (generated twice, differently), wrong_target, final_node (a single number is left).
        """
        if not text.endswith(CALL_END):
            return Malformed("no_call_end")
        start = (text.rfind if last_begin else text.find)("\n" + CALL_BEGIN) + 1
        if start == 0:
            return Malformed("no_call_begin")
        nodes = _Nodes.read(text, start)
        if nodes is None:
            return Malformed("unknown_prompt")
        requested = _read_spawn_lines(text[start + len(CALL_BEGIN) : -len(CALL_END)])
        if isinstance(requested, Malformed):
            return requested
        node_ids, level = requested
        contexts = []
        for node_id in node_ids:
            context = nodes.child_prompt(node_id)
            if isinstance(context, Malformed):
                return context
            contexts.append(context)
        return SpawnCall(start, tuple(contexts), node_ids, level)

    def read_child(self, text: str, name: str) -> ChildResult | Malformed:
        return trace.read_child(text, name)

    def render_join(self, results: Sequence[ChildResult], level: int | None = 1) -> str:
        lines = [JOIN_BEGIN]
        for index, result in enumerate(results):
            lines.append(self.result_line(index, result, level))
            if result.path is not None:
                lines.append(f"{result.path}\n")
        return "".join([*lines, JOIN_END])

    def result_line(self, index: int, result: ChildResult, level: int | None) -> str:
        """Return the line of a join that says what became of a spawn's `index`-th child, counted from 0."""
        outcome = "No Solution" if result.path is None else "Goal Reached"
        return f"<{outcome} in Sub Search {index} at level {level} at Node #{result.name}>\n"

    def spawnable(self, text: str) -> list[str]:
        """Return the nodes that a spawn may name, in the order in which they were first generated."""
        nodes = _Nodes.read(text, len(text))
        return [] if nodes is None else [node for node in nodes.generated if isinstance(nodes.child_prompt(node), str)]

    def spawn_line(self, index: int, level: int, name: str) -> str:
        return trace.start_line(index, level, name)

    def may_name_more(self, added: str) -> bool:
        return "Generated Node" in added

    def counts_tokens(self, section: CountdownConfig, *, budget: bool) -> bool:
        return bool(section.context_windows)

    def demonstrate(
        self, problem: Problem, rng: random.Random, section: CountdownConfig, count_tokens: CountTokens, *, budget: bool
    ) -> tuple[Call, ...]:
        """Search as a parent that hands expansions to children, which do so, too, down to `spawn_depth` levels.

        With `budget` the parent's prompt names how many children it opens; with `section.context_windows` every
        thread's prompt names the smallest that holds its longest call, or the largest of all.
        """
        search = Search(problem, rng, section)
        parent_beam = rng.choice(section.parent_beams)
        child_beam = rng.randint(parent_beam, section.child_beam_max)
        thread = _Thread(search, section, search.root, child_beam, depth=0)
        thread.search_below(parent_beam)
        return tuple(thread.calls(count_tokens, budget=budget))


def render_spawn(node_ids: Sequence[str], level: int = 1) -> str:
    """Return the text of a spawn of these nodes, CALL_BEGIN to CALL_END."""
    return "".join([CALL_BEGIN, *(trace.start_line(i, level, node_id) for i, node_id in enumerate(node_ids)), CALL_END])


def _call_budget(children: int | None) -> str:
    return "" if children is None else f"Sub Call Budget: {children} "


def _read_spawn_lines(body: str) -> tuple[tuple[str, ...], int] | Malformed:
    """Read the nodes and the level that a spawn's lines, without CALL_BEGIN and CALL_END, ask for."""
    if not body:
        return Malformed("empty_spawn")
    *lines, unfinished = body.split("\n")
    if unfinished:
        return Malformed("malformed_spawn_line")
    node_ids: list[str] = []
    levels = set()
    for index, line in enumerate(lines):
        match = _SPAWN_LINE.fullmatch(line)
        if match is None:
            return Malformed("malformed_spawn_line")
        if int(match[1]) != index:
            return Malformed("wrong_index")
        levels.add(int(match[2]))
        if match[3] in node_ids:
            return Malformed("duplicate_node")
        node_ids.append(match[3])
    level = levels.pop()
    return Malformed("wrong_level") if levels or level < 1 else (tuple(node_ids), level)


@dataclasses.dataclass(frozen=True)
class _Nodes:
    """The node that a thread began at, and those that it has generated."""

    root_id: str
    target: str
    root_operations: str
    generated: dict[str, set[tuple[str, str, str]]]  # by node: each different target, numbers and operation written

    @classmethod
    def read(cls, text: str, end: int) -> "_Nodes | None":
        """Read a thread's text up to an offset; None where it has no prompt there."""
        prompt = trace.PROMPT.match(text)
        if prompt is None or prompt.end() > end:
            return None
        generated: dict[str, set[tuple[str, str, str]]] = {}
        for node_id, target, numbers, operation in _GENERATED_LINE.findall(text, prompt.end(), end):
            generated.setdefault(node_id, set()).add((target, numbers, operation))
        return cls(prompt[1] or ROOT_ID, prompt[2], prompt[3], generated)

    def child_prompt(self, node_id: str) -> str | Malformed:
        """Return the prompt of a child that searches from a node."""
        operations: list[str] = []
        ancestor_id = node_id
        numbers = ""
        while ancestor_id != self.root_id:
            nodes = self.generated.get(ancestor_id, set())
            if len(nodes) != 1:
                return Malformed("ambiguous_node" if nodes else "unknown_node")
            ((target, node_numbers, operation),) = nodes
            if target != self.target:
                return Malformed("wrong_target")
            numbers = numbers or node_numbers
            operations.insert(0, f"'{operation}'")
            ancestor_id = ancestor_id.rpartition(",")[0]
        if not numbers:
            return Malformed("unknown_node")
        if "," not in numbers:
            return Malformed("final_node")
        all_operations = ", ".join([*filter(None, [self.root_operations]), *operations])
        return f"{trace.move_line(node_id)}Current State: {self.target}:[{numbers}], Operations: [{all_operations}]\n"


class _Thread:
    """A thread of a demonstration, and the threads that it spawned."""

    def __init__(self, search: Search, task: CountdownConfig, root: Node, child_beam: int, depth: int) -> None:
        self._search, self._task, self._root, self._child_beam, self._depth = search, task, root, child_beam, depth
        self._context = ""  # what it has after its prompt when its current call begins
        self._lines: list[str] = []  # what it has written since
        self._own: list[Call] = []  # contexts without what a prompt names before the node
        self._children: list[_Thread] = []
        self._waited = 0  # characters that it waited for children
        self._replayed_from = root
        self.goal: Goal | None = None

    def search_below(self, beam: int) -> None:
        """Run the search to its end."""
        search, root, task = self._search, self._root, self._task
        if self._depth >= task.spawn_depth:
            self.goal = search.below(root, beam, self._lines)
        else:
            self.goal = search.breadth_first(root, beam, self._lines, self._delegate, task.retry_probability)
        context = search.header(root) + self._context
        self._own.append(last_call(search, self._replayed_from, context, self._lines, self.goal, self._depth))

    def length(self) -> int:
        """Return how many characters its own calls are, and those that they waited for."""
        return sum(len(call.completion) for call in self._own) + self._waited

    def calls(self, count_tokens: CountTokens, *, budget: bool) -> list[Call]:
        """Return its own calls, then those of the threads below it."""
        prefix = _call_budget(len(self._children)) if budget and self._depth == 0 else ""
        if self._task.context_windows:
            longest = max(  # with BOS, and EOS where it follows
                count_tokens(prefix + call.context + call.completion) + 1 + (not call.ends_in_spawn)
                for call in self._own
            )
            named = [(window, trace.token_budget(window)) for window in self._task.context_windows]
            holding = (text for window, text in named if longest + count_tokens(text) <= window)
            prefix += next(holding, named[-1][1])
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
        written_spawn = written + render_spawn([node.node_id for node in nodes], level)
        self._own.append(Call(context, written_spawn, self._depth, True, len(written_spawn)))
        children = [_Thread(search, task, node, self._child_beam, level) for node in nodes]
        for child in children:
            child.search_below(self._child_beam)
        self._children += children
        awaited, winners = children, [child for child in children if child.goal]
        if task.cancel_on_success and winners:
            awaited = winners = [min(winners, key=_Thread.length)]
        self._waited += max(child.length() for child in awaited)
        results = [search.result(child._root, child.goal if child in winners else None) for child in children]
        self._context += written + ADAPTIVE.render_join(results, level)
        self._lines.clear()
        if not winners:
            return Delegated(None)
        self._lines.append(trace.goal_line(search.problem.target))
        winner = winners[0]
        if self._depth == 0 and task.parent_replay == "child":
            winner = winners[-1]
            self._replayed_from = winner._root
        return Delegated(winner.goal)


ADAPTIVE = Adaptive()
