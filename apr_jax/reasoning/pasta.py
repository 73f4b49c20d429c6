"""PASTA: asynchronous decoding. A parent hands parts of its work to children, goes on, and waits only when it says so.

Jin et al., "Learning to Keep a Promise", arXiv 2502.11517, sections 3 and 4. A spawn starts children and stays in the
parent's text, and the parent decodes on while they run. At its sync marker it waits for all children that are still
out, and their full text, prompt and all, is appended to its context (Countdown's: `tasks/countdown/pasta.py`).

What differs. The paper's children continue the parent's own context and their keys and values are taken over as they
are, at positions that were set aside for them. Here a child sees its own prompt alone, so its keys and values belong to
another context and to other positions: its tokens (not its text tokenised anew) are appended and encoded by prefill,
which the engine's meter counts as prefilled tokens. The paper's tags state a topic and a promised length; here a spawn
line names the node to search, and no length is promised.

Clock: tokens that the parent writes while children run cost no extra time; a sync sets its clock to the latest of its
own and theirs. A parent that ends with children still out is charged until they have ended.
"""

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

from apr_jax.data.tokenizer import Tokenizer
from apr_jax.engine.threads import Append, Join, Open, Spawn, SpawnHandle, Truncate
from apr_jax.reasoning.adaptive import read_spawn, spawn_stops, thread_grammar
from apr_jax.reasoning.base import (
    Method,
    Outcome,
    Settings,
    Tally,
    cut,
    prompt_tokens,
    read_end,
    thread_text,
    truncated_reason,
)
from apr_jax.tasks.dialect import ChildResult, Ending, Malformed, PromiseDialect, SpawnCall


class _Child(NamedTuple):
    """A child's result, its text as tokens (whole lines), and why it has no result ("": it has)."""

    result: ChildResult
    tokens: list[int]
    reason: str


class _Promise(NamedTuple):
    """A spawn whose children the parent has not waited for."""

    call: SpawnCall
    handle: SpawnHandle


def pasta(problem: Any, settings: Settings) -> Generator[Any, Any, Outcome]:
    """Run PASTA on one problem. Malformed and cut-off threads are outcomes with a reason, never exceptions.

    Besides the dialect's reasons and adaptive's caps there is nothing_to_wait_for: a parent waits although no child is
    running. With `cancel_on_success` a child that is cancelled has no text.
    """
    tokenizer, dialect = settings.tokenizer, settings.task.dialect("pasta", PromiseDialect)
    stops = spawn_stops(dialect, tokenizer, dialect.wait)
    family = _Family(dialect, settings)
    thread = yield Open(prompt_tokens(tokenizer, dialect.prompt(problem, settings.budget)))
    ending: Ending | None = None
    while ending is None:
        spawns, children = family.tally.num_spawns, family.tally.num_children
        limits = (settings, 0, spawns, settings.max_total_children - children)
        stop = yield stops.decode(thread, thread_grammar(*limits))
        text, mark = thread_text(tokenizer, thread, stop.excess), stops.mark(stop)
        if not mark:
            ending = read_end(dialect, tokenizer, thread, stop)
        elif mark != dialect.wait:
            call = read_spawn(dialect, text, *limits, last_begin=True)
            if isinstance(call, Malformed):
                ending = Ending(None, "malformed", call.reason)
            else:
                yield from family.spawn(call)
        elif family.promises:
            joined = yield from family.join()
            if stop.excess:  # the join stands directly after the mark
                kept, between = cut(tokenizer, thread, len(text)) or (len(thread.tokens), "")
                yield Truncate(thread, kept)
                joined = [*tokenizer.encode_continuation(between, thread.tokens), *joined]
            yield Append(thread, joined)
        else:
            ending = Ending(None, "malformed", "nothing_to_wait_for")
    yield from family.join()
    return family.tally.outcome(ending)


PASTA = Method(name="pasta", program=pasta, dialect="pasta", kind=PromiseDialect, budget="children")


class _Family:
    """A parent's children: those that are out, and the counts of all."""

    def __init__(self, dialect: PromiseDialect, settings: Settings) -> None:
        self._dialect, self._settings = dialect, settings
        self.promises: list[_Promise] = []
        self.tally = Tally()

    def spawn(self, call: SpawnCall) -> Generator[Any, Any, None]:
        """Start the children of a spawn."""
        named = zip(call.contexts, call.names, strict=True)
        handle = yield Spawn([_search(self._dialect, context, name, self._settings) for context, name in named])
        self.promises.append(_Promise(call, handle))
        self.tally.spawned(len(call.contexts))

    def join(self) -> Generator[Any, Any, list[int]]:
        """Wait for all children that are out, and return their text as tokens."""
        tokens: list[int] = []
        while self.promises:
            call, handle = self.promises.pop(0)
            returned: list[_Child | None] = yield Join(handle, _succeeded if self._settings.cancel_on_success else None)
            tokens += self._text(call, returned)
        return tokens

    def _text(self, call: SpawnCall, returned: Sequence[_Child | None]) -> list[int]:
        dialect, encode = self._dialect, self._settings.tokenizer.encode
        tokens = encode(dialect.join_begin)
        for index, (name, child) in enumerate(zip(call.names, returned, strict=True)):
            result = ChildResult(name, None) if child is None else child.result
            tokens += encode(dialect.result_line(index, result, call.level))
            if child is not None:
                tokens += child.tokens
                self.tally.returned(child.reason, result.path)
        return tokens + encode(dialect.join_end)


def _search(dialect: PromiseDialect, context: str, name: str, settings: Settings) -> Generator[Any, Any, _Child]:
    tokenizer = settings.tokenizer
    stops = spawn_stops(dialect, tokenizer)
    thread = yield Open(prompt_tokens(tokenizer, context))
    stop = yield stops.decode(thread, thread_grammar(settings, 1, 0, 0))
    mark = stops.mark(stop)
    result: ChildResult | Malformed = Malformed("too_deep" if mark == dialect.spawn_end else "wrote_join")
    if mark is None:
        result = Malformed(truncated_reason(stop))
    elif not mark:
        result = dialect.read_child(thread_text(tokenizer, thread), name)
    tokens = _whole_lines(tokenizer, thread.tokens)
    if isinstance(result, Malformed):
        return _Child(ChildResult(name, None), tokens, result.reason)
    return _Child(result, tokens, "")


def _succeeded(child: _Child) -> bool:
    return child.result.path is not None


def _whole_lines(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
    """Return a thread's tokens without BOS and EOS, up to the last that ends a line."""
    kept = [token for token in tokens if token not in (tokenizer.bos_id, *tokenizer.eos_ids)]
    texts = tokenizer.token_texts(kept)
    return kept[: max((index + 1 for index, text in enumerate(texts) if text.endswith("\n")), default=0)]
