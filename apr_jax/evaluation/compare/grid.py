"""The cells of a comparison: rows (a program with a policy) x budgets x temperatures x context windows.

A row is written PROGRAM or PROGRAM/POLICY. PROGRAM is a way of reasoning (`reasoning.programs`), its wrappers before
it: `adaptive`, `cons@8:adaptive`, `hogwild/serial`. Without POLICY its innermost name says which policy decodes it: a
policy of that name, which then reasons as it was trained to, or else the only one that was trained for that way.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from apr_jax.config import ConfigError
from apr_jax.config_fields import LEAST_TEMPERATURE
from apr_jax.reasoning.sampling import innermost

_ROW = re.compile(r"(?P<wrappers>(?:[a-z_]+@[1-9][0-9]{0,8}:)*)(?P<inner>[^/:@]+)(?:/(?P<policy>[^/:@]+))?")
_BUDGET = re.compile(r"(?:(?P<row>[^=]+)=)?(?P<budget>none|[1-9][0-9]{0,8})")


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of reasoning, decoded with one policy."""

    label: str  # as it was asked for
    program: str  # a name for `reasoning.programs.make_program`
    policy: str  # a name of --policies

    @property
    def inner(self) -> str:
        """The way of reasoning that its wrappers, if any, sample."""
        return innermost(self.program)

    @property
    def num_samples(self) -> int:
        """The number of samples of a problem that its wrappers take, one in another; 1 without any."""
        return math.prod(int(wrapper.partition("@")[2]) for wrapper in self.program.split(":")[:-1])


@dataclasses.dataclass(frozen=True)
class Cell:
    """One setting of a row: what is run at once, on all problems."""

    row: Row
    budget: int | None  # written into prompts
    temperature: float
    context_window: int  # tokens a thread may hold

    @property
    def key(self) -> dict[str, Any]:
        """The fields that tell it from other cells, as results.jsonl has them."""
        return {
            "method": self.row.label,
            "budget": self.budget,
            "temperature": self.temperature,
            "context_window": self.context_window,
        }

    def __str__(self) -> str:
        budget = "" if self.budget is None else f"budget {self.budget}, "
        return f"{self.row.label}: {budget}temperature {self.temperature:g}, window {self.context_window}"


def read_policies(items: Sequence[str]) -> dict[str, str]:
    """Read folders by name, from NAME=FOLDER each. Raises ConfigError for anything else, and for a name twice."""
    policies: dict[str, str] = {}
    for item in items:
        name, equals, folder = item.partition("=")
        if not (equals and folder and re.fullmatch(r"[^/:@]+", name)):
            raise ConfigError(f"--policies={item}: takes NAME=FOLDER, where NAME has no '/', ':' or '@'")
        if name in policies:
            raise ConfigError(f"--policies: two are named {name}; give each a name of its own")
        policies[name] = folder
    return policies


def read_rows(items: Sequence[str], methods: Mapping[str, str]) -> list[Row]:
    """Return the rows that --methods names, in its order; without any, each policy with its own way of reasoning.

    Args:
      methods: each policy's way of reasoning (its `data.method`), by its name.
    Raises: ConfigError for what is no row, has no policy, or could have two, and for a row that comes twice.
    """
    rows = [_read_row(item, methods) for item in items or methods]
    for index, row in enumerate(rows):
        if row in rows[:index]:
            raise ConfigError(f"--methods names {row.label} twice")
    return rows


def make_cells(
    rows: Sequence[Row],
    budgets: Sequence[str],
    temperatures: Sequence[float],
    context_windows: Sequence[int],
    own_windows: Mapping[str, int],
) -> list[Cell]:
    """Return all cells, row by row, each once, without several samples at temperature 0, which are all the same.

    Args:
      budgets: `8` or `none` for every row, `adaptive=8` for the row of that label; none given: no row has one.
      context_windows: none given: each policy its own, of `own_windows`.
    Raises: ConfigError for what is no budget or names no row, and for a row that no cell is left of.
    """
    cells = []
    budgets_of = _read_budgets(budgets, rows)
    for row in rows:
        own = [
            Cell(row, budget, temperature, window)
            for window in dict.fromkeys(context_windows or (own_windows[row.policy],))
            for budget in budgets_of[row.label]
            for temperature in dict.fromkeys(temperatures)
            if temperature >= LEAST_TEMPERATURE or row.num_samples == 1
        ]
        if not own:
            raise ConfigError(f"--methods={row.label}: several samples differ only at a temperature above 0")
        cells += own
    return cells


def _read_row(item: str, methods: Mapping[str, str]) -> Row:
    match = _ROW.fullmatch(item)
    if match is None:
        raise ConfigError(
            f"--methods={item}: takes PROGRAM or PROGRAM/POLICY, such as cons@8:adaptive or hogwild/serial"
        )
    wrappers, inner, policy = match["wrappers"], match["inner"], match["policy"]
    known = ", ".join(f"{name} ({method})" for name, method in methods.items())
    if policy is not None:
        if policy not in methods:
            raise ConfigError(f"--methods={item}: no policy is named {policy}; there are {known}")
        return Row(item, wrappers + inner, policy)
    if inner in methods:
        return Row(item, wrappers + methods[inner], inner)
    trained = [name for name, method in methods.items() if method == inner]
    if not trained:
        raise ConfigError(f"--methods={item}: no policy is named {inner} or was trained for it; there are {known}")
    if len(trained) > 1:
        raise ConfigError(f"--methods={item}: which policy? {', '.join(f'{item}/{name}' for name in trained)}")
    return Row(item, wrappers + inner, trained[0])


def _read_budgets(items: Sequence[str], rows: Sequence[Row]) -> dict[str, list[int | None]]:
    found: dict[str, list[int | None]] = {row.label: [] for row in rows}
    for item in items:
        match = _BUDGET.fullmatch(item)
        if match is None:
            raise ConfigError(f"--budgets={item}: takes a number, none, or ROW=number")
        if match["row"] is not None and match["row"] not in found:
            raise ConfigError(f"--budgets={item}: no row is named {match['row']}; there are {', '.join(found)}")
        budget = None if match["budget"] == "none" else int(match["budget"])
        for label in [match["row"]] if match["row"] is not None else found:
            found[label].append(budget)
    return {label: list(dict.fromkeys(budgets)) or [None] for label, budgets in found.items()}
