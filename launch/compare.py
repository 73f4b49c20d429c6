"""Compare ways of reasoning, and policies, on the same problems and on engines of the same size.

    python launch/compare.py --policies=correct=runs/correct,path=runs/path --figure=docs/critical_path.svg
    python launch/compare.py --policies=adaptive=runs/laptop,serial=runs/serial --methods=adaptive,cons@8:serial \\
      --temperatures=0,1 --context_windows=256,384,512
    python launch/report.py --comparison=runs/comparison --run=runs/laptop

A row of --methods is PROGRAM or PROGRAM/POLICY; without --methods each policy reasons as it was trained to. Each row
runs at every budget, temperature and context window. WORKDIR/results.jsonl gets one object for each such cell, and
WORKDIR/records its problems' records. Kill it at any moment and start it again: finished cells are kept. At the end
every cell is compared with the first, problem by problem. docs/comparing.md says more.

A thread that fills its context window is cut off. Each policy decodes under its own configuration, on an engine with
the lanes and pages of the first one's. --config.a.b=c changes a field for all policies, and --config=FILE replaces
the configuration of each. Exit codes: 0 done, 1 failed, 2 bad arguments or config, 75 stopped by a signal (start again
to go on).
"""

import dataclasses
import pathlib
import shlex
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from apr_jax import entry
from apr_jax.checkpoints.identity import with_auto
from apr_jax.config import ConfigError
from apr_jax.config_dict import from_config_dict
from apr_jax.evaluation.compare.grid import Cell, make_cells, read_policies, read_rows
from apr_jax.evaluation.rollout_sources import (
    choose_split,
    given_policy,
    policy_folder,
    policy_task,
    read_problems,
)
from apr_jax.lock import locked
from apr_jax.paths import RUNS, path_of
from apr_jax.progress import busy
from apr_jax.stopping import StoppedError
from apr_jax.tasks import task_of
from apr_jax.tasks.base import SPLITS

if TYPE_CHECKING:
    from apr_jax.evaluation.compare.cells import Asked, Policy

_CONFIG = entry.define_config("grpo.py")
_WORKDIR = flags.DEFINE_string("workdir", f"{RUNS}/comparison", "Folder of results.jsonl and the records.")
_POLICIES = flags.DEFINE_list(
    "policies",
    [],
    f"NAME=FOLDER of each: run (RUN/best), checkpoint, Hugging Face folder [newest in {RUNS}/, or the shipped one].",
)
_METHODS = flags.DEFINE_list("methods", [], "Rows: PROGRAM or PROGRAM/POLICY, such as cons@8:adaptive [every policy].")
_BUDGETS = flags.DEFINE_list("budgets", [], "Named in prompts: N or none for all rows, ROW=N for one.")
_TEMPERATURES = flags.DEFINE_list("temperatures", [], "0 is greedy [evaluation.temperature].")
_WINDOWS = flags.DEFINE_list("context_windows", [], "Tokens that a thread may hold [model.max_seq_len].")
_HELD_OUT = [split for split in SPLITS if split != "train"]
_SPLIT = flags.DEFINE_enum("split", None, _HELD_OUT, "Split, held out by all policies [evaluation.split].")
_NUM_PROBLEMS = entry.define_number("num_problems", None, "Their number [evaluation.num_problems].", low=2)
_PROBLEMS = flags.DEFINE_string("problems", None, 'File: {"numbers": [3, 7, 12], "target": 40} a line, or a JSON list.')
_AT_ONCE = entry.define_number(
    "at_once", None, "Problems decoded at once; 1: each has the lanes, and its latency, to itself [all].", low=1
)
_KEEP = entry.define_number("keep_rollouts", 16, "Problems whose threads are kept for the viewer.", low=0)
_JSON = entry.JsonFlag("rows and differences")
_FIGURE = entry.define_output("figure", "Draw the policies' training curves here.", (".svg",))


def main() -> int:
    # What can be refused is refused at once, before JAX and its friends have loaded.
    entry.positive_numbers("context_windows", _WINDOWS.value)
    _temperatures(0.0)
    folders = {name: given_policy(given, f"policies={name}") for name, given in read_policies(_POLICIES.value).items()}
    if not folders:
        folders = {(chosen := policy_folder(None)).name: chosen}
    first = next(iter(folders.values()))
    config = from_config_dict(with_auto(_CONFIG.values(), first))
    task = policy_task(first, config, is_given=_CONFIG.is_given)
    own = read_problems(task, _PROBLEMS.value, _NUM_PROBLEMS.value) if _PROBLEMS.value else None
    if own is not None and len(own) < 2:
        raise ConfigError(f"--problems={_PROBLEMS.value}: a comparison takes 2 problems or more")
    with busy("Loading libraries"):
        from apr_jax.evaluation.report.paired_report import draw_runs

    if _FIGURE.value:
        try:
            draw_runs(folders, path_of(_FIGURE.value))
        except ValueError as error:
            raise entry.FailedError(str(error)) from error
    try:
        _compare(folders, own)
    except StoppedError:
        print(f"Stopped by a signal; finished cells are in {_WORKDIR.value}. Start again to go on.", file=sys.stderr)
        return entry.STOPPED
    return 0


