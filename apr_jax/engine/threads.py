"""Threads, the requests of programs, and the rollouts that they leave behind. No JAX.

A *program* is a generator that yields the requests below and is resumed with their results. It owns one thread, a
sequence of tokens with pages of KV cache. Children that it spawns are programs of their own.
"""

import dataclasses
import enum
import hashlib
import sys
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from apr_jax.engine.constraints import Constraint, Grammar, Masks
from apr_jax.engine.stop_strings import StopStrings, StringWatch
from apr_jax.engine.work_counters import Work

if TYPE_CHECKING:
    from apr_jax.engine.groups import Group

MAX_STOP_TOKENS = 8

Path = tuple[int, ...]


class StopReason(enum.Enum):
    """The reason why a Decode ended."""

    TOKEN = "token"  # it wrote one of its stop tokens
    STRING = "string"  # its text has one of its stop strings
    LENGTH = "length"  # the thread is full: model.max_seq_len tokens, or what its Open allows
    MAX_STEPS = "max_steps"  # the thread has generated rollout.max_steps tokens in its life
    BUDGET = "budget"  # its share of rollout.max_total_tokens (see Spawn), or its Decode's own limit, is used up
    CANCELLED = "cancelled"  # a sibling succeeded first


@dataclasses.dataclass(frozen=True)
class Stop:
    """The end of a Decode. The stop token, or the token that completes the stop string, stays in the thread."""

    reason: StopReason
    token: int | None  # the stop token; None: another reason
    string: str | None = None  # the stop string; None: another reason
    excess: int = 0  # bytes of the thread's last token that stand after the stop string


class Status(enum.Enum):
    """A thread's state. In all but RUNNING and DONE its pages may have been taken (`Cached.table` is None)."""

    IDLE = "idle"  # its program has asked for nothing yet, or is about to
    READY = "ready"  # wants to decode, has no lane
    RUNNING = "running"  # has a lane and the pages of its next chunk
    WAITING_ON_CHILDREN = "waiting_on_children"
    DONE = "done"


@dataclasses.dataclass(slots=True)
class Turn:
    """A thread's place in the schedule. The scheduler alone writes it."""

    status: Status = Status.IDLE
    lane: int = 0  # while running


@dataclasses.dataclass(slots=True)
class Cached:
    """A thread's part of the cache. The `ThreadCache` alone writes it."""

    shard: int = 0
    table: int | None = None  # handle of its page table in the shard's allocator; None: no pages
    computed: int = 0  # leading tokens whose keys and values are in the pages; < len(tokens)
    # Keys of its leading pages that were computed by prefill alone, a whole page at a time: they may be shared.
    block_keys: list[bytes] = dataclasses.field(default_factory=list)
    work: Work = dataclasses.field(default_factory=Work)  # in its life


@dataclasses.dataclass(eq=False, slots=True)
class Thread:
    """One sequence of tokens. Programs read `path`, `tokens`, `generated` and `logprob`.

    What is not in `turn` or `cached` the driver alone writes.
    """

    path: Path  # () for the root; a child's is its parent's + (spawn ordinal, child ordinal)
    tokens: list[int]  # the whole context now
    rollout: int  # ordinal of its rollout in the run
    key: tuple[int, int]  # counter-based random key (two uint32), see thread_key
    max_length: int = sys.maxsize  # tokens that it may hold
    group: "Group | None" = None  # the workers whose cache it shares
    generated: int = 0  # tokens decoded in its life, truncated ones included
    rejected: int = 0  # draws in its life that its grammar refused; like `generated` they count as random numbers used
    logprob: float = 0.0  # the sum of their log-probabilities under the sampling policy, of Decodes that have ended
    # What its Decode asks for.
    stop_tokens: tuple[int, ...] = ()
    max_generated: int = 0  # what `generated` may reach
    constraint: Constraint | None = None
    watch: StringWatch | None = None
    turn: Turn = dataclasses.field(default_factory=Turn)
    cached: Cached = dataclasses.field(default_factory=Cached)

    @property
    def priority(self) -> tuple[int, int, Path]:
        """Smaller goes first: earlier rollouts, then deeper threads (children let parents finish), then path order."""
        return (self.rollout, -len(self.path), self.path)


