"""Dialects: how threads of a task write under a way of reasoning. Programs of `reasoning/` know a dialect and no task.

A dialect has prompts, spawns, joins and answers, and demonstrates all that. The classes below are what programs ask
for: `direct`, `serial` a ThreadDialect, `adaptive` a SpawnDialect, and so on. What a model writes is data: readers
return Malformed with a short snake_case reason to count it under, and never raise.
"""

import abc
import dataclasses
import random
from collections.abc import Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

from apr_jax.tasks.base import Call, CountTokens, Demonstration

# The marks of spawns and joins that the built-in vocabulary has as one token each.
CALL_BEGIN = "<Calling Sub Searches>\n"
CALL_END = "<End Calling Sub Searches>\n"
JOIN_BEGIN = "<Sub Searches>\n"
JOIN_END = "<End Sub Searches>\n"

# Verdicts of Tree of Thoughts on a state, with the values of its released code (Yao et al., arXiv 2305.10601).
SURE, LIKELY, IMPOSSIBLE = "sure", "likely", "impossible"
VALUES: Mapping[str, float] = MappingProxyType({SURE: 20.0, LIKELY: 1.0, IMPOSSIBLE: 0.001})


Status = Literal["answered", "no_solution", "malformed", "truncated"]


class Ending(NamedTuple):
    """The claim of a thread that has ended. One that ended by itself, which a dialect reads, is not "truncated"."""

    answer: str | None
    status: Status
    reason: str  # "" when answered; otherwise a snake_case reason that can be counted


@dataclasses.dataclass(frozen=True)
class SpawnCall:
    """A well-formed spawn: where its text starts, and the children it asks for, in order."""

    start: int  # offset of the spawn's begin in the thread's text
    contexts: tuple[str, ...]  # each child's prompt
    names: tuple[str, ...]
    level: int | None = 1  # as written; 1 for the root's children, 2 for theirs; None: the dialect writes no levels


@dataclasses.dataclass(frozen=True)
class ChildResult:
    """The path that a child hands back, without a newline at the end, or None for "no solution"."""

    name: str
    path: str | None
    text: str = ""  # all that a child wrote that is well-formed, told to `render_join`


@dataclasses.dataclass(frozen=True)
class Malformed:
    """Text that breaks the grammar, with a reason."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A proposer's line, without its newline, and the state that it leads to."""

    line: str
    state: Any


class Dialect(abc.ABC):
    """The part that all dialects share: demonstrations, and a word on how a child ended."""

    names_budget: ClassVar[bool] = False  # prompts of demonstrations can

    @property
    def marks(self) -> tuple[str, ...]:
        """The marks that tell programs what a thread wants, each of which may be one token."""
        return ()

    @abc.abstractmethod
    def demonstrate(
        self, problem: Any, rng: random.Random, section: Any, count_tokens: CountTokens, *, budget: bool
    ) -> tuple[Call, ...]:
        """Solve a problem and return what threads wrote, in the order of `Demonstration`, whether or not it was solved.

        Args:
          rng: draws what the solver may choose.
          section: the task's section of the configuration.
          count_tokens: of a text; called only where `counts_tokens` says so.
          budget: name in the prompt what the solution took; False unless `names_budget`.
        """

    @abc.abstractmethod
    def demonstrated_answer(self, problem: Any, calls: Sequence[Call]) -> str | None:
        """Return the answer that a demonstration leads to."""

    @abc.abstractmethod
    def opening(self, problem: Any) -> str:
        """Return the first prompt of a problem, which a tokenizer must be able to spell."""

    def counts_tokens(self, section: Any, *, budget: bool) -> bool:
        """Tell whether demonstrations depend on how many tokens their texts are."""
        return False

    def child_result(self, context: str, completion: str, problem: Any) -> str:
        """Return one word for the thread viewer: how a child ended by itself; "solved" marks a success."""
        return "ended"


