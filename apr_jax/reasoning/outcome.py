"""What every way of reasoning is told (`Settings`), what it hands back (`Outcome`), and the steps they share."""

import dataclasses
from typing import Literal

from apr_jax.config import METHODS_WITHOUT_BUDGET, Config, TreeOfThoughtsConfig
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.engine.constraints import Gate
from apr_jax.engine.threads import Stop, StopReason, Thread
from apr_jax.reasoning.spawn_grammar import SpawnGrammar, spawn_grammar
from apr_jax.tasks import task_of
from apr_jax.tasks.base import Task
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.demonstrations import innermost
from apr_jax.tasks.countdown.rules import claims_goal
from apr_jax.tasks.countdown.solver import token_budget

_TRUNCATED = {
    StopReason.LENGTH: "context_full",
    StopReason.MAX_STEPS: "max_steps",
    StopReason.BUDGET: "rollout_tokens",
}

Status = Literal["answered", "no_solution", "malformed", "truncated"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a program may do, and how text becomes tokens."""

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
    """How one rollout ended. The answer is the model's claim; `tasks.countdown.verify` judges it."""

    answer: str | None
    status: Status  # of the root thread
    reason: str  # "" when answered; otherwise a snake_case reason that can be counted
    num_spawns: int = 0  # in the whole tree of threads, cancelled children's own spawns left out
    num_children: int = 0  # the same
    child_reasons: tuple[str, ...] = ()  # of the children that were malformed or truncated, in spawn order
    child_paths: tuple[str, ...] = ()  # the winning paths that children handed back, in spawn order
    dropped_lines: tuple[str, ...] = ()  # why lines of model text were dropped, one reason a line
    samples: tuple[Sample, ...] = ()  # of which this is one; (): it was not chosen among several


def make_settings(
    config: Config,
    tokenizer: Tokenizer,
    method: str | None = None,
    *,
    budget: int | None = None,
    max_tokens: int | None = None,
) -> Settings:
    """The settings that `config` asks for, for `method` (None: `data.method`; wrappers make no difference).

    A policy whose demonstrations named their budget (`data.condition_on_budget`) is always told one: `budget`, or the
    most that its limits allow of what `method` counts: children, or for `serial` the bin of `model.max_seq_len`;
    METHODS_WITHOUT_BUDGET tell none. One whose demonstrations named their context windows is told and held to
    `rollout.context_window`, or the largest of them. No prompt says anything of `max_tokens`: it cuts threads off while
    they are decoded, so that accuracy can be measured against it.
    """
    rollout = config.rollout
    if budget is None and config.data.condition_on_budget:
        budget = _largest_budget(config, innermost(method or config.data.method))
    return Settings(
        task=task_of(config),
        tokenizer=tokenizer,
        max_children=rollout.max_children,
        max_spawns=rollout.max_spawns,
        max_depth=rollout.max_depth,
        max_total_children=rollout.max_total_children,
        cancel_on_success=rollout.cancel_on_success,
        spawn_grammar=_spawn_grammar(config, tokenizer),
        tree_of_thoughts=config.tree_of_thoughts,
        context_window=rollout.context_window or max(config.task.windows, default=None),
        max_tokens=max_tokens,
        budget=budget,
    )


def _largest_budget(config: Config, method: str) -> int | None:
    if method in METHODS_WITHOUT_BUDGET:
        return None
    return token_budget(config.model.max_seq_len) if method == "serial" else config.rollout.max_children


def spawn_gate(config: Config, tokenizer: Tokenizer) -> Gate | None:
    """The gate that an engine needs for `make_settings(config, tokenizer)`; None where spawns are not constrained."""
    grammar = _spawn_grammar(config, tokenizer)
    return None if grammar is None else grammar.gate


def _spawn_grammar(config: Config, tokenizer: Tokenizer) -> SpawnGrammar | None:
    rollout = config.rollout
    return spawn_grammar(tokenizer, rollout.max_children) if rollout.constrain_spawns else None


def banned_tokens(tokenizer: Tokenizer, vocab_size: int) -> tuple[int, ...]:
    """Tokens that no thread may ever produce, in ascending order.

    BOS and padding, the opening of a join (only the join itself writes `<Sub Searches>`), and the ids
    between the tokenizer's vocabulary and the model's `vocab_size`.
    """
    unused = range(tokenizer.vocab_size, vocab_size)
    return tuple(sorted({tokenizer.bos_id, tokenizer.pad_id, tokenizer.join_begin_id, *unused} - {tokenizer.eos_id}))


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """BOS and the prompt. Raises ValueError where the tokenizer cannot spell the prompt."""
    return [tokenizer.bos_id, *tokenizer.encode(prompt)]


def thread_text(tokenizer: Tokenizer, thread: Thread) -> str:
    """The thread's whole text, prompt and all (BOS and EOS have none)."""
    return tokenizer.decode(thread.tokens)


def token_index(tokenizer: Tokenizer, thread: Thread, offset: int) -> int | None:
    """The index in `thread.tokens` where the text's character `offset` > 0 begins, or None where that is in a token."""
    begin = 0
    for index, piece in enumerate(tokenizer.token_texts(thread.tokens)):
        if begin >= offset:
            return index if begin == offset else None
        begin += len(piece)
    return None


def read_ending(text: str) -> tuple[str | None, Status, str]:
    """The answer, status and reason of a root thread that ended by itself.

    A thread that ends neither in a goal nor in "No solution found." is malformed ("unfinished"), and so is one that
    claims the goal but replays no path ("no_replay").
    """
    answer = trace.read_answer(text)
    if answer is not None:
        return answer, "answered", ""
    if text.endswith("\n" + trace.NO_SOLUTION):
        return None, "no_solution", "no_solution"
    return None, "malformed", "no_replay" if claims_goal(text) else "unfinished"


def truncated_reason(stop: Stop) -> str:
    """Why a decode ended before a stop token. Raises KeyError where a stop token did end it."""
    return _TRUNCATED[stop.reason]
