"""The engine that a policy is decoded with, whichever way of reasoning its configuration names."""

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from jax.sharding import Mesh

from apr_jax.config import Config
from apr_jax.config_fields import BY_DEVICES
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.engine.engine import Engine
from apr_jax.model.params import Params
from apr_jax.reasoning import METHODS
from apr_jax.reasoning.settings import banned_tokens, spawn_gate
from apr_jax.tasks import task_of
from apr_jax.tasks.dialect import WorkerDialect


class HeldEngine(Protocol):
    """The part of an engine that a holder needs."""

    def set_params(self, params: Any) -> None: ...
    def warm_up(self) -> float: ...


E = TypeVar("E", bound=HeldEngine)


class EngineHolder(Generic[E]):
    """The one engine of a process, made and compiled when it is first asked for.

    Attributes:
      made_for: what the present engine was made for, as `get` was told; None before the first.
    """

    def __init__(self) -> None:
        self.made_for: Any = None
        self._engine: E | None = None

    def get(self, wanted: Any, make: Callable[[], E], params: Params | None = None) -> E:
        """Return an engine that was made for `wanted`, warm: the present one, or a new one in its place.

        Args:
          wanted: compared with `made_for`.
          make: makes an engine that holds the right weights. The present engine is gone by then, so that the new one
            can have its memory.
          params: weights for the present engine, which then forgets its cache; None: it holds the right ones.
        """
        if self._engine is None or self.made_for != wanted:
            self._engine = None
            engine = make()
            engine.warm_up()  # so that no rate or latency counts compilation
            self._engine, self.made_for = engine, wanted
        elif params is not None:
            self._engine.set_params(params)
        return self._engine


def policy_engine(
    config: Config, mesh: Mesh, tokenizer: Tokenizer, params: Params, *, expects_groups: bool | None = None
) -> Engine:
    """Return an engine on `mesh` that forbids what `config`'s programs forbid, and holds spawns to what they allow.

    Workers can share a cache in any that has lanes for them. Where it does not expect them, the step for them is
    compiled when it is first needed.

    Args:
      expects_groups: workers will share a cache; None: as in `config`'s own method.
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
    """Return how many workers may share a cache in such an engine, and whether any are expected."""
    expected = METHODS[config.data.method].shares_cache if expects_groups is None else expects_groups
    dialects = [task_of(config).dialects.get(method.dialect) for method in METHODS.values() if method.shares_cache]
    most = max((dialect.num_workers for dialect in dialects if isinstance(dialect, WorkerDialect)), default=0)
    has_lanes = config.engine.lanes == BY_DEVICES or config.engine.lanes >= most
    return (most if expected or has_lanes else 0), expected
