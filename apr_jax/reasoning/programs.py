"""Every way of reasoning, by name."""

import dataclasses
from collections.abc import Callable, Generator, Mapping
from types import MappingProxyType
from typing import Any

from apr_jax.config import METHODS_WITHOUT_BUDGET
from apr_jax.engine.groups import row_limit
from apr_jax.engine.threads import Open, Program, Share, Spawn
from apr_jax.reasoning.adaptive import adaptive
from apr_jax.reasoning.direct import direct
from apr_jax.reasoning.hogwild import hogwild
from apr_jax.reasoning.outcome import Outcome, Settings
from apr_jax.reasoning.pasta import pasta
from apr_jax.reasoning.sampling import most_likely, read_wrapper, sampled
from apr_jax.reasoning.serial import serial
from apr_jax.reasoning.tree_of_thoughts import tree_of_thoughts
from apr_jax.tasks.countdown.demonstrations import innermost

Programs = Mapping[str, Callable[[Any, Settings], Generator[Any, Any, Outcome]]]

PROGRAMS: Programs = MappingProxyType(
    {
        "adaptive": adaptive,
        "direct": direct,
        "hogwild": hogwild,
        "pasta": pasta,
        "serial": serial,
        "tree_of_thoughts": tree_of_thoughts,
    }
)

# Their root writes nothing, so that there is no likelihood to rank samples by.
_SILENT_ROOTS = frozenset({"hogwild", "tree_of_thoughts"})


def make_program(
    method: str, problem: Any, settings: Settings, programs: Programs = PROGRAMS
) -> Generator[Any, Any, Outcome]:
    """A fresh program of `method` on `problem`, for the engine to run.

    `method` is a name in `programs`, or samples of one of PROGRAMS: `cons@8:adaptive` (`reasoning/sampling.py`, which
    compares answers as Countdown has them). Every thread of the program is held to `settings.max_tokens`. Raises
    ValueError for any other method, and for a budget that the method has no place for.
    """
    check_method(method, programs=programs, budget=settings.budget)
    wrapper = read_wrapper(method)
    if wrapper is not None:
        share = dataclasses.replace(settings, max_total_children=settings.max_total_children // wrapper.num_samples)
        samples = [make_program(wrapper.inner, problem, share) for _ in range(wrapper.num_samples)]
        return sampled(wrapper.choose, problem, samples)
    program = programs[method](problem, settings)
    return program if settings.max_tokens is None else _held(program, settings.max_tokens)


def check_method(
    method: str, temperature: float | None = None, programs: Programs = PROGRAMS, *, budget: int | None = None
) -> None:
    """Raises ValueError for what there is not, for samples without a likelihood to rank by, and for equal samples.

    At temperature 0 nothing is drawn at random, so that all are the same. None: the temperature is not known yet. A
    `budget` is refused where no prompt names one (METHODS_WITHOUT_BUDGET).
    """
    wrapper = read_wrapper(method)
    if budget is not None and innermost(method) in METHODS_WITHOUT_BUDGET:
        raise ValueError(f"method {method!r}: its prompts name no budget; leave out the budget of {budget}")
    if wrapper is None:
        if method not in programs:
            raise ValueError(f"method {method!r}: choose one of {', '.join(sorted(programs))}")
        return
    if programs is not PROGRAMS:
        raise ValueError(f"method {method!r}: samples are chosen among by Countdown's answers alone")
    if temperature == 0 and wrapper.num_samples > 1:
        raise ValueError(
            f"method {method!r}: at temperature 0 its {wrapper.num_samples} samples are all the same; set a "
            f"temperature above 0, or use {wrapper.inner}"
        )
    if wrapper.choose is most_likely and (wrapper.inner in _SILENT_ROOTS or read_wrapper(wrapper.inner)):
        raise ValueError(f"method {method!r}: no root of {wrapper.inner} writes what could be likely; use cons@N")
    check_method(wrapper.inner, temperature)


def _held(program: Program, max_tokens: int) -> Program:
    """The program, with no thread of it and of what it spawns holding more than `max_tokens` tokens.

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
