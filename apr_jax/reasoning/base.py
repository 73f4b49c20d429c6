"""A way of reasoning (`Method`), the settings that its program is told, and the `Outcome` that it hands back."""

import bisect
import dataclasses
import itertools
import re
from collections.abc import Callable, Generator, Mapping
from typing import Any, Literal

from apr_jax.config import TreeOfThoughtsConfig
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.engine.stop_strings import StopStrings
from apr_jax.engine.threads import Append, Decode, Stop, StopReason, Thread, Truncate
from apr_jax.reasoning.spawn_grammar import SpawnGrammar, ThreadGrammar
from apr_jax.tasks.base import Task
from apr_jax.tasks.dialect import Dialect, Ending, Status, ThreadDialect

_ESCAPE = "surrogateescape"  # keeps each byte that is no UTF-8 as one character, of these:
_BROKEN = re.compile("[\udc80-\udcff]")
_TRUNCATED = {StopReason.LENGTH: "context_full", StopReason.MAX_STEPS: "max_steps", StopReason.BUDGET: "rollout_tokens"}


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


@dataclasses.dataclass(frozen=True)
class Stops:
    """EOS and the marks at which a thread stops: tokens where the tokenizer has them, else stop strings."""

    tokens: tuple[int, ...]  # EOS first
    strings: StopStrings | None
    _marks: Mapping[int, str]  # of tokens

    def decode(self, thread: Thread, grammar: ThreadGrammar | None = None) -> Decode:
        """Return the request to decode until EOS, a mark or a limit."""
        return Decode(thread, self.tokens, grammar, stop_strings=self.strings)

    def mark(self, stop: Stop) -> str | None:
        """Return the mark at which a Decode stopped, "" for EOS, or None for a limit."""
        return stop.string if stop.token is None else self._marks.get(stop.token, "")


def stops_at(tokenizer: Tokenizer, *marks: str) -> Stops:
    """Return the stops at EOS and at marks."""
    ids = {mark: tokenizer.mark_id(mark) for mark in marks}
    strings = tuple(mark for mark, index in ids.items() if index is None)
    of_token = {index: mark for mark, index in ids.items() if index is not None}
    watched = StopStrings(strings, tokenizer.token_bytes) if strings else None
    return Stops((*tokenizer.eos_ids, *of_token), watched, of_token)


class Transcript:
    """A thread as the text that a dialect reads: its prompt as that was given, and what stands after it.

    The tokens of the prompt may say more, as a chat template or the parent of a fork do.
    """

    def __init__(self, tokenizer: Tokenizer, thread: Thread, prompt: str) -> None:
        """Begin with a thread that holds its prompt and nothing after."""
        self.tokenizer, self.thread, self.prompt = tokenizer, thread, prompt
        self.start = len(thread.tokens)  # of what stands after the prompt

    def text(self, excess: int = 0) -> str:
        """Return the text, prompt and all, less the last `excess` bytes. BOS and EOS have none."""
        written = b"".join(self._pieces())
        return self.prompt + _readable(written[: len(written) - excess])

    def cut(self, offset: int) -> tuple[int, str] | None:
        """Find where to truncate the thread so that its text is kept up to the character `offset`.

        Returns the number of tokens that lie before the offset, whole characters all (at 0: its BOS tokens), and the
        text from there to the offset: "" where a token begins there. Text that is no UTF-8 cannot be given as text, and
        a prompt whose tokens say more cannot be cut: None.
        """
        first, begin, pieces = self.start, len(self.prompt), self._pieces()
        if offset < begin:
            if self.tokenizer.decode(self.thread.tokens[: self.start]) != self.prompt:
                return None
            first, begin, pieces = 0, 0, self.tokenizer.token_bytes(self.thread.tokens[: self.start])
        written = b"".join(pieces)
        place = len(written.decode(errors=_ESCAPE)[: offset - begin].encode(errors=_ESCAPE))
        starts = [0, *itertools.accumulate(map(len, pieces))]  # of each token, and the end of the last
        if offset == 0:
            return bisect.bisect_right(starts, 0) - 1, ""
        kept = bisect.bisect_left(starts, place)
        while kept and (starts[kept] > place or (starts[kept] < place and written[starts[kept]] & 0xC0 == 0x80)):
            kept -= 1  # the character or the token has begun before
        between = written[starts[kept] : place].decode(errors=_ESCAPE)
        return None if _BROKEN.search(between) else (first + kept, between)

    def replace(self, offset: int, text: str) -> Generator[Any, Any, bool]:
        """Let the thread's text go on with `text` from the character `offset` on.

        False: the tokenizer cannot write that, and the thread stays as it is.
        """
        kept = self.cut(offset)
        if kept is None:
            return False
        try:
            tokens = self.tokenizer.encode_continuation(kept[1] + text, self.thread.tokens[: kept[0]])
        except ValueError:
            return False
        yield Truncate(self.thread, kept[0])
        yield Append(self.thread, tokens)
        return True

    def cut_excess(self, stop: Stop) -> Generator[Any, Any, None]:
        """Let the thread end with the stop string that its last token completes, and keep what that held before it."""
        if stop.excess:
            yield from self.replace(len(self.text(stop.excess)), "")

    def _pieces(self) -> list[bytes]:
        tokens, start = self.thread.tokens, self.start
        return self.tokenizer.token_bytes(tokens[start:], tokens[:start])


def _readable(written: bytes) -> str:
    """Return the text of UTF-8, with U+FFFD for each byte that is none."""
    return _BROKEN.sub("\ufffd", written.decode(errors=_ESCAPE))


def read_end(dialect: ThreadDialect, page: Transcript, stop: Stop) -> Ending:
    """Return the ending of a thread that a stop token ended, as the dialect reads it, or that was cut off.

    A dialect may read an answer out of what was cut off, too.
    """
    if stop.reason is StopReason.TOKEN:
        return dialect.read_ending(page.text())
    ending = dialect.read_ending(page.text()) if dialect.reads_cut_off else None
    return ending if ending and ending.answer is not None else Ending(None, "truncated", truncated_reason(stop))


def truncated_reason(stop: Stop) -> str:
    """Return why a decode ended at a limit. Raises KeyError where another reason ended it."""
    return _TRUNCATED[stop.reason]