@dataclasses.dataclass(frozen=True)
class Open:
    """A request to open the program's thread: `tokens`, after those of `fork_of` if given, whose full pages it shares.

    A fork of an untouched thread shares what a Prefill of that has computed, a copy of its partial last page included.
    `max_length` is how many tokens the thread may hold, where that is less than model.max_seq_len: its Decodes stop
    there with LENGTH. Resumed with the Thread. Raises ValueError (in the engine) for a second Open or an empty thread.
    """

    tokens: Sequence[int]
    fork_of: Thread | None = None
    max_length: int | None = None


@dataclasses.dataclass(frozen=True)
class Prefill:
    """A request to compute all tokens of the thread but the last, so that forks may share them. Resumed with None.

    A Decode does so by itself. A thread that is full is left as it is: nothing can be decoded after it.
    """

    thread: Thread


@dataclasses.dataclass(frozen=True)
class Decode:
    """A request to decode until one of `stop_tokens` (at most MAX_STOP_TOKENS), a stop string or a limit.

    Resumed with a Stop. `stop_strings` are looked for after each visit, and what was drawn after one is trimmed
    (`engine/stop_strings.py`). They go neither with a grammar nor with workers on a shared cache (ValueError).

    A thread that is already full, out of steps or out of its rollout's tokens stops at once, and no Call is recorded.
    With a `grammar`, which takes an engine with a gate (else ValueError), the thread writes only what that allows
    (`engine/constraints.py`).
    """

    thread: Thread
    stop_tokens: tuple[int, ...]
    grammar: Grammar | None = None
    max_tokens: int | None = None  # that this Decode may generate; it then stops with BUDGET
    stop_strings: StopStrings | None = None


@dataclasses.dataclass(frozen=True)
class Truncate:
    """A request to keep the first `length` tokens (1 <= length <= now) and free what follows. Resumed with None."""

    thread: Thread
    length: int


@dataclasses.dataclass(frozen=True)
class Append:
    """A request to append tokens, computed at the next Decode. A thread that is then too long stops there (LENGTH)."""

    thread: Thread
    tokens: Sequence[int]


Program = Generator[Any, Any, Any]


@dataclasses.dataclass(frozen=True)
class Spawn:
    """A request to start child programs beside their parent. Resumed with a SpawnHandle, to be joined.

    What the parent has left of its rollout's tokens is split equally: each of n children gets one part in n + 1, the
    parent keeps the rest and takes back at the join what the children did not use. So no rollout generates more than
    rollout.max_total_tokens, and how much a thread may write depends on its causal past alone, not on a schedule.
    """

    programs: Sequence[Program]


@dataclasses.dataclass(frozen=True)
class Share:
    """A request to start workers that decode in lockstep and see each other's tokens as they come (`engine/groups.py`).

    Resumed with a SpawnHandle, to be joined as a Spawn's; the rollout's tokens are shared out alike. A worker's Open
    gives its own header, at least one token, which is put after `prompt`; after it comes one Decode without a grammar,
    and no other request. Raises ValueError (in the engine) for anything else, an empty prompt, or more workers than the
    engine was made for; ConfigError where a group could never have enough pages.
    """

    prompt: Sequence[int]
    programs: Sequence[Program]


@dataclasses.dataclass(frozen=True)
class SpawnHandle:
    """The `ordinal`-th Spawn or Share of a program."""

    ordinal: int
    num_children: int


@dataclasses.dataclass(frozen=True)
class Join:
    """A request to wait for a spawn's children. Resumed with their return values, in spawn order.

    With `success`, the first child (on the clock of sequential tokens) whose value succeeds cancels its siblings:
    they keep what they wrote up to that clock and their value is None, unless they had ended by then. So what is
    cancelled doesn't depend on how threads were scheduled.
    """

    handle: SpawnHandle
    success: Callable[[Any], bool] | None = None


