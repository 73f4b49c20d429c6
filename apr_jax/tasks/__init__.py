"""Every task, by the name that `config.task.name` chooses."""

from apr_jax.config import Config
from apr_jax.tasks.base import Task
from apr_jax.tasks.countdown.task import COUNTDOWN
from apr_jax.tasks.nested_sums import NESTED_SUMS
from apr_jax.tasks.reference.task import REFERENCE_APR, REFERENCE_SOSP
from apr_jax.tasks.words import COUNTDOWN_TEXT, NESTED_SUMS_FORK, NESTED_SUMS_TEXT

_TASKS: tuple[Task, ...] = (COUNTDOWN, NESTED_SUMS, COUNTDOWN_TEXT, NESTED_SUMS_TEXT, NESTED_SUMS_FORK)
TASKS: dict[str, Task] = {task.name: task for task in (*_TASKS, REFERENCE_APR, REFERENCE_SOSP)}


def task_of(config: Config) -> Task:
    """Return the task that a configuration names."""
    return TASKS[config.task.name]