def _compare(folders: dict[str, pathlib.Path], own: list[Any] | None) -> None:
    with busy("Loading libraries"):
        from apr_jax.evaluation.compare.cells import check_programs, run_cells
        from apr_jax.evaluation.compare.store import Results

    with busy("Reading the policies"):
        policies = _load(folders)
    cells = _cells(policies)
    asked = dataclasses.replace(_asked(list(policies.values()), own), at_once=_AT_ONCE.value)
    check_programs(cells, asked.task)
    workdir = path_of(_WORKDIR.value)
    with locked(workdir / "lock", "wait for it, or choose another --workdir"):
        rows = run_cells(
            cells,
            policies,
            asked,
            Results(workdir),
            command=shlex.join(["python", "launch/compare.py", *sys.argv[1:]]),
            keep_rollouts=_KEEP.value,
            say=lambda text: print(text, file=sys.stderr),
        )
    _show(workdir, rows)


def _load(folders: dict[str, pathlib.Path]) -> "dict[str, Policy]":
    from apr_jax.checkpoints.policy import load_policy
    from apr_jax.evaluation.compare.cells import make_policy
    from apr_jax.parallel.mesh import offer_cpu_devices

    offer_cpu_devices()  # before the weights start JAX; how many the mesh needs, they will tell
    policies: dict[str, Policy] = {}
    for name, folder in folders.items():
        first = next(iter(policies.values()), None)
        given = _CONFIG.config_dict() if _CONFIG.is_given else None
        policies[name] = make_policy(name, str(folder), load_policy(folder), given, _CONFIG.overrides, first)
    return policies


def _cells(policies: "dict[str, Policy]") -> list[Cell]:
    rows = read_rows(_METHODS.value, {name: policy.config.data.method for name, policy in policies.items()})
    return make_cells(
        rows,
        _BUDGETS.value,
        _temperatures(next(iter(policies.values())).config.evaluation.temperature),
        entry.positive_numbers("context_windows", _WINDOWS.value),
        {name: policy.config.model.max_seq_len for name, policy in policies.items()},
    )


def _asked(policies: "list[Policy]", own: list[Any] | None) -> "Asked":
    """Return the user's problems, or those of a split."""
    from apr_jax.evaluation.compare.cells import Asked, held_out

    config = policies[0].config
    if own is not None and _PROBLEMS.value:
        tasks = {policy.config.task.name for policy in policies}
        if len(tasks) > 1:
            raise ConfigError(f"--policies: they solve problems of several tasks: {', '.join(sorted(tasks))}")
        return Asked(task_of(config), tuple(own), _PROBLEMS.value, config.seed)
    split, wanted = choose_split(config, _SPLIT.value, _NUM_PROBLEMS.value)
    return held_out(policies, split, wanted)


def _temperatures(default: float) -> list[float]:
    try:
        values = [float(value) for value in _TEMPERATURES.value] or [default]
    except ValueError as error:
        raise ConfigError(f"--temperatures: {error}") from error
    if not all(0 <= value < float("inf") for value in values):
        raise ConfigError(f"--temperatures={','.join(_TEMPERATURES.value)} must be numbers >= 0 (0 is greedy)")
    return values


def _show(workdir: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table, and each against the first."""
    from apr_jax.evaluation.compare.store import read_records
    from apr_jax.evaluation.report.paired_report import cell_name, compare, show_differences, show_rows

    first, *others = rows
    at_once = "" if first.get("at_once") is None else f", {first['at_once']} at once"
    print(
        f"{first['num_problems']:,} problems ({first['problems']}{at_once}), {first['lanes']} lanes, {first['machine']}"
    )
    print(show_rows(rows))
    against = read_records(workdir, first)
    differences = {}
    for row in others:
        differences[cell_name(row, rows)] = of_row = compare(against, read_records(workdir, row))
        print(show_differences(cell_name(row, rows), cell_name(first, rows), of_row))
    document = {
        "against": cell_name(first, rows),
        "summaries": {cell_name(row, rows): row for row in rows},
        "differences": {name: {k: dataclasses.asdict(d) for k, d in of.items()} for name, of in differences.items()},
    }
    _JSON.write(document)


if __name__ == "__main__":
    entry.run(main)
