"""Every task, by the name that `config.task.name` chooses."""

from collections.abc import Mapping
from typing import Any

from apr_jax.config import Config
from apr_jax.tasks.base import Task
from apr_jax.tasks.countdown.task import COUNTDOWN
from apr_jax.tasks.gym import GYM
from apr_jax.tasks.multiplication.task import MULTIPLICATION
from apr_jax.tasks.nested_sums import NESTED_SUMS
from apr_jax.tasks.reference.task import REFERENCE_APR, REFERENCE_SOSP
from apr_jax.tasks.traces import TRACES
from apr_jax.tasks.words import COUNTDOWN_TEXT, NESTED_SUMS_FORK, NESTED_SUMS_TEXT

_TASKS: tuple[Task, ...] = (COUNTDOWN, MULTIPLICATION, NESTED_SUMS, COUNTDOWN_TEXT, NESTED_SUMS_TEXT, NESTED_SUMS_FORK)
TASKS: dict[str, Task] = {task.name: task for task in (*_TASKS, REFERENCE_APR, REFERENCE_SOSP, GYM, TRACES)}


def task_of(config: Config) -> Task:
    """Return the task that a configuration names."""
    return TASKS[config.task.name]


def named_section(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task's section; of a name as `gym:products` or `traces:FILE.jsonl`, the rest becomes its field."""
    name = section.get("name")
    kind, colon, rest = name.partition(":") if isinstance(name, str) else ("", "", "")
    if colon and kind in TASKS and (field := TASKS[kind].named_by):
        return {**section, "name": kind, field: rest}
    return dict(section)
