"""Adaptive Parallel Reasoning: a thread that may split its search into children that run at the same time.

Pan et al., arXiv 2504.15466, section 3. A thread decodes until it ends or writes a spawn. The spawn's contexts open
child threads, each a program of its own; their results are joined, and the joined text replaces the spawn text in the
parent. Children begin from their context alone or, where the dialect says so, from a fork of their parent.
"""

import dataclasses
from collections.abc import Generator
from typing import Any

from apr_jax.data.tokenizer import Tokenizer
from apr_jax.engine.stop_strings import StopStrings
from apr_jax.engine.threads import Join, Open, Spawn, Thread
from apr_jax.reasoning.base import Method, Outcome, Settings, Stops, Tally, Transcript, read_end, stops_at
from apr_jax.reasoning.spawn_grammar import ThreadGrammar
from apr_jax.tasks.dialect import ChildResult, Ending, Malformed, SpawnCall, SpawnDialect


@dataclasses.dataclass
class _Search:
    """One thread's search, with the counts of the tree below it."""

    text: str = ""  # from its own prompt on
    failure: Ending | None = None  # "malformed" or "truncated"
    tally: Tally = dataclasses.field(default_factory=Tally)


@dataclasses.dataclass(frozen=True)
class _Child:
    """The value that a child program returns to its parent."""

    result: ChildResult
    reason: str | None  # why the result says "no solution" where the child's search did not end well
    tally: Tally


def adaptive(problem: Any, settings: Settings) -> Generator[Any, Any, Outcome]:
    """Run APR on one problem. Malformed and cut-off threads are outcomes with a reason, never exceptions."""
    dialect = settings.task.dialect("adaptive", SpawnDialect)
    prompt = dialect.prompt(problem, settings.budget, settings.context_window)
    search = yield from _search(dialect, prompt, None, settings, 0, settings.max_total_children)
    return search.tally.outcome(search.failure or dialect.read_ending(search.text))


def adaptive_text(dialect: SpawnDialect, prompt: str, settings: Settings) -> Generator[Any, Any, tuple[str, str]]:
    """Run APR on any prompt. Return the text of its thread, prompt and all, and why it did not end well, or ""."""
    search = yield from _search(dialect, prompt, None, settings, 0, settings.max_total_children)
    return search.text, "" if search.failure is None else search.failure.reason


ADAPTIVE = Method(name="adaptive", program=adaptive, dialect="adaptive", kind=SpawnDialect, budget="children")


def _child(
    dialect: SpawnDialect, name: str, context: str, parent: Thread, settings: Settings, depth: int, allowance: int
) -> Generator[Any, Any, _Child]:
    prompt = dialect.child_prompt(context, settings.context_window)
    fork_of = parent if dialect.children == "fork" else None
    search = yield from _search(dialect, prompt, fork_of, settings, depth, allowance)
    failure = search.failure
    result = dialect.read_child(search.text, name) if failure is None else Malformed(failure.reason)
    if isinstance(result, Malformed):
        return _Child(ChildResult(name, None), result.reason, search.tally)
    written = dataclasses.replace(result, text=search.text[len(prompt) :])
    return _Child(written, None, search.tally)


def _search(
    dialect: SpawnDialect, prompt: str, fork_of: Thread | None, settings: Settings, depth: int, allowance: int
) -> Generator[Any, Any, _Search]:
    """Decode one thread to its end; spawns on the way are run and joined.

    `allowance` caps the children in the tree below the thread. What a spawn leaves of it is split as the engine splits
    tokens: one part in n + 1 to each of n children that may spawn themselves, and what they did not use comes back.
    """
    tokenizer, search = settings.tokenizer, _Search()
    stops = spawn_stops(dialect, tokenizer)
    given = _given(tokenizer, prompt, fork_of, is_own=depth == 0)
    if given is None:
        return _failed(search, "unwritable_task")
    thread = yield Open(given, fork_of=fork_of, max_length=settings.context_window)
    page, spawns = Transcript(tokenizer, thread, prompt), 0
    while True:
        stop = yield stops.decode(thread, thread_grammar(settings, depth, spawns, allowance))
        search.text = page.text(stop.excess)
        mark = stops.mark(stop)
        if mark is not None and mark in dialect.replaced:
            if (yield from page.replace(len(search.text) - len(mark), dialect.replaced[mark])):
                continue
            return _failed(search, "split_token")
        if not mark and not dialect.asks_for_children(search.text, depth):
            ending = read_end(dialect, page, stop)
            search.failure = ending if ending.status == "truncated" else None
            return search
        call = read_spawn(dialect, search.text, settings, depth, spawns, allowance)
        if isinstance(call, Malformed):
            return _failed(search, call.reason)
        if page.cut(call.start) is None:
            return _failed(search, "split_token")
        count, before = len(call.contexts), search.tally.num_children
        share = (allowance - count) // (count + 1) if depth + 1 < settings.max_depth else 0
        children = [
            _child(dialect, name, context, thread, settings, depth + 1, share)
            for name, context in zip(call.names, call.contexts, strict=True)
        ]
        if dialect.children == "fork":
            yield from page.cut_excess(stop)
        handle = yield Spawn(children)
        spawns += 1
        returned = yield Join(handle, _succeeded if settings.cancel_on_success else None)
        joined = dialect.render_join(_count(search.tally, call.names, returned), call.level)
        # What cancelled children opened is not known here: they count as if they had used their whole share.
        allowance -= search.tally.num_children - before + share * returned.count(None)
        if not (yield from page.replace(call.start, joined)):
            return _failed(search, "unwritable_join")


