"""Adaptive Parallel Reasoning: a thread that may split its search into children that run at the same time.

Pan et al., arXiv 2504.15466, section 3. A thread decodes until it ends or writes a spawn. The spawn's contexts open
child threads, each a program of its own; their results are joined, and the joined text replaces the spawn text in the
parent.
"""

import dataclasses
from collections.abc import Generator
from typing import Any

from apr_jax.engine.threads import Append, Decode, Join, Open, Spawn, StopReason, Truncate
from apr_jax.reasoning.outcome import (
    Outcome,
    Settings,
    Status,
    prompt_tokens,
    read_ending,
    thread_text,
    token_index,
    truncated_reason,
)
from apr_jax.reasoning.spawn_grammar import ThreadGrammar
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.rules import Problem


@dataclasses.dataclass
class _Search:
    """One thread's search, and what it counted in the tree below it."""

    text: str = ""
    failure: tuple[Status, str] | None = None  # "malformed" or "truncated", and the reason
    num_spawns: int = 0
    num_children: int = 0
    child_reasons: list[str] = dataclasses.field(default_factory=list)
    child_paths: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Child:
    """What a child program returns to its parent."""

    result: trace.ChildResult
    reason: str | None  # why the result says "no solution" where the child's search did not end well
    search: _Search


def adaptive(problem: Problem, settings: Settings) -> Generator[Any, Any, Outcome]:
    """APR on one problem. Malformed and cut-off threads are outcomes with a reason, never exceptions."""
    prompt = trace.parent_prompt(problem, settings.budget, settings.context_window)
    search = yield from _search(prompt, settings, 0, settings.max_total_children)
    answer, status, reason = (None, *search.failure) if search.failure else read_ending(search.text)
    return Outcome(
        answer=answer,
        status=status,
        reason=reason,
        num_spawns=search.num_spawns,
        num_children=search.num_children,
        child_reasons=tuple(search.child_reasons),
        child_paths=tuple(search.child_paths),
    )


def _child(context: str, node_id: str, settings: Settings, depth: int, allowance: int) -> Generator[Any, Any, _Child]:
    prompt = trace.in_window(context, settings.context_window)
    search = yield from _search(prompt, settings, depth, allowance)
    if search.failure is not None:
        return _Child(trace.ChildResult(node_id, None), search.failure[1], search)
    result = trace.read_child_result(search.text, node_id)
    if isinstance(result, trace.Malformed):
        return _Child(trace.ChildResult(node_id, None), result.reason, search)
    return _Child(result, None, search)


def _search(prompt: str, settings: Settings, depth: int, allowance: int) -> Generator[Any, Any, _Search]:
    """Decodes one thread to its end; spawns on the way are run and joined.

    `allowance` caps the children in the tree below the thread. What a spawn leaves of it is split as the engine splits
    tokens: one part in n + 1 to each of n children that may spawn themselves, and what they did not use comes back.
    """
    tokenizer, search = settings.tokenizer, _Search()
    stop_tokens = (tokenizer.call_end_id, tokenizer.eos_id)
    spawns = 0
    thread = yield Open(prompt_tokens(tokenizer, prompt), max_length=settings.context_window)
    while True:
        stop = yield Decode(thread, stop_tokens, thread_grammar(settings, depth, spawns, allowance))
        search.text = thread_text(tokenizer, thread)
        if stop.reason is not StopReason.TOKEN:
            search.failure = ("truncated", truncated_reason(stop))
            return search
        if stop.token == tokenizer.eos_id:
            return search
        call = read_spawn(search.text, settings, depth, spawns, allowance)
        spawn_begin = None if isinstance(call, trace.Malformed) else token_index(tokenizer, thread, call.start)
        if isinstance(call, trace.Malformed) or spawn_begin is None:
            search.failure = ("malformed", call.reason if isinstance(call, trace.Malformed) else "split_token")
            return search
        count, before = len(call.contexts), search.num_children
        share = (allowance - count) // (count + 1) if depth + 1 < settings.max_depth else 0
        children = [
            _child(context, node_id, settings, depth + 1, share)
            for context, node_id in zip(call.contexts, call.node_ids, strict=True)
        ]
        handle = yield Spawn(children)
        spawns += 1
        returned = yield Join(handle, _succeeded if settings.cancel_on_success else None)
        joined = trace.render_join(_count(search, call.node_ids, returned), level=call.level)
        # What cancelled children opened is not known here: they count as if they had used their whole share.
        allowance -= search.num_children - before + share * returned.count(None)
        yield Truncate(thread, spawn_begin)
        yield Append(thread, tokenizer.encode(joined))


def thread_grammar(settings: Settings, depth: int, spawns: int, allowance: int) -> ThreadGrammar | None:
    """What the thread's next spawn is held to: the same caps as in `read_spawn`."""
    if settings.spawn_grammar is None:
        return None
    may_spawn = depth < settings.max_depth and spawns < settings.max_spawns
    most = min(settings.max_children, allowance) if may_spawn else 0
    return ThreadGrammar(settings.spawn_grammar, depth + 1, most)


def read_spawn(
    text: str, settings: Settings, depth: int, spawns: int, allowance: int, *, last_begin: bool = False
) -> trace.SpawnCall | trace.Malformed:
    """Parses the spawn that `text` ends in and holds it to the caps, each with a reason of its own.

    It begins at the first CALL_BEGIN line, or with `last_begin`, and where a grammar holds it, at the last.
    """
    # A grammar holds what follows the token CALL_BEGIN, which an open vocabulary could also spell out before.
    call = trace.parse_spawn(text, last_begin=last_begin or settings.spawn_grammar is not None)
    if isinstance(call, trace.Malformed):
        return call
    if depth >= settings.max_depth:
        return trace.Malformed("too_deep")
    if spawns >= settings.max_spawns:
        return trace.Malformed("too_many_spawns")
    if call.level != depth + 1:
        return trace.Malformed("wrong_level")
    if len(call.contexts) > settings.max_children:
        return trace.Malformed("too_many_children")
    if len(call.contexts) > allowance:
        return trace.Malformed("rollout_children")
    return call


def _succeeded(child: _Child) -> bool:
    return child.result.path is not None


def _count(search: _Search, node_ids: tuple[str, ...], returned: list[_Child | None]) -> list[trace.ChildResult]:
    """Adds the children (None: cancelled) to the thread's counts and returns what the join will say of each."""
    search.num_spawns += 1
    search.num_children += len(returned)
    results = []
    for node_id, child in zip(node_ids, returned, strict=True):
        if child is None:
            results.append(trace.ChildResult(node_id, None))
            continue
        results.append(child.result)
        search.num_spawns += child.search.num_spawns
        search.num_children += child.search.num_children
        search.child_reasons += [*child.search.child_reasons, *([child.reason] if child.reason else [])]
        search.child_paths += [*child.search.child_paths, *([child.result.path] if child.result.path else [])]
    return results
