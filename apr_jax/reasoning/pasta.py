"""PASTA: asynchronous decoding. A parent hands parts of its work to children, goes on, and waits only when it says so.

Jin et al., "Learning to Keep a Promise", arXiv 2502.11517, sections 3 and 4. A spawn starts children and stays in the
parent's text, and the parent decodes on while they run. At its sync marker it waits for all children that are still
out, and their full text, prompt and all, is appended to its context (Countdown's: `tasks/countdown/pasta.py`).

What differs. The paper's children continue the parent's own context and their keys and values are taken over as they
are, at positions that were set aside for them. Here a child sees its own prompt alone, so its keys and values belong to
another context and to other positions: the tokens that it wrote (not their text tokenised anew) are appended and
encoded by prefill, which the engine's meter counts as prefilled tokens. The paper's tags state a topic and a promised
length; here a spawn line names the node to search, and no length is promised.

Clock: tokens that the parent writes while children run cost no extra time; a sync sets its clock to the latest of its
own and theirs. A parent that ends with children still out is charged until they have ended.
"""

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

from apr_jax.data.tokenizer import Tokenizer
from apr_jax.engine.threads import Append, Join, Open, Spawn, SpawnHandle
from apr_jax.reasoning.adaptive import read_spawn, spawn_stops, thread_grammar
from apr_jax.reasoning.base import Method, Outcome, Settings, Tally, Transcript, read_end, truncated_reason
from apr_jax.tasks.dialect import ChildResult, Ending, Malformed, PromiseDialect, SpawnCall


class _Child(NamedTuple):
    """A child's result, its prompt, what it wrote (whole lines), and why it has no result ("": it has)."""

    result: ChildResult
    context: str
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
    prompt = dialect.prompt(problem, settings.budget)
    thread = yield Open(tokenizer.encode_prompt(prompt))
    page = Transcript(tokenizer, thread, prompt)
    ending: Ending | None = None
    while ending is None:
        spawns, children = family.tally.num_spawns, family.tally.num_children
        limits = (settings, 0, spawns, settings.max_total_children - children)
        stop = yield stops.decode(thread, thread_grammar(*limits))
        text, mark = page.text(stop.excess), stops.mark(stop)
        if not mark:
            ending = read_end(dialect, page, stop)
        elif mark != dialect.wait:
            call = read_spawn(dialect, text, *limits, last_begin=True)
            if isinstance(call, Malformed):
                ending = Ending(None, "malformed", call.reason)
            else:
                yield from family.spawn(call)
        elif family.promises:
            yield from page.cut_excess(stop)
            yield Append(thread, (yield from family.join(thread.tokens)))
        else:
            ending = Ending(None, "malformed", "nothing_to_wait_for")
    yield from family.join(thread.tokens)
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

    def join(self, before: Sequence[int]) -> Generator[Any, Any, list[int]]:
        """Wait for all children that are out, and return their text as tokens, to stand after those of the parent."""
        tokens = list(before)
        while self.promises:
            call, handle = self.promises.pop(0)
            returned: list[_Child | None] = yield Join(handle, _succeeded if self._settings.cancel_on_success else None)
            self._add_text(tokens, call, returned)
        return tokens[len(before) :]

    def _add_text(self, tokens: list[int], call: SpawnCall, returned: Sequence[_Child | None]) -> None:
        dialect, encode = self._dialect, self._settings.tokenizer.encode_continuation
        tokens += encode(dialect.join_begin, tokens)
        for index, (name, child) in enumerate(zip(call.names, returned, strict=True)):
            result = ChildResult(name, None) if child is None else child.result
            tokens += encode(dialect.result_line(index, result, call.level), tokens)
            if child is not None:
                tokens += [*encode(child.context, tokens), *child.tokens]
                self.tally.returned(child.reason, result.path)
        tokens += encode(dialect.join_end, tokens)


def _search(dialect: PromiseDialect, context: str, name: str, settings: Settings) -> Generator[Any, Any, _Child]:
    tokenizer = settings.tokenizer
    stops = spawn_stops(dialect, tokenizer)
    thread = yield Open(tokenizer.encode_prompt(context))
    page = Transcript(tokenizer, thread, context)
    stop = yield stops.decode(thread, thread_grammar(settings, 1, 0, 0))
    mark = stops.mark(stop)
    result: ChildResult | Malformed = Malformed("too_deep" if mark == dialect.spawn_end else "wrote_join")
    if mark is None:
        result = Malformed(truncated_reason(stop))
    elif not mark:
        result = dialect.read_child(page.text(), name)
    tokens = _whole_lines(tokenizer, thread.tokens, page.start)
    if isinstance(result, Malformed):
        return _Child(ChildResult(name, None), context, tokens, result.reason)
    return _Child(result, context, tokens, "")


def _succeeded(child: _Child) -> bool:
    return child.result.path is not None


def _whole_lines(tokenizer: Tokenizer, tokens: Sequence[int], start: int) -> list[int]:
    """Return a thread's tokens from `start` on, without EOS, up to the last that ends a line."""
    kept = [token for token in tokens[start:] if token not in tokenizer.eos_ids]
    pieces = tokenizer.token_bytes(kept, tokens[:start])
    return kept[: max((index + 1 for index, piece in enumerate(pieces) if piece.endswith(b"\n")), default=0)]