class ThreadDialect(Dialect):
    """Threads that are given a prompt and end in an answer."""

    reads_cut_off: ClassVar[bool] = False  # threads that a limit cut off are read as if they had ended by themselves

    @abc.abstractmethod
    def prompt(self, problem: Any, budget: int | None = None, window: int | None = None) -> str:
        """Return the root thread's prompt. It names a budget and a context window where they are given."""

    @abc.abstractmethod
    def read_ending(self, text: str) -> Ending:
        """Read the claim of a thread that ended by itself from its text, the prompt included."""

    def opening(self, problem: Any) -> str:
        return self.prompt(problem)

    def token_budget(self, length: int) -> int:
        """Return the budget, as prompts name it, that `length` tokens keep to."""
        return length

    def demonstrated_answer(self, problem: Any, calls: Sequence[Call]) -> str | None:
        ends = [call.context + call.completion for call in calls if call.depth == 0 and not call.ends_in_spawn]
        return next((answer for answer, *_ in map(self.read_ending, ends) if answer is not None), None)


class SpawnDialect(ThreadDialect):
    """Threads that hand work to children by a spawn, whose text a join replaces.

    Its marks are tokens where the tokenizer has them as one each. Others are found in the text that threads write.
    """

    spawn_begin: ClassVar[str] = CALL_BEGIN
    spawn_end: ClassVar[str] = CALL_END
    join_begin: ClassVar[str] = JOIN_BEGIN  # only the engine writes it

    # What a child begins from: the context that the spawn gives it (Pan et al., arXiv 2504.15466), or the whole thread
    # of its parent, after which that context then stands (ThreadWeaver, arXiv 2512.07843).
    children: Literal["context", "fork"] = "context"
    # Text that threads may not write, and what takes its place as soon as one has, both spelt out. A dialect with such
    # text ends its spawns with EOS.
    replaced: ClassVar[Mapping[str, str]] = MappingProxyType({})

    @property
    def marks(self) -> tuple[str, ...]:
        return (self.spawn_end, self.join_begin, self.spawn_begin)

    @abc.abstractmethod
    def read_spawn(self, text: str, *, last_begin: bool = False) -> SpawnCall | Malformed:
        """Read the spawn that ends a thread's text, from its first `spawn_begin` on, or with `last_begin` its last.

        The text has the thread's own prompt and everything after, and ends in `spawn_end`.
        """

    @abc.abstractmethod
    def read_child(self, text: str, name: str) -> ChildResult | Malformed:
        """Read what a child that ended by itself hands back from its text, its prompt included."""

    @abc.abstractmethod
    def render_join(self, results: Sequence[ChildResult], level: int | None) -> str:
        """Return the text that takes the spawn's place: the children's results, in spawn order."""

    def asks_for_children(self, text: str, depth: int) -> bool:
        """Tell whether a thread that ended with EOS asks for children, and not at the end of a spawn that is marked."""
        return False

    def is_spawn(self, call: Call) -> bool:
        """Tell whether a demonstrated call ends in a spawn."""
        return call.ends_in_spawn

    def child_prompt(self, context: str, window: int | None) -> str:
        """Return a child's prompt, which names the context window where there is one."""
        return context


class SpelledSpawnDialect(SpawnDialect):
    """A dialect that can tell every well-formed spawn ahead, which `rollout.constrain_spawns` needs."""

    @abc.abstractmethod
    def spawnable(self, text: str) -> list[str]:
        """Return the names that a spawn may ask for which begins where a thread's text ends."""

    @abc.abstractmethod
    def spawn_line(self, index: int, level: int, name: str) -> str:
        """Return the line of a spawn that asks for its `index`-th child, counted from 0."""

    @abc.abstractmethod
    def may_name_more(self, added: str) -> bool:
        """Tell quickly whether text that was added to a thread may have changed what is spawnable."""


class PromiseDialect(SpawnDialect):
    """Threads that go on beside their children and wait for them at a mark (PASTA)."""

    wait: ClassVar[str]
    join_end: ClassVar[str] = JOIN_END

    @property
    def marks(self) -> tuple[str, ...]:
        return (*super().marks, self.wait)

    @abc.abstractmethod
    def result_line(self, index: int, result: ChildResult, level: int | None) -> str:
        """Return the line that stands before the text of a spawn's `index`-th child."""


