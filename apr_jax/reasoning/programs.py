"""Every way of reasoning, by name."""

from collections.abc import Callable, Generator, Mapping
from types import MappingProxyType
from typing import Any

from apr_jax.reasoning.adaptive import adaptive
from apr_jax.reasoning.outcome import Outcome, Settings
from apr_jax.reasoning.pasta import pasta
from apr_jax.reasoning.serial import serial
from apr_jax.reasoning.tree_of_thoughts import tree_of_thoughts
from apr_jax.tasks.countdown import Problem

PROGRAMS: Mapping[str, Callable[[Problem, Settings], Generator[Any, Any, Outcome]]] = MappingProxyType(
    {"adaptive": adaptive, "pasta": pasta, "serial": serial, "tree_of_thoughts": tree_of_thoughts}
)


def make_program(method: str, problem: Problem, settings: Settings) -> Generator[Any, Any, Outcome]:
    """A fresh program of `method` on `problem`, for the engine to run. Raises ValueError for an unknown method."""
    if method not in PROGRAMS:
        raise ValueError(f"method {method!r}: choose one of {', '.join(sorted(PROGRAMS))}")
    return PROGRAMS[method](problem, settings)
