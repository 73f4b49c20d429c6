"""Adaptive Parallel Reasoning in JAX.

    import apr_jax
    policy = apr_jax.load("runs/laptop")
    (solution,) = policy.solve([(27, [22, 26, 31, 53])])

Nothing is imported until it is asked for. What these names are, `apr_jax/library.py` says.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apr_jax.library import Policy, Solution, load
    from apr_jax.tasks.countdown.rules import Problem

__all__ = ["Policy", "Problem", "Solution", "load"]

_HOMES = {"Problem": "apr_jax.tasks.countdown.rules"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "apr_jax.library")), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