class WorkerDialect(ThreadDialect):
    """Workers that see each other's text as it comes (Hogwild!). Each is given the prompt and a header of its own."""

    num_workers: ClassVar[int]

    @abc.abstractmethod
    def header(self, worker: int) -> str:
        """Return what one worker is given after the prompt."""


class ThoughtDialect(Dialect):
    """Proposers of next steps and evaluators of states (Tree of Thoughts). A state is any object."""

    @abc.abstractmethod
    def root(self, problem: Any) -> Any:
        """Return the state to begin with."""

    def opening(self, problem: Any) -> str:
        return self.proposer_prompt(problem, self.root(problem))

    @abc.abstractmethod
    def steps_left(self, state: Any) -> int:
        """Return how many steps lead from a state to a leaf."""

    @abc.abstractmethod
    def key(self, state: Any) -> Hashable:
        """Return what makes two states of a level the same."""

    @abc.abstractmethod
    def proposer_prompt(self, problem: Any, state: Any) -> str:
        """Return the prompt that asks for steps from a state."""

    @abc.abstractmethod
    def evaluator_prompt(self, problem: Any, state: Any) -> str:
        """Return the prompt that asks for the value of a state."""

    @abc.abstractmethod
    def read_proposals(self, text: str, state: Any) -> tuple[list[Proposal], list[str]]:
        """Read what a proposer wrote: the proposals, and why each other line was dropped."""

    @abc.abstractmethod
    def read_value(self, text: str) -> float | None:
        """Read the value in what an evaluator wrote; None where there is none."""

    @abc.abstractmethod
    def render_answer(self, problem: Any, lines: Sequence[str], state: Any) -> str | None:
        """Return the answer of a leaf that was reached by proposals' lines; None where it is no solution."""


class Lengths(NamedTuple):
    """The tokens of a demonstration, as the engine counts them."""

    sequential: int | None  # on the longest causal chain; None where a program sets the clock, as PASTA's does
    total: int
    peak_context: int  # the most that a thread holds, BOS included; the workers of Hogwild! are one thread


def demonstrated_tokens(dialect: Dialect, demonstration: Demonstration, count_tokens: CountTokens) -> Lengths:
    """Count the tokens that a demonstration writes and holds.

    A spawn takes as long as its longest child, with all below it. `count_tokens` is of a text; a call that ends its
    thread has one more, EOS.
    """
    calls = demonstration.calls
    lengths = [count_tokens(call.completion) + (not call.ends_in_spawn) for call in calls]
    held = [count_tokens(call.context) for call in calls]
    if isinstance(dialect, WorkerDialect):
        prompt = count_tokens(dialect.prompt(demonstration.problem))
        headers = sum(held) - prompt * len(calls)
        return Lengths(max(lengths), sum(lengths), 1 + prompt + headers + sum(lengths))
    peak = 1 + max(map(sum, zip(held, lengths, strict=True)))
    if isinstance(dialect, PromiseDialect | ThoughtDialect):
        return Lengths(None, sum(lengths), peak)
    return Lengths(_longest_chain(dialect, iter(zip(calls, lengths, strict=True))), sum(lengths), peak)


def _longest_chain(dialect: Dialect, calls: Iterator[tuple[Call, int]]) -> int:
    """Count the chain of the next thread, whose calls it takes, with those of all threads below it."""
    chain, spawned = 0, []
    for call, length in calls:
        chain += length
        if not (isinstance(dialect, SpawnDialect) and dialect.is_spawn(call)):
            break
        spawn = dialect.read_spawn(call.context + call.completion)
        assert isinstance(spawn, SpawnCall), "demonstrations are well-formed"
        spawned.append(len(spawn.contexts))
    return chain + sum(max((_longest_chain(dialect, calls) for _ in range(count)), default=0) for count in spawned)