def _given(tokenizer: Tokenizer, prompt: str, fork_of: Thread | None, *, is_own: bool) -> list[int] | None:
    """Return the tokens that a thread is given, after those of `fork_of`; None where a model's text is no prompt.

    Raises ValueError where the task's own is none.
    """
    try:
        if fork_of is None:
            return tokenizer.encode_prompt(prompt)
        return tokenizer.encode_continuation(prompt, fork_of.tokens)
    except ValueError:
        if is_own:
            raise
        return None


def _failed(search: _Search, reason: str) -> _Search:
    search.failure = Ending(None, "malformed", reason)
    return search


def spawn_stops(dialect: SpawnDialect, tokenizer: Tokenizer, *marks: str) -> Stops:
    """Return where threads of a dialect stop: at EOS, at the end of a spawn, and at other `marks`.

    Where the dialect has text `replaced`, its spawns end with EOS, and threads stop at that text instead, however it is
    spelt. Elsewhere they stop at the beginning of a join, too, where that is no one token which could be banned: only
    the engine writes joins, and `read_spawn` gives such text a reason.
    """
    if dialect.replaced:
        return Stops(tokenizer.eos_ids, StopStrings(tuple(dialect.replaced), tokenizer.token_bytes), {})
    joins = () if tokenizer.mark_id(dialect.join_begin) is not None else (dialect.join_begin,)
    return stops_at(tokenizer, dialect.spawn_end, *marks, *joins)


def thread_grammar(settings: Settings, depth: int, spawns: int, allowance: int) -> ThreadGrammar | None:
    """Return the grammar of the thread's next spawn, with the same caps as `read_spawn`; None: it is free."""
    if settings.spawn_grammar is None:
        return None
    may_spawn = depth < settings.max_depth and spawns < settings.max_spawns
    most = min(settings.max_children, allowance) if may_spawn else 0
    return ThreadGrammar(settings.spawn_grammar, depth + 1, most)


def read_spawn(
    dialect: SpawnDialect,
    text: str,
    settings: Settings,
    depth: int,
    spawns: int,
    allowance: int,
    *,
    last_begin: bool = False,
) -> SpawnCall | Malformed:
    """Read the spawn that `text` ends in and hold it to the caps, each with a reason of its own.

    It begins at the dialect's first `spawn_begin`, or with `last_begin`, and where a grammar holds it, at the last.
    """
    if text.endswith(dialect.join_begin):
        return Malformed("wrote_join")
    # A grammar holds what follows the token `spawn_begin`, which an open vocabulary could also spell out before.
    call = dialect.read_spawn(text, last_begin=last_begin or settings.spawn_grammar is not None)
    if isinstance(call, Malformed):
        return call
    if depth >= settings.max_depth:
        return Malformed("too_deep")
    if spawns >= settings.max_spawns:
        return Malformed("too_many_spawns")
    if call.level not in (None, depth + 1):
        return Malformed("wrong_level")
    if len(call.contexts) > settings.max_children:
        return Malformed("too_many_children")
    if len(call.contexts) > allowance:
        return Malformed("rollout_children")
    return call


def _succeeded(child: _Child) -> bool:
    return child.result.path is not None


def _count(tally: Tally, names: tuple[str, ...], returned: list[_Child | None]) -> list[ChildResult]:
    """Add the children (None: cancelled) to the thread's counts and return what the join will say of each."""
    tally.spawned(len(returned))
    results = []
    for name, child in zip(names, returned, strict=True):
        if child is None:
            results.append(ChildResult(name, None))
            continue
        results.append(child.result)
        tally.add(child.tally)
        tally.returned(child.reason, child.result.path)
    return results
