"""From a configuration to what a program and its engine are told."""

from apr_jax.config import Config, ConfigError
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.engine.constraints import Gate
from apr_jax.reasoning import METHODS
from apr_jax.reasoning.base import Settings
from apr_jax.reasoning.sampling import innermost
from apr_jax.reasoning.spawn_grammar import SpawnGrammar, spawn_grammar
from apr_jax.tasks import task_of
from apr_jax.tasks.dialect import SpawnDialect, SpelledSpawnDialect, ThreadDialect


def make_settings(
    config: Config,
    tokenizer: Tokenizer,
    method: str | None = None,
    *,
    budget: int | None = None,
    max_tokens: int | None = None,
) -> Settings:
    """Return the settings that `config` asks for, for `method` (None: `data.method`; wrappers make no difference).

    A policy whose demonstrations named their budget (`data.condition_on_budget`) is always told one: `budget`, else
    `rollout.budget`, else the most that its limits allow of what the method counts (`Method.budget`). One whose
    demonstrations named their context windows is told and held to `rollout.context_window`, or the largest of them. No
    prompt says anything of `max_tokens`: it cuts threads off while they are decoded, so that accuracy can be measured
    against it.
    """
    rollout = config.rollout
    if budget is None and config.data.condition_on_budget:
        budget = rollout.budget or _largest_budget(config, innermost(method or config.data.method))
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


def spawn_gate(config: Config, tokenizer: Tokenizer) -> Gate | None:
    """Return the gate that an engine needs for `make_settings(config, tokenizer)`; None: spawns are not constrained."""
    grammar = _spawn_grammar(config, tokenizer)
    return None if grammar is None else grammar.gate


def banned_tokens(tokenizer: Tokenizer, vocab_size: int) -> tuple[int, ...]:
    """Return the tokens that no thread may ever produce, in ascending order.

    BOS and padding, the mark that opens a join, which only the join itself writes, and the ids of the model's
    `vocab_size` that the tokenizer does not use.
    """
    unused = (*tokenizer.unused_ids, *range(tokenizer.vocab_size, vocab_size))
    return tuple(sorted({tokenizer.bos_id, tokenizer.pad_id, *tokenizer.join_ids, *unused} - {*tokenizer.eos_ids}))


def spelled_spawns(config: Config) -> SpelledSpawnDialect:
    """Return the dialect of the policy's own spawns; adaptive's, where it was trained not to spawn.

    Raises TaskLacksError where the task cannot tell its spawns ahead.
    """
    own = METHODS[config.data.method]
    return task_of(config).dialect(
        own.dialect if issubclass(own.kind, SpawnDialect) else "adaptive", SpelledSpawnDialect
    )


def _largest_budget(config: Config, name: str) -> int | None:
    method = METHODS[name]
    if method.budget == "tokens":
        dialect = task_of(config).dialect(method.dialect, ThreadDialect)
        return dialect.token_budget(config.model.max_seq_len)
    return config.rollout.max_children if method.budget == "children" else None


def _spawn_grammar(config: Config, tokenizer: Tokenizer) -> SpawnGrammar | None:
    if not config.rollout.constrain_spawns:
        return None
    if config.data.encoding != "lines":
        raise ConfigError("rollout.constrain_spawns spells spawns line by line, and so needs data.encoding='lines'")
    if config.data.chat_template != "none":
        raise ConfigError("rollout.constrain_spawns reads prompts from tokens: it needs data.chat_template='none'")
    return spawn_grammar(tokenizer, spelled_spawns(config), config.rollout.max_children)
