"""A run as one self-contained page (`report.html`), and its picture as one SVG.

The page is made from a run folder's metrics.jsonl, summary.json, rollouts.jsonl and config.json; without one of them it
says less. It loads nothing from anywhere else, and all model text is escaped. Rollouts that GRPO learnt from, with
their advantages, come from grpo_rollouts/STEP.jsonl.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from apr_jax.checkpoints.step_log import read_step_log
from apr_jax.evaluation.report import charts, page, viewer
from apr_jax.evaluation.report.behaviour import behaviour_tables
from apr_jax.evaluation.report.run_files import MADE_ANEW, METRICS_ADVICE, evaluations, read_metrics, read_object
from apr_jax.evaluation.report.thread_view import ThreadViews
from apr_jax.files import REMOVE, read_jsonl, reading, write
from apr_jax.paths import path_of
from apr_jax.tasks import TASKS

Panel = tuple[str, str, Mapping[str, str]]  # phase, title, and the label of each metric's curve


def _panel(phase: str, title: str, **curves: str) -> Panel:
    return phase, f"{phase.upper()}: {title}", curves


# A curve or a panel that a run did not log is left out.
_PANELS = (
    _panel("sft", "loss per token", loss="train", validation_loss="validation"),
    _panel("sft", "accuracy of the next token", token_accuracy="train", validation_token_accuracy="validation"),
    _panel("grpo", "share of rollouts solved", accuracy="sampled rollouts"),
    _panel(
        "grpo", "children per rollout and spawn", children_per_rollout="per rollout", children_per_spawn="per spawn"
    ),
    _panel("grpo", "tokens per rollout", total_tokens="all threads", sequential_tokens="one after the other"),
    _panel("grpo", "reward of a rollout", reward="reward"),
    _panel("grpo", "tokens per call", tokens_per_call="tokens"),
    _panel("grpo", "levels of threads below the root", spawn_depth="levels"),
    _panel("grpo", "groups without signal", no_signal_groups="groups"),
    _panel("grpo", "malformed and cut-off rollouts", malformed_rate="malformed", truncated_rate="cut off"),
    _panel("grpo", "distance to the reference (KL)", kl="KL"),
    _panel("grpo", "entropy per token", entropy="entropy"),
    _panel("grpo", "clipped ratios, truncated weights", clip_fraction="clipped", importance_truncated="truncated"),
    _panel(
        "grpo", "log-probability, trainer against rollout", logp_diff_mean="mean difference", logp_diff_max="largest"
    ),
)
_PERCENT = {"accuracy", "no_signal_groups", "malformed_rate", "truncated_rate", "clip_fraction"}
_PERCENT |= {"token_accuracy", "validation_token_accuracy"}

_ROWS: tuple[tuple[str, str, str], ...] = (
    ("child_solved_rate", "some child handed back a right path", "share"),
    ("child_solved_but_wrong_rate", "... and the parent still failed", "share"),
    ("operations_right_rate", "written operations that are right", "share"),
    ("malformed_rate", "malformed", "share"),
    ("truncated_rate", "cut off", "share"),
    ("child_failure_rate", "children malformed or cut off", "share"),
    ("children_per_rollout", "children per rollout", "number"),
    ("children_per_spawn", "children per spawn", "number"),
    ("spawn_depth", "levels of threads below the root", "number"),
    ("total_tokens", "tokens, all threads", "number"),
    ("sequential_tokens", "tokens, one after the other", "number"),
    ("tokens_per_call", "tokens per call", "number"),
    ("latency_ms", "latency, ms", "number"),
    ("tokens_per_second", "tokens per second", "number"),
)
_FORMATS = {
    "share": lambda value: f"{100 * value:.1f} %",
    "number": lambda value: f"{value:,.{0 if value >= 1000 else 1}f}",
}


def write_report(workdir: str | pathlib.Path, path: str | pathlib.Path | None = None) -> pathlib.Path:
    """Write a run's page to `path`, by default WORKDIR/report.html, and return its path.

    Raises FileNotFoundError if there is no such run folder, or no folder for the page.
    """
    workdir = path_of(workdir)
    path = workdir / "report.html" if path is None else path_of(path)
    if not workdir.is_dir():
        raise FileNotFoundError(f"no run folder {workdir}")
    with reading(workdir / "config.json", MADE_ANEW):
        about = _about(read_object(workdir / "config.json"))
    with reading(workdir / "summary.json", MADE_ANEW):
        summary = read_object(workdir / "summary.json")
        held_out = {"entries": _entries(summary), "rows": _table_rows(summary), "failures": _failures(summary)}
    text = page.render(
        "report.html",
        name=workdir.resolve().name,
        about=about,
        **held_out,
        **training_parts(workdir),
        views=add_run_views(ThreadViews(), workdir),
        embed=page.embed,
    )
    write(path, text.encode())
    return path


def training_parts(run: pathlib.Path) -> dict[str, Any]:
    """Return a page's parts on a run's training: tables, panels, and the problems of its metrics."""
    with reading(run / "summary.json", MADE_ANEW):
        tables = behaviour_tables(evaluations(read_object(run / "summary.json")), [])
    metrics, problems = read_metrics(run)
    with reading(run / "metrics.jsonl", METRICS_ADVICE):
        tables += behaviour_tables({}, metrics)
        panels = [page.svg(body, charts.WIDTH, charts.HEIGHT) for body in training_panels(metrics)]
    return {"behaviour": tables, "panels": panels, "problems": problems}


def write_figure(workdir: str | pathlib.Path, path: str | pathlib.Path) -> None:
    """Write a run's picture, one rollout's threads above the main curves, as a standalone SVG at `path`.

    Raises ValueError if the run has neither rollouts nor metrics, or `path` does not end in .svg.
    """
    workdir, path = path_of(workdir), path_of(path)
    width, y, parts = 1000, 10, []
    rollouts = _rollouts(workdir)
    if rollouts:
        with reading(workdir / "rollouts.jsonl", MADE_ANEW):
            body, height = viewer.draw_threads(rollouts[0], width)
        parts.append(f'<g transform="translate(0,{y})">{body}</g>')
        y += height + 14
    with reading(workdir / "metrics.jsonl", METRICS_ADVICE):
        panels = training_panels(read_step_log(workdir / "metrics.jsonl").records)
    wanted = [
        panel
        for title in ("loss per token", "share of rollouts solved", "children per")
        for panel in panels
        if title in panel
    ]
    scale = (width - 20) / 3 / charts.WIDTH
    for column, body in enumerate(wanted[:3]):
        place = f"translate({10 + column * charts.WIDTH * scale:.1f},{y}) scale({scale:.4f})"
        parts.append(f'<g transform="{place}">{body}</g>')
    y += round(charts.HEIGHT * scale) + 10 if wanted else 0
    if not parts:
        raise ValueError(f"{workdir}: neither rollouts.jsonl nor metrics.jsonl holds anything to draw")
    write_svg(path, "".join(parts), width, y)


def write_svg(path: pathlib.Path, body: str, width: int, height: int) -> None:
    """Write a drawing with its own colours and background. Raise ValueError unless `path` ends in .svg."""
    if path.suffix != ".svg":
        raise ValueError(f"{path}: the figure is an SVG, so its name must end in .svg")
    write(path, page.standalone_svg(body, width, height).encode())


def add_run_views(views: ThreadViews, workdir: pathlib.Path) -> ThreadViews:
    """Add the rollouts of a run folder: those of its evaluations, then those that steps of GRPO learnt from."""
    with reading(workdir / "rollouts.jsonl", MADE_ANEW):
        for record in _rollouts(workdir):
            views.add(record.get("label", "rollouts").replace("_", ", "), record)
    paths = [path for path in (workdir / "grpo_rollouts").glob("*.jsonl") if path.stem.isdecimal()]
    for path in sorted(paths, key=lambda path: int(path.stem)):
        with reading(path, REMOVE):
            for record in read_jsonl(path):
                views.add(f"GRPO step {path.stem}", record)
    return views


def _rollouts(workdir: pathlib.Path) -> list[Mapping[str, Any]]:
    with reading(workdir / "rollouts.jsonl", MADE_ANEW):
        return pick_rollouts(read_jsonl(workdir / "rollouts.jsonl", MADE_ANEW))


def pick_rollouts(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the records that have a drawing, the most telling first.

    Solved ones with children come before others, and the last label before earlier ones (a run's "after" before its
    "before"). About eight children come first: enough to show the tree, few enough to read.
    """
    drawn = [record for record in records if record.get("calls")]
    labels = list(dict.fromkeys(record.get("label", "") for record in drawn))

    def rank(record: Mapping[str, Any]) -> tuple[bool, int, int]:
        children = int(record["num_children"])
        return not (record["correct"] and children > 1), -labels.index(record.get("label", "")), abs(children - 8)

    return sorted(drawn, key=rank)


