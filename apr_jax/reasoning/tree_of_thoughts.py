"""Tree of Thoughts: propose next steps, judge the states that they lead to, and search on from the best.

Yao et al., arXiv 2305.10601, section 3: Algorithm 1 (breadth first) and Algorithm 2 (depth first), as in section 4.1,
Game of 24. Each proposer and evaluator call is a child thread with a short prompt of its own; all those of a level (in
depth-first search: of a state) are decoded at the same time. The root only keeps the tree and writes nothing.

What differs: proposer and evaluator are learnt from solver traces (Countdown's: `tasks/countdown/thoughts.py`)
instead of being prompts for a large model. The dialect tells the states of a level apart, so that each is judged once,
where the released code values a repeated one at 0. One answer is given, the path to the best leaf. A depth-first search
ends at its first leaf.
"""

import dataclasses
from collections.abc import Generator, Hashable, Sequence
from typing import Any

from apr_jax.engine.threads import Decode, Join, Open, Spawn, StopReason
from apr_jax.reasoning.base import Method, Outcome, Settings, Tally, Transcript, truncated_reason
from apr_jax.tasks.dialect import Ending, ThoughtDialect


@dataclasses.dataclass(frozen=True)
class _Node:
    """A node of the tree: its state, the proposals that led there, and its value."""

    state: Any
    lines: tuple[str, ...] = ()
    value: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Thought:
    """A child's text, and why it was cut off ("" where it wasn't)."""

    text: str
    reason: str


class _TooManyChildrenError(Exception):
    """The next spawn would pass the rollout's cap on children."""


def tree_of_thoughts(problem: Any, settings: Settings) -> Generator[Any, Any, Outcome]:
    """Run ToT on one problem. What a child writes amiss is dropped and counted, never an exception.

    Without an answer the status is no_solution (the search ended at no leaf, or the best leaf is no solution),
    malformed with no_proposals (the root's proposer wrote none), or truncated with rollout_children (the cap on
    children was met).
    """
    dialect = settings.task.dialect("tree_of_thoughts", ThoughtDialect)
    search = _Search(dialect, problem, settings)
    walk = search.breadth_first if settings.tree_of_thoughts.search == "breadth_first" else search.depth_first
    ending = Ending(None, "no_solution", "no_solution")
    try:
        leaf = yield from walk(_Node(dialect.root(problem)))
    except _TooManyChildrenError:
        ending = Ending(None, "truncated", "rollout_children")
    else:
        answer = None if leaf is None else dialect.render_answer(problem, leaf.lines, leaf.state)
        if answer is not None:
            ending = Ending(answer, "answered", "")
        elif not search.num_proposals:
            ending = Ending(None, "malformed", "no_proposals")
    return search.tally.outcome(ending)


TREE_OF_THOUGHTS = Method(
    name="tree_of_thoughts",
    program=tree_of_thoughts,
    dialect="tree_of_thoughts",
    kind=ThoughtDialect,
    budget=None,
    root_writes=False,
)


class _Search:
    """The tree of one problem, and the counts of the way."""

    def __init__(self, dialect: ThoughtDialect, problem: Any, settings: Settings) -> None:
        self._dialect, self._problem = dialect, problem
        self._settings, self._options = settings, settings.tree_of_thoughts
        self.num_proposals = 0
        self.tally = Tally()

    def breadth_first(self, root: _Node) -> Generator[Any, Any, _Node | None]:
        """Return the best leaf of a search that keeps the `breadth` best nodes of each level (Algorithm 1)."""
        nodes = [root]
        for _ in range(self._dialect.steps_left(root.state)):
            reached = yield from self._expand(nodes)
            nodes = _best_first(reached)[: self._options.breadth]
        return nodes[0] if nodes else None

    def depth_first(self, node: _Node) -> Generator[Any, Any, _Node | None]:
        """Return the first leaf below `node`, best nodes first; none below the threshold is tried (Algorithm 2)."""
        if not self._dialect.steps_left(node.state):
            return node
        reached = yield from self._expand([node])
        for child in _best_first(reached):
            if child.value > self._options.threshold:
                leaf = yield from self.depth_first(child)
                if leaf is not None:
                    return leaf
        return None

    def _expand(self, nodes: Sequence[_Node]) -> Generator[Any, Any, list[_Node]]:
        """Return the nodes that one step from `nodes` leads to, with their values; of equal ones the first proposed."""
        dialect, problem = self._dialect, self._problem
        prompts = [dialect.proposer_prompt(problem, node.state) for node in nodes]
        reached: dict[Hashable, _Node] = {}
        for node, text in zip(nodes, (yield from self._think(prompts)), strict=True):
            proposals, dropped = dialect.read_proposals(text, node.state)
            self.num_proposals += len(proposals)
            self.tally.dropped_lines += dropped
            for proposal in proposals:
                reached.setdefault(dialect.key(proposal.state), _Node(proposal.state, (*node.lines, proposal.line)))
        samples = self._options.value_samples
        prompts = [dialect.evaluator_prompt(problem, node.state) for node in reached.values()]
        judged = yield from self._think([prompt for prompt in prompts for _ in range(samples)])
        values = [self._value(text) for text in judged]
        return [
            dataclasses.replace(node, value=sum(values[samples * index : samples * (index + 1)]))
            for index, node in enumerate(reached.values())
        ]

    def _value(self, text: str) -> float:
        value = self._dialect.read_value(text)
        if value is None:
            self.tally.dropped_lines.append("no_verdict")
            return 0.0
        return value

    def _think(self, prompts: Sequence[str]) -> Generator[Any, Any, list[str]]:
        """Return what children with these prompts write, all at the same time."""
        if not prompts:
            return []
        if self.tally.num_children + len(prompts) > self._settings.max_total_children:
            raise _TooManyChildrenError
        self.tally.spawned(len(prompts))
        handle = yield Spawn([_think(prompt, self._settings) for prompt in prompts])
        thoughts: list[_Thought] = yield Join(handle)
        self.tally.child_reasons += [thought.reason for thought in thoughts if thought.reason]
        return [thought.text for thought in thoughts]


def _think(prompt: str, settings: Settings) -> Generator[Any, Any, _Thought]:
    tokenizer = settings.tokenizer
    thread = yield Open(tokenizer.encode_prompt(prompt))
    page = Transcript(tokenizer, thread, "")
    stop = yield Decode(thread, tokenizer.eos_ids)
    reason = "" if stop.reason is StopReason.TOKEN else truncated_reason(stop)
    return _Thought(page.text(), reason)


def _best_first(nodes: Sequence[_Node]) -> list[_Node]:
    """Sort by value; of equal ones the first proposed comes first."""
    return sorted(nodes, key=lambda node: -node.value)
