"""The engine that a policy is decoded with, whichever way of reasoning its configuration names."""

from jax.sharding import Mesh

from apr_jax.config import Config, RolloutConfig
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.engine.engine import Engine
from apr_jax.model.llama import Params
from apr_jax.reasoning.outcome import banned_tokens, spawn_gate


def policy_engine(
    config: Config, mesh: Mesh, tokenizer: Tokenizer, params: Params, rollout: RolloutConfig | None = None
) -> Engine:
    """An engine on `mesh` that forbids what `config`'s programs forbid, and holds spawns to what they allow.

    Args:
      rollout: in place of `config.rollout`, where the engine is one of several.
    Raises: ConfigError as `Engine`.
    """
    return Engine(
        config.model,
        rollout or config.rollout,
        mesh,
        params=params,
        banned_tokens=banned_tokens(tokenizer, config.model.vocab_size),
        gate=spawn_gate(config, tokenizer),
    )
