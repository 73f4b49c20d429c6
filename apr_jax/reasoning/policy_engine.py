"""The engine that a policy is decoded with, whichever way of reasoning its configuration names."""

from jax.sharding import Mesh

from apr_jax.config import Config
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.engine.engine import Engine
from apr_jax.model.llama import Params
from apr_jax.reasoning.outcome import banned_tokens, spawn_gate
from apr_jax.tasks.countdown.demonstrations import SHARED_METHODS
from apr_jax.tasks.countdown.hogwild_traces import NUM_WORKERS


def policy_engine(
    config: Config,
    mesh: Mesh,
    tokenizer: Tokenizer,
    params: Params,
    *,
    expects_groups: bool | None = None,
) -> Engine:
    """An engine on `mesh` that forbids what `config`'s programs forbid, and holds spawns to what they allow.

    Workers can share a cache in any that has lanes for them. Where it does not expect them, the step for them is
    compiled when it is first needed.

    Args:
      expects_groups: whether workers will share a cache; None: whether they do in `config`'s own method.
    Raises: ConfigError as `Engine`.
    """
    max_workers, expects_groups = workers(config, expects_groups)
    return Engine(
        config.model,
        config.engine,
        config.rollout,
        mesh,
        params=params,
        banned_tokens=banned_tokens(tokenizer, config.model.vocab_size),
        gate=spawn_gate(config, tokenizer),
        max_workers=max_workers,
        expects_groups=expects_groups,
    )


def workers(config: Config, expects_groups: bool | None = None) -> tuple[int, bool]:
    """How many workers may share a cache in such an engine, and whether any are expected (as of `policy_engine`)."""
    expected = config.data.method in SHARED_METHODS if expects_groups is None else expects_groups
    return (NUM_WORKERS if expected or config.engine.lanes >= NUM_WORKERS else 0), expected
