"""Programs by the name of their method, for the engine to run."""

import dataclasses
from collections.abc import Generator
from typing import Any

from apr_jax.config import ConfigError
from apr_jax.config_fields import LEAST_TEMPERATURE
from apr_jax.engine.groups import row_limit
from apr_jax.engine.threads import Open, Program, Share, Spawn
from apr_jax.reasoning import METHODS
from apr_jax.reasoning.base import Outcome, Settings
from apr_jax.reasoning.sampling import innermost, most_likely, read_wrapper, retried, sampled
from apr_jax.tasks.base import Task


def make_program(method: str, problem: Any, settings: Settings) -> Generator[Any, Any, Outcome]:
    """Return a fresh program of `method` on `problem`.

    `method` is a name in METHODS, or samples of one: `cons@8:adaptive` (`reasoning/sampling.py`). Every thread of the
    program is held to `settings.max_tokens`. Raises ConfigError as `check_method`.
    """
    check_method(method, settings.task, budget=settings.budget)
    wrapper = read_wrapper(method)
    if wrapper is not None:
        share = dataclasses.replace(settings, max_total_children=settings.max_total_children // wrapper.num_samples)
        samples = [make_program(wrapper.inner, problem, share) for _ in range(wrapper.num_samples)]
        if wrapper.choose is None:
            return retried(samples)
        return sampled(wrapper.choose, problem, settings.task, samples)
    program = METHODS[method].program(problem, settings)
    return program if settings.max_tokens is None else _held(program, settings.max_tokens)


def check_method(method: str, task: Task, temperature: float | None = None, *, budget: int | None = None) -> None:
    """Raise ConfigError for a method that there is not, or that does not go with a task, a temperature or a budget.

    At temperature 0 (None: it is not known yet) nothing is drawn at random, so that several samples are all the same.
    Samples are ranked by likelihood only where roots write. A `budget` is refused where no prompt names one.
    """
    wrapper, inner = read_wrapper(method), METHODS.get(innermost(method))
    if budget is not None and inner is not None and inner.budget is None:
        raise ConfigError(f"method {method!r}: its prompts name no budget; leave out the budget of {budget}")
    if wrapper is None:
        if method not in METHODS:
            raise ConfigError(f"method {method!r}: choose one of {', '.join(sorted(METHODS))}")
        task.dialect(METHODS[method].dialect, METHODS[method].kind)
        return
    if temperature is not None and temperature < LEAST_TEMPERATURE and wrapper.num_samples > 1:
        raise ConfigError(
            f"method {method!r}: at temperature 0 its {wrapper.num_samples} samples are all the same; set a "
            f"temperature above 0, or use {wrapper.inner}"
        )
    check_method(wrapper.inner, task, temperature)
    if wrapper.choose is most_likely and (read_wrapper(wrapper.inner) or not METHODS[wrapper.inner].root_writes):
        raise ConfigError(f"method {method!r}: no root of {wrapper.inner} writes what could be likely; use cons@N")


def _held(program: Program, max_tokens: int) -> Program:
    """Run the program, with no thread of it and of what it spawns holding more than `max_tokens` tokens.

    Workers on a shared cache see each other's tokens: they get equal parts of what their prompt leaves.
    """
    reply = None
    try:
        while True:
            try:
                request = program.send(reply)
            except StopIteration as end:
                return end.value
            if isinstance(request, Open):
                request = dataclasses.replace(request, max_length=min(max_tokens, request.max_length or max_tokens))
            elif isinstance(request, Spawn):
                request = Spawn([_held(child, max_tokens) for child in request.programs])
            elif isinstance(request, Share):
                prompt, size = len(request.prompt), len(request.programs)
                parts = [row_limit(max_tokens, prompt, size, number) for number in range(size)]
                held = [_held(worker, part) for worker, part in zip(request.programs, parts, strict=True)]
                request = Share(request.prompt, held)
            reply = yield request
    finally:
        program.close()
