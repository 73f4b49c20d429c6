"""Runs the cells of a comparison: every row on the same problems, on engines of the same lanes."""

import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from apr_jax.config import Config, ConfigError, ModelConfig
from apr_jax.config_dict import to_dict
from apr_jax.data.tokenizer import Tokenizer, tokenizer_digest
from apr_jax.engine.engine import Engine
from apr_jax.evaluation.compare.grid import Cell, Row
from apr_jax.evaluation.compare.store import Json, Results
from apr_jax.evaluation.policy import configure
from apr_jax.evaluation.run import ShownProgress, evaluate
from apr_jax.model.params import Params, weights_digest
from apr_jax.parallel.machine import device_name
from apr_jax.parallel.mesh import make_mesh
from apr_jax.paths import path_of
from apr_jax.reasoning import METHODS
from apr_jax.reasoning.policy_engine import EngineHolder, policy_engine
from apr_jax.reasoning.programs import check_method
from apr_jax.reasoning.settings import make_settings
from apr_jax.tasks import task_of
from apr_jax.tasks.base import Split, Task, split_size
from apr_jax.tasks.generation import generate_problems

# What is read in training only, or is another key of a cell's settings.
_NOT_IN_SETTINGS = ("name", "seed", "task", "data", "sft", "grpo", "faults", "evaluation")
# With the fields of the task's section that problems depend on: what decides which problems a policy was trained on.
_SAME_SPLITS = ("num_validation", "num_test", "num_test_unseen_targets")


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """A policy of --policies, with the configuration that it is decoded under."""

    name: str
    checkpoint: str
    params: Params
    config: Config
    tokenizer: Tokenizer
    weights: str  # a digest of `params`

    @functools.cached_property
    def vocabulary(self) -> str:
        """A digest of the tokenizer, wherever it came from."""
        return tokenizer_digest(self.tokenizer)


@dataclasses.dataclass(frozen=True)
class Asked:
    """The problems of a task, what to call them, the seed of what is drawn on them, and how they are decoded."""

    task: Task
    problems: tuple[Any, ...]
    source: str
    seed: int
    at_once: int | None = None  # so many problems are decoded at once; None: as many as the lanes take

    @property
    def digest(self) -> str:
        """Equal for equal problems in equal order."""
        return _digest(json.dumps([self.task.describe(problem) for problem in self.problems]).encode())


def make_policy(
    name: str,
    checkpoint: str,
    loaded: tuple[ModelConfig, Params, Mapping[str, Any] | None],
    given: ConfigDict | None,
    overrides: Mapping[str, Any],
    first: "Policy | None",
) -> Policy:
    """Return a policy of `load_policy` under its own configuration or `given` in place of that.

    Its engine is that of the `first` policy. Raises ConfigError as `choose_config`, with the policy's name.
    """
    model, params, saved = loaded
    if first is not None:
        engine, mesh = dataclasses.asdict(first.config.engine), dataclasses.asdict(first.config.mesh)
        shared = {f"engine.{field}": value for field, value in engine.items()}
        overrides = {**shared, **{f"mesh.{axis}": size for axis, size in mesh.items()}, **overrides}
    try:
        config, tokenizer = configure(path_of(checkpoint), model, saved, given, overrides)
    except ConfigError as error:
        raise ConfigError(f"--policies={name}: {error}") from error
    return Policy(name, checkpoint, params, config, tokenizer, weights_digest(params))


def held_out(policies: Sequence[Policy], split: Split, limit: int) -> Asked:
    """Return the first `limit` problems of a split other than train, which no policy was trained on.

    Raises ConfigError where there are not so many, or where the policies' training had other held-out problems.
    """
    first = policies[0].config
    for policy in policies[1:]:
        there = {"seed": policy.config.seed, **_fields(policy.config)}
        here = {"seed": first.seed, **_fields(first)}
        lines = [f"  {name}: {there.get(name)!r}, not {v!r}" for name, v in here.items() if there.get(name) != v]
        if lines:
            raise ConfigError(
                f"--policies: {policy.name} had other held-out problems than {policies[0].name}, so that it may have "
                "been trained on these:\n" + "\n".join(lines) + "\nName a file of problems with --problems."
            )
    size = split_size(first.data, split)
    if limit > size:
        raise ConfigError(f"--num_problems={limit} is more than the {size} problems of {split}")
    problems = generate_problems(first, split)
    return Asked(task_of(first), tuple(itertools.islice(problems, limit)), split, first.seed)