def training_panels(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the SVG bodies of the panels that the run has data for."""
    bodies = []
    for phase, title, curves in _PANELS:
        drawn = [charts.series_of(metrics, phase, metric, label) for metric, label in curves.items()]
        series = [one for one in drawn if one is not None]
        if series:
            bodies.append(charts.line_chart(title, series, percent=next(iter(curves)) in _PERCENT))
    return bodies


def _entries(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the table's columns: one for each evaluation in summary.json, in its order."""
    return [
        {
            "name": name.replace("_", ", "),
            "accuracy": f"{100 * entry['accuracy']:.1f} %",
            "interval": f"{100 * entry['accuracy_low']:.1f} to {100 * entry['accuracy_high']:.1f}",
            "problems": f"{entry['num_problems']:,}",
            "value": round(100 * entry["accuracy"], 2),
            "low": round(100 * entry["accuracy_low"], 2),
            "high": round(100 * entry["accuracy_high"], 2),
        }
        for name, entry in evaluations(summary).items()
    ]


def _table_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    entries = list(evaluations(summary).values())
    rows = []
    for key, label, kind in _ROWS:
        if any(key in entry for entry in entries):
            cells = [_FORMATS[kind](entry[key]) if key in entry else "" for entry in entries]
            rows.append({"label": label, "cells": cells})
    return rows


def _failures(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the reasons of failures: a row a reason, the last entry's most frequent first, a cell an evaluation."""
    entries = list(evaluations(summary).values())
    counts = [entry.get("failures", {}) for entry in entries]
    reasons = sorted(
        {reason for count in counts for reason in count}, key=lambda r: [-c.get(r, 0) for c in counts[::-1]]
    )
    shares = [
        [count.get(reason, 0) / entry["num_problems"] for count, entry in zip(counts, entries, strict=True)]
        for reason in reasons
    ]
    return [
        {"label": reason.replace("_", " "), "cells": [f"{100 * share:.1f} %" if share else "" for share in row]}
        for reason, row in zip(reasons, shares, strict=True)
    ]


def _about(config: Mapping[str, Any]) -> str:
    """Return one line on what was trained, or nothing without a config.json."""
    if not config:
        return ""
    model, task, data = config["model"], config["task"], config["data"]
    problems = [f"{field.replace('_', ' ')} {task[field]}" for field in TASKS[task["name"]].problem_fields]
    return (
        f"{task['name']} ({', '.join(problems)}) · {data['method']} · {model['num_layers']} layers of width "
        f"{model['embed_dim']}, {model['max_seq_len']} tokens of context · seed {config['seed']}"
    )