Request = Open | Prefill | Decode | Truncate | Append | Spawn | Share | Join


@dataclasses.dataclass(frozen=True)
class RolloutKey:
    """A sample of a problem. With the seed it determines every random draw of the rollout."""

    problem: int
    sample: int


@dataclasses.dataclass(frozen=True)
class Call:
    """The tokens that one Decode wrote, and all that is known of them."""

    path: Path
    context: np.ndarray  # int32, all tokens before it
    tokens: np.ndarray  # int32, generated, the stop token included
    logprobs: np.ndarray  # float32, under the sampling policy (temperature, banned tokens and grammar applied)
    stop: Stop
    clock_start: int  # sequential tokens before it
    start_ms: float  # since the rollout's first request
    end_ms: float
    first_token_ms: float = 0.0  # when the first of its tokens were known
    kept: np.ndarray | None = (
        None  # int32, the tokens that a truncated policy left to draw each from; None: it is whole
    )
    masks: Masks | None = None  # what its grammar allowed; None: it had none
    group_prompt: int = 0  # of a worker on a shared cache: the first tokens of its context, which all workers have


@dataclasses.dataclass(frozen=True)
class Rollout:
    """The work of one root program and all below it.

    Calls, and the counts that are made of them, depend on the rollout's key and program alone; `work` and `latency_ms`
    also on how it was scheduled.
    """

    key: RolloutKey
    result: Any  # the root program's return value
    calls: tuple[Call, ...]  # by path, then time; a cancelled thread's end at its cutoff
    sequential_tokens: int  # the longest causal chain (paper section 5)
    latency_ms: float
    work: Work  # of all its threads

    @property
    def generated_tokens(self) -> int:
        """The tokens that all threads wrote, each once."""
        return sum(len(call.tokens) for call in self.calls)

    @property
    def peak_context(self) -> int:
        """The most tokens that one thread held while it decoded: its context and what it wrote, to the last token.

        Workers on a shared cache count as one thread that holds what all of them do. Never more than
        model.max_seq_len, or the `max_length` of a thread's Open. 0 if nothing was decoded.
        """
        groups: dict[Path, int] = {}
        for call in self.calls:
            if call.group_prompt:
                own = len(call.context) - call.group_prompt + len(call.tokens)
                groups[call.path[:-1]] = groups.get(call.path[:-1], call.group_prompt) + own
        alone = (len(call.context) + len(call.tokens) for call in self.calls)
        return max((*alone, *groups.values()), default=0)

    @property
    def num_threads(self) -> int:
        """The threads that wrote at least one token."""
        return len({call.path for call in self.calls})


class Happening(enum.Enum):
    """An event in a thread's life that an observer is told of."""

    OPENED = "opened"
    WROTE = "wrote"  # the device decoded tokens for it
    WAITS = "waits"  # for its children
    RESUMED = "resumed"  # its children have ended
    ENDED = "ended"  # its program returned
    CANCELLED = "cancelled"  # a sibling succeeded first


# An observer of a run: told what happens to which rollout's thread, on the host, between two visits. The thread is the
# engine's own, to be read (`path`, `tokens`, `generated`) and never changed.
Observer = Callable[[RolloutKey, Thread, Happening], None]


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of a run."""

    finished: int  # rollouts
    total: int
    generated_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """The rate since the run began; 0 before any time has passed."""
        return self.generated_tokens / self.seconds if self.seconds > 0 else 0.0


def thread_key(seed: int, rollout: RolloutKey, path: Path) -> tuple[int, int]:
    """Return the key data (two uint32) of one thread: a BLAKE2b hash of what it is, equal on every machine."""
    digest = hashlib.blake2b(repr((seed, rollout.problem, rollout.sample, path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