def run_cells(
    cells: Sequence[Cell],
    policies: Mapping[str, Policy],
    asked: Asked,
    results: Results,
    *,
    command: str,
    keep_rollouts: int,
    say: Callable[[str], None],
) -> list[Json]:
    """Run the cells that are not done yet, and return the row of every cell, in the order given.

    Args:
      cells: at least one; `check_programs` has accepted their programs.
      command: the command line, for the rows.
      keep_rollouts: the number of problems, from the first, whose threads are kept with their text.
      say: called about cells that were done before.
    Raises: ConfigError if `results` has cells of other settings, or a context window is too large.
    """
    todo: dict[int, tuple[Cell, Json]] = {}
    rows: dict[int, Json] = {}
    configs = {cell: cell_config(policies[cell.row.policy].config, cell) for cell in cells}
    for index, cell in enumerate(cells):
        settings = cell_settings(cell, policies[cell.row.policy], configs[cell], asked)
        done = results.find(cell, settings)
        if done is None:
            todo[index] = (cell, settings)
        else:
            rows[index] = done
    if rows:
        say(f"{len(rows)} of {len(cells)} cells were done before")
    holder: EngineHolder[Engine] = EngineHolder()
    # Cells of one engine lie next to each other, so that it is made once.
    for count, index in enumerate(sorted(todo, key=lambda i: (*_engine_of(cells[i].row), i)), 1):
        cell, settings = todo[index]
        policy, config = policies[cell.row.policy], configs[cell]
        engine, window = _engine_for(holder, policy, cell.row), cell.context_window
        with ShownProgress(len(asked.problems), f"{count}/{len(todo)} {cell}") as on_progress:
            limit = window if window < config.model.max_seq_len else None
            program, tokenizer = cell.row.program, policy.tokenizer
            summary, records = evaluate(
                engine,
                asked.problems,
                method=program,
                settings=make_settings(config, tokenizer, program, budget=cell.budget, max_tokens=limit),
                seed=asked.seed,
                temperature=cell.temperature,
                on_progress=on_progress,
                keep_calls=keep_rollouts,
                at_once=asked.at_once,
            )
        lanes = engine.limits.lanes * engine.limits.num_shards
        about = _about(cell, policy, asked, lanes) | {"command": command}
        rows[index] = results.add(cell, settings, summary | about, records)
    return [rows[index] for index in range(len(cells))]


def _about(cell: Cell, policy: Policy, asked: Asked, lanes: int) -> Json:
    """Describe what a cell's figures come from, for its row."""
    return {
        "program": cell.row.program,
        "policy": policy.name,
        "checkpoint": policy.checkpoint,
        "problems": asked.source,
        "seed": asked.seed,
        "at_once": asked.at_once,
        "lanes": lanes,
        "machine": device_name(),
        "date": datetime.date.today().isoformat(),
    }


def check_programs(cells: Sequence[Cell], task: Task) -> None:
    """Raise ConfigError where a row names no way of reasoning, or one that a cell's settings don't go with."""
    for cell in cells:
        try:
            check_method(cell.row.program, task, cell.temperature, budget=cell.budget)
        except ConfigError as error:
            raise ConfigError(f"--methods={cell.row.label}: {error}") from error


def _engine_for(holder: EngineHolder[Engine], policy: Policy, row: Row) -> Engine:
    """Return the engine of a row, which is a new one where shapes or limits change.

    A present engine is given weights even where it holds them. So it forgets its cache, and what a cell prefills does
    not depend on the cells before it.
    """
    config = policy.config
    _, shares = _engine_of(row)

    def make() -> Engine:
        mesh = make_mesh(config.mesh)
        return policy_engine(config, mesh, policy.tokenizer, policy.params, expects_groups=shares)

    wanted = (config.model, config.engine, config.rollout, config.mesh, policy.vocabulary, shares)
    return holder.get(wanted, make, policy.params)


def _engine_of(row: Row) -> tuple[str, bool]:
    """Return what a row needs an engine of its own for: its policy, and a cache that threads share."""
    return row.policy, METHODS[row.inner].shares_cache


def cell_config(config: Config, cell: Cell) -> Config:
    """Return the policy's configuration, which tells its threads the cell's window where they know that size.

    Raises ConfigError for a window that threads of this policy cannot fill.
    """
    window, most = cell.context_window, config.model.max_seq_len
    if window > most:
        raise ConfigError(
            f"--context_windows={window}: threads of {cell.row.policy} hold model.max_seq_len={most} tokens; "
            f"--config.model.max_seq_len={window} allows more than it was trained for"
        )
    told = window if window in config.task.windows else config.rollout.context_window
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, context_window=told))


def cell_settings(cell: Cell, policy: Policy, config: Config, asked: Asked) -> Json:
    """Return all that a cell's figures depend on, by dotted name: equal settings give equal rollouts on one machine."""
    sections = {
        f"{section}.{name}": value
        for section, fields in to_dict(config).items()
        if section not in _NOT_IN_SETTINGS
        for name, value in fields.items()
    }
    return {
        **cell.key,
        "program": cell.row.program,
        "weights": policy.weights,
        "problems": f"{asked.digest} ({len(asked.problems)})",
        "seed": asked.seed,
        "at_once": asked.at_once,
        "tokenizer": policy.vocabulary,
        "task.context_windows": list(config.task.windows),
        "data.method": config.data.method,
        "data.condition_on_budget": config.data.condition_on_budget,
        **sections,
    }


def _fields(config: Config) -> Json:
    task = {f"task.{name}": getattr(config.task, name) for name in ("name", *task_of(config).problem_fields)}
    return {**task, **{f"data.{name}": getattr(config.data, name) for name in _SAME_SPLITS}}


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
