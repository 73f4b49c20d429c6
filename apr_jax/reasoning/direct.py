"""No search: the answer straight, as a path of operations (what searching is worth is measured against this).

Source: models trained on optimal paths alone, in Stream of Search (Gandhi et al. 2024, arXiv 2404.03683).
What differs: the path is written in the grammar of the other methods' replays, states between its steps included, and
it is the first solution in a fixed order, not the shortest trace of a search.
"""

from collections.abc import Generator
from typing import Any

from apr_jax.reasoning.base import Method, Outcome, Settings
from apr_jax.reasoning.serial import one_thread
from apr_jax.tasks.dialect import ThreadDialect


def direct(problem: Any, settings: Settings) -> Generator[Any, Any, Outcome]:
    """Run one thread to EOS; all of it is the answer."""
    return (yield from one_thread(settings.task.dialect("direct", ThreadDialect), problem, settings))


DIRECT = Method(name="direct", program=direct, dialect="direct", kind=ThreadDialect, budget=None)
