"""Tree of Thoughts: propose next steps, judge the states that they lead to, and search on from the best.

Yao et al., arXiv 2305.10601, section 3: Algorithm 1 (breadth first) and Algorithm 2 (depth first), as in section 4.1,
Game of 24. Each proposer and evaluator call is a child thread with a short prompt of its own; all those of a level (in
depth-first search: of a state) are decoded at the same time. The root only keeps the tree and writes nothing.

What differs: proposer and evaluator are learnt from solver traces (`tasks/countdown/thought_traces.py`) instead of
being prompts for a large model. The states of a level are told apart by their numbers, so that each is judged once,
where the released code values a repeated one at 0. One answer is given, the path to the best leaf. A depth-first search
ends at its first leaf.
"""

import dataclasses
from collections.abc import Generator, Sequence
from typing import Any

from apr_jax.engine.threads import Decode, Join, Open, Spawn, StopReason
from apr_jax.reasoning.outcome import Outcome, Settings, Status, prompt_tokens, truncated_reason
from apr_jax.tasks.countdown import thought_traces
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.countdown.thought_traces import Numbers


@dataclasses.dataclass(frozen=True)
class _State:
    """A node of the tree: the numbers left, the proposals that led there, and its value."""

    numbers: Numbers
    lines: tuple[str, ...] = ()
    value: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Thought:
    """What a child wrote, and why it was cut off ("" where it wasn't)."""

    text: str
    reason: str


class _TooManyChildrenError(Exception):
    """The next spawn would pass the rollout's cap on children."""


def tree_of_thoughts(problem: Problem, settings: Settings) -> Generator[Any, Any, Outcome]:
    """ToT on one problem. What a child writes amiss is dropped and counted, never an exception.

    Without an answer the status is no_solution (the search ended at no leaf, or the best leaf is not the target),
    malformed with no_proposals (the root's proposer wrote none), or truncated with rollout_children (the cap on
    children was met).
    """
    search = _Search(problem, settings)
    walk = search.breadth_first if settings.tree_of_thoughts.search == "breadth_first" else search.depth_first
    answer: str | None = None
    status: Status = "no_solution"
    reason = "no_solution"
    try:
        leaf = yield from walk(_State(problem.numbers))
    except _TooManyChildrenError:
        status, reason = "truncated", "rollout_children"
    else:
        if leaf is not None and leaf.numbers == (problem.target,):
            answer, status, reason = thought_traces.render_answer(leaf.lines, problem.target), "answered", ""
        elif not search.num_proposals:
            status, reason = "malformed", "no_proposals"
    return Outcome(
        answer=answer,
        status=status,
        reason=reason,
        num_spawns=search.num_spawns,
        num_children=search.num_children,
        child_reasons=tuple(search.child_reasons),
        dropped_lines=tuple(search.dropped),
    )


class _Search:
    """The tree of one problem, and what was counted on the way."""

    def __init__(self, problem: Problem, settings: Settings) -> None:
        self._target, self._settings, self._options = problem.target, settings, settings.tree_of_thoughts
        self.num_spawns = self.num_children = self.num_proposals = 0
        self.child_reasons: list[str] = []
        self.dropped: list[str] = []

    def breadth_first(self, root: _State) -> Generator[Any, Any, _State | None]:
        """Algorithm 1: the best leaf of a search that keeps the `breadth` best states of each level."""
        states = [root]
        for _ in range(len(root.numbers) - 1):
            reached = yield from self._expand(states)
            states = _best_first(reached)[: self._options.breadth]
        return states[0] if states else None

    def depth_first(self, state: _State) -> Generator[Any, Any, _State | None]:
        """Algorithm 2: the first leaf below `state`, best states first; those not above the threshold are pruned."""
        if len(state.numbers) == 1:
            return state
        reached = yield from self._expand([state])
        for child in _best_first(reached):
            if child.value > self._options.threshold:
                leaf = yield from self.depth_first(child)
                if leaf is not None:
                    return leaf
        return None

    def _expand(self, states: Sequence[_State]) -> Generator[Any, Any, list[_State]]:
        """The states that one step from `states` leads to, each with its value; of equal ones the first proposed."""
        prompts = [thought_traces.proposer_prompt(self._target, state.numbers) for state in states]
        reached: dict[Numbers, _State] = {}
        for state, text in zip(states, (yield from self._think(prompts)), strict=True):
            proposals, dropped = thought_traces.read_proposals(text, state.numbers)
            self.num_proposals += len(proposals)
            self.dropped += dropped
            for proposal in proposals:
                key = tuple(sorted(proposal.numbers))
                reached.setdefault(key, _State(proposal.numbers, (*state.lines, proposal.line)))
        samples = self._options.value_samples
        prompts = [thought_traces.evaluator_prompt(self._target, state.numbers) for state in reached.values()]
        judged = yield from self._think([prompt for prompt in prompts for _ in range(samples)])
        values = [self._value(text) for text in judged]
        return [
            dataclasses.replace(state, value=sum(values[samples * index : samples * (index + 1)]))
            for index, state in enumerate(reached.values())
        ]

    def _value(self, text: str) -> float:
        verdict = thought_traces.read_verdict(text)
        if verdict is None:
            self.dropped.append("no_verdict")
            return 0.0
        return thought_traces.VALUES[verdict]

    def _think(self, prompts: Sequence[str]) -> Generator[Any, Any, list[str]]:
        """What children with these prompts write, all at the same time."""
        if not prompts:
            return []
        if self.num_children + len(prompts) > self._settings.max_total_children:
            raise _TooManyChildrenError
        self.num_spawns += 1
        self.num_children += len(prompts)
        handle = yield Spawn([_think(prompt, self._settings) for prompt in prompts])
        thoughts: list[_Thought] = yield Join(handle)
        self.child_reasons += [thought.reason for thought in thoughts if thought.reason]
        return [thought.text for thought in thoughts]


def _think(prompt: str, settings: Settings) -> Generator[Any, Any, _Thought]:
    tokenizer = settings.tokenizer
    thread = yield Open(prompt_tokens(tokenizer, prompt))
    prompt_len = len(thread.tokens)
    stop = yield Decode(thread, (tokenizer.eos_id,))
    reason = "" if stop.reason is StopReason.TOKEN else truncated_reason(stop)
    return _Thought(tokenizer.decode(thread.tokens[prompt_len:]), reason)


def _best_first(states: Sequence[_State]) -> list[_State]:
    """By value; of equal ones the first proposed."""
    return sorted(states, key=lambda state: -state.value)
