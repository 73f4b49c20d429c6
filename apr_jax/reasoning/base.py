"""A way of reasoning (`Method`), the settings that its program is told, and the `Outcome` that it hands back."""

import dataclasses
from collections.abc import Callable, Generator
from typing import Any, Literal

from apr_jax.config import TreeOfThoughtsConfig
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.engine.threads import Stop, StopReason, Thread
from apr_jax.reasoning.spawn_grammar import SpawnGrammar
from apr_jax.tasks.base import Task
from apr_jax.tasks.dialect import Dialect, Ending, Status, ThreadDialect

_TRUNCATED = {
    StopReason.LENGTH: "context_full",
    StopReason.MAX_STEPS: "max_steps",
    StopReason.BUDGET: "rollout_tokens",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A program's limits, its task, and the tokenizer that turns its text into tokens."""

    task: Task
    tokenizer: Tokenizer
    max_children: int  # children one spawn may open
    max_spawns: int  # spawns one thread may make
    max_depth: int  # levels of threads below the root
    max_total_children: int  # children in a rollout's whole tree of threads
    cancel_on_success: bool  # the first child that hands back a path ends its siblings
    spawn_grammar: SpawnGrammar | None  # what spawns are held to; None: the model writes what it will
    tree_of_thoughts: TreeOfThoughtsConfig
    context_window: int | None  # tokens that a thread of adaptive may hold, and is told of; None: model.max_seq_len
    max_tokens: int | None  # tokens that any thread of any program may hold or see, untold; None: model.max_seq_len
    budget: int | None  # written into the prompt: sub calls (adaptive) or tokens (serial); None = not conditioned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One of several independent answers to a problem (`reasoning/sampling.py`)."""

    answer: str | None
    status: Status
    reason: str
    mean_logprob: float | None  # over the tokens that its root thread generated; None: it generated none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The ending of one rollout. Its answer is the model's claim; `Task.verify` judges it."""

    answer: str | None
    status: Status  # of the root thread
    reason: str  # "" when answered; otherwise a snake_case reason that can be counted
    num_spawns: int = 0  # in the whole tree of threads, cancelled children's own spawns left out
    num_children: int = 0  # the same
    child_reasons: tuple[str, ...] = ()  # of the children that were malformed or truncated, in spawn order
    child_paths: tuple[str, ...] = ()  # what children handed back, in spawn order
    dropped_lines: tuple[str, ...] = ()  # why lines of model text were dropped, one reason a line
    samples: tuple[Sample, ...] = ()  # of which this is one; (): it was not chosen among several


@dataclasses.dataclass
class Tally:
    """The counts of an `Outcome`, while its rollout goes on."""

    num_spawns: int = 0
    num_children: int = 0
    child_reasons: list[str] = dataclasses.field(default_factory=list)
    child_paths: list[str] = dataclasses.field(default_factory=list)
    dropped_lines: list[str] = dataclasses.field(default_factory=list)

    def spawned(self, children: int) -> None:
        """Count a spawn of so many children."""
        self.num_spawns += 1
        self.num_children += children

    def returned(self, reason: str | None, path: str | None) -> None:
        """Note why a child ended badly, if it did, and what it handed back, if anything."""
        self.child_reasons += [reason] if reason else []
        self.child_paths += [path] if path else []

    def add(self, other: "Tally | Outcome") -> None:
        """Add the counts of another tree of threads."""
        self.num_spawns += other.num_spawns
        self.num_children += other.num_children
        self.child_reasons += other.child_reasons
        self.child_paths += other.child_paths
        self.dropped_lines += other.dropped_lines

    def outcome(self, ending: Ending, samples: tuple[Sample, ...] = ()) -> Outcome:
        """Return the outcome of a rollout whose root ended so."""
        return Outcome(
            **ending._asdict(),
            num_spawns=self.num_spawns,
            num_children=self.num_children,
            child_reasons=tuple(self.child_reasons),
            child_paths=tuple(self.child_paths),
            dropped_lines=tuple(self.dropped_lines),
            samples=samples,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A way of reasoning: a program over threads, and its facts."""

    name: str
    program: Callable[[Any, Settings], Generator[Any, Any, Outcome]]
    dialect: str  # by the name of the method that it was made for: what the program's threads write
    kind: type[Dialect]  # what the program asks of the dialect
    budget: Literal["children", "tokens"] | None  # what its prompts may name; None: nothing
    shares_cache: bool = False  # threads are workers that see each other's tokens
    root_writes: bool = True  # so that a sample has a likelihood


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return BOS and the prompt. Raises ValueError where the tokenizer cannot spell the prompt."""
    return [tokenizer.bos_id, *tokenizer.encode(prompt)]


def mark_id(tokenizer: Tokenizer, mark: str) -> int:
    """Return the token that a mark of a dialect is. Raises ValueError where it is several."""
    ids = tokenizer.encode(mark)
    if len(ids) != 1:
        raise ValueError(f"threads stop at {mark!r}: add it to the tokenizer as one token")
    return ids[0]


def thread_text(tokenizer: Tokenizer, thread: Thread) -> str:
    """Return the thread's whole text, prompt and all (BOS and EOS have none)."""
    return tokenizer.decode(thread.tokens)


def token_index(tokenizer: Tokenizer, thread: Thread, offset: int) -> int | None:
    """Return the index in `thread.tokens` at which the text's character `offset` > 0 begins; None: inside a token."""
    begin = 0
    for index, piece in enumerate(tokenizer.token_texts(thread.tokens)):
        if begin >= offset:
            return index if begin == offset else None
        begin += len(piece)
    return None


def read_end(dialect: ThreadDialect, tokenizer: Tokenizer, thread: Thread, stop: Stop) -> Ending:
    """Return the ending of a thread that a stop token ended, as the dialect reads it, or that was cut off."""
    if stop.reason is not StopReason.TOKEN:
        return Ending(None, "truncated", truncated_reason(stop))
    return dialect.read_ending(thread_text(tokenizer, thread))


def truncated_reason(stop: Stop) -> str:
    """Return why a decode ended before a stop token. Raises KeyError where a stop token did end it."""
    return _TRUNCATED[stop.reason]
