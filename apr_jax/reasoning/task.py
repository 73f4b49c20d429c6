"""What training and evaluation ask of a task. The rest of them knows threads and tokens alone.

Countdown is one instance; docs/examples/ has another.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from apr_jax.config import Config
from apr_jax.data.tokenizer import Tokenizer, load_tokenizer
from apr_jax.engine.threads import Program
from apr_jax.reasoning.outcome import Settings
from apr_jax.reasoning.programs import PROGRAMS
from apr_jax.tasks.countdown import judging, rules
from apr_jax.tasks.countdown.generation import Split
from apr_jax.tasks.countdown.rules import Problem, Verdict
from apr_jax.tasks.countdown.trace import Demonstrated

OnProgress = Callable[[str, int, int], None]  # split, demonstrations done, demonstrations in all


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A kind of problem: where they come from, what solves them, and what is right. Problems may be any objects.

    Functions raise on bugs only: text of a model is data to `verify`, `count_operations` and `child_result`.
    """

    name: str
    tokenizer: Callable[[Config], Tokenizer]
    # A split's problems with demonstrations, the same whenever the configuration is. Splits share no problem.
    demonstrations: Callable[[Config, Split, OnProgress | None], Sequence[Demonstrated]]
    programs: Mapping[
        str, Callable[[Any, Settings], Program]
    ]  # by method (`config.data.method`); each returns an Outcome
    verify: Callable[[str | None, Any], Verdict]  # an Outcome's answer, and the problem
    describe: Callable[[Any], dict[str, Any]]  # a problem in a record; "title" is its name
    count_operations: Callable[[str], tuple[int, int]]  # steps that a text writes out, and how many of them are right
    path_solves: Callable[[str, Any], bool]  # whether what a child handed back solves the whole problem
    child_result: Callable[[str, str, str, Any], str]  # method, context, completion, problem -> one word for the viewer


def _countdown_demonstrations(config: Config, split: Split, on_progress: OnProgress | None) -> Sequence[Demonstrated]:
    from apr_jax.data.countdown_builder import load_split  # slow to import, and solving needs no demonstrations

    return load_split(config, split, on_progress)


def _describe(problem: Problem) -> dict[str, Any]:
    return {"numbers": list(problem.numbers), "target": problem.target}


COUNTDOWN = Task(
    name="countdown",
    tokenizer=lambda config: load_tokenizer(config.data.tokenizer),
    demonstrations=_countdown_demonstrations,
    programs=PROGRAMS,
    verify=rules.verify,
    describe=_describe,
    count_operations=judging.count_operations,
    path_solves=judging.path_solves,
    child_result=judging.child_result,
)
