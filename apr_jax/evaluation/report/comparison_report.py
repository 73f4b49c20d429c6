"""A comparison as one self-contained page: the paper's figures beside ours, and the threads behind them.

The page is made from the folder of `launch/compare.py`, and from a training run's folder if one is named. It loads
nothing from anywhere else, and all model text is escaped.
"""

import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from apr_jax.evaluation.compare.store import read_records, read_results
from apr_jax.evaluation.metrics import wilson_interval
from apr_jax.evaluation.report import page, paper
from apr_jax.evaluation.report.curves import Curve, Point, accuracy_chart
from apr_jax.evaluation.report.paired_report import cell_name, compare, show_interval
from apr_jax.evaluation.report.run_report import add_run_views, training_parts
from apr_jax.evaluation.report.thread_view import ThreadViews
from apr_jax.files import reading, write

_WRAPPED = re.compile(r"(?P<kind>[a-z]+)@[0-9]+:(?P<inner>.+)")
_MAX_VIEW_BYTES = 2_500_000  # of rollouts; a page of this size opens at once

_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("total_tokens", "tokens, all threads", "number"),
    ("sequential_tokens", "tokens, one after the other", "number"),
    ("prefilled_tokens", "prefilled", "number"),
    ("peak_context", "peak context", "number"),
    ("flops", "MFLOP", "million"),
    ("children_per_rollout", "children", "number"),
    ("malformed_rate", "malformed", "share"),
    ("truncated_rate", "cut off", "share"),
    ("latency_ms", "latency, ms", "number"),
)
_FORMATS: Mapping[str, Callable[[float], str]] = {
    "share": lambda value: f"{100 * value:.1f} %",
    "number": lambda value: f"{value:,.{0 if value >= 100 else 1}f}",
    "million": lambda value: f"{value / 1e6:,.0f}",
}
_FIGURES = (
    ("context_window", "Accuracy against context window", "tokens that a thread may hold"),
    ("total_tokens", "Accuracy against all tokens", "tokens of all threads, mean of a problem"),
    ("sequential_tokens", "Accuracy against sequential tokens", "tokens one after the other, mean of a problem"),
    ("latency_ms", "Accuracy against latency", "milliseconds a problem, {lanes} lanes shared by {at_once}"),
    ("num_samples", "Several samples of a problem", "samples"),
)

Row = Mapping[str, Any]


def write_comparison(
    workdir: pathlib.Path, path: pathlib.Path, *, command: str, run: pathlib.Path | None = None
) -> None:
    """Write the page of a comparison to `path`.

    Args:
      workdir: the folder of `launch/compare.py`.
      path: where the page goes.
      command: the command that makes the page, for its foot.
      run: the folder of a training run. The page then also shows its behaviour under RL and its rollouts.

    Raises: FileNotFoundError if there are no results or records, ConfigError if they are damaged.
    """
    rows = read_results(workdir)
    if not rows:
        raise FileNotFoundError(f"{workdir}/results.jsonl: no finished cell; run launch/compare.py first")
    records = [read_records(workdir, row) for row in rows]
    with reading(workdir / "results.jsonl", "remove the damaged row, and launch/compare.py makes it anew"):
        text = _page(workdir, rows, records, command=command, run=run)
    write(path, text.encode())


def _page(
    workdir: pathlib.Path,
    rows: Sequence[Row],
    records: Sequence[Sequence[Row]],
    *,
    command: str,
    run: pathlib.Path | None,
) -> str:
    views = ThreadViews()
    _add_rollouts(views, rows, records)
    if run is not None:
        add_run_views(views, run)
    training = {"behaviour": [], "panels": [], "problems": ""} if run is None else training_parts(run)
    return page.render(
        "comparison.html",
        name=workdir.resolve().name,
        first=rows[0],
        columns=[label for key, label, _ in _COLUMNS if any(key in row for row in rows)],
        rows=[_table_row(row) for row in rows],
        against=cell_name(rows[0], rows),
        paired=[_paired(row, rows, records[0], own) for row, own in zip(rows[1:], records[1:], strict=True)],
        figures=[figure for key, title, x_label in _FIGURES if (figure := _figure(key, title, x_label, rows))],
        about_paper=paper.ABOUT,
        behaviour_of_paper=paper.BEHAVIOUR if run is not None else (),
        **training,
        run="" if run is None else str(run),
        views=views,
        command=command,
        commands=list(dict.fromkeys(row["command"] for row in rows)),
        embed=page.embed,
    )


def curves_of(key: str, rows: Sequence[Row]) -> list[Curve]:
    """Return our curves of one figure: accuracy against `key`.

    Against the context window, a curve is a method at one budget and temperature. Against a cost, it is all cells of a
    method at one temperature. A row of several samples also knows what fewer would have given (`pass_at_k` and its like
    in `evaluation.metrics.summarize`); against `num_samples` and all tokens, those are points too.
    """
    groups: dict[str, list[Point]] = {}
    several = len({row["temperature"] for row in rows}) > 1
    for row in rows:
        temperature = f", temperature {row['temperature']:g}" if several else ""
        for label, point in _points(key, row, rows):
            groups.setdefault(label + temperature, []).append(point)
    return [Curve(label, tuple(points)) for label, points in groups.items()]


def _points(key: str, row: Row, rows: Sequence[Row]) -> list[tuple[str, Point]]:
    """Return a row's points, each with its curve's label."""
    label, x = row["method"], row.get(key, 0)
    wrapper = _WRAPPED.fullmatch(row["method"])
    if wrapper is not None and key in ("num_samples", "total_tokens") and "pass_at_k" in row:
        return _points_at_k(key, row, rows, wrapper["kind"], wrapper["inner"])
    if key == "context_window" and row["budget"] is not None:
        label += f", budget {row['budget']}"
    point = Point(x, row["accuracy"], row["accuracy_low"], row["accuracy_high"], cell_name(row, rows))
    return [(label, point)] if x > 0 else []


def _points_at_k(key: str, row: Row, rows: Sequence[Row], kind: str, inner: str) -> list[tuple[str, Point]]:
    """Return the points of a row of several samples: one for each power of two below their number, and one for all.

    Only the row with the most samples at the largest window is drawn. Intervals are Wilson's, which is conservative for
    estimates from all samples.
    """
    alike = [
        other
        for other in rows
        if other["temperature"] == row["temperature"]
        and (match := _WRAPPED.fullmatch(other["method"])) is not None
        and (match["kind"], match["inner"]) == (kind, inner)
    ]
    if row is not max(alike, key=lambda other: (other["context_window"], len(other.get("pass_at_k", ())))):
        return []
    values, total = row[f"{kind}_at_k"], row["num_problems"]
    counts = sorted(
        {1 << power for power in range(len(values).bit_length()) if 1 << power <= len(values)} | {len(values)}
    )
    points = []
    for k in counts:
        x = k if key == "num_samples" else row["tokens_at_k"][k - 1]
        low, high = wilson_interval(round(total * values[k - 1]), total)
        points.append((f"{kind}@n of {inner}", Point(x, values[k - 1], low, high, f"{kind}@{k} of {inner}")))
    return [(label, point) for label, point in points if point.x > 0]


def _figure(key: str, title: str, x_label: str, rows: Sequence[Row]) -> dict[str, Any] | None:
    """Return a figure with its table and the paper's beside it, or None if there is nothing to draw."""
    curves = curves_of(key, rows)
    if not curves:
        return None
    at_once = rows[0].get("at_once")
    shared = {None: "all problems", 1: "its own threads"}.get(at_once, f"{at_once} problems")
    label = x_label.format(lanes=rows[0]["lanes"], at_once=shared)
    theirs = paper.CURVES.get(key)
    return {
        "key": key.replace("_", "-"),
        "title": title,
        "ours": _drawn("Ours", label, curves, 560),
        "paper": theirs and _drawn("The paper's", label.partition(",")[0], theirs, 380),
        "note": paper.NOTES[key],
        "x_label": label,
        "points": [
            {"name": point.name, "x": _FORMATS["number"](point.x), "y": show_interval(point.y, point.low, point.high)}
            for curve in curves
            for point in sorted(curve.points, key=lambda point: point.x)
        ],
    }


def _drawn(title: str, x_label: str, curves: Sequence[Curve], width: int) -> Markup:
    body, height = accuracy_chart(title, x_label, curves, width)
    return page.svg(body, width, height)


def _table_row(row: Row) -> dict[str, Any]:
    return {
        "method": row["method"],
        "budget": "" if row["budget"] is None else str(row["budget"]),
        "temperature": f"{row['temperature']:g}",
        "window": f"{row['context_window']:,}",
        "solved": show_interval(row["accuracy"], row["accuracy_low"], row["accuracy_high"]),
        "policy": f"{row['program']} with {row['checkpoint']}",
        "cells": [_FORMATS[kind](row[key]) for key, _, kind in _COLUMNS if key in row],
    }


def _paired(row: Row, rows: Sequence[Row], first: Sequence[Row], own: Sequence[Row]) -> dict[str, Any]:
    """Compare a row with the first one, problem by problem."""
    of = compare(first, own)
    accuracy = of["accuracy"]
    cells = [show_interval(accuracy.change, accuracy.change_low, accuracy.change_high, "+", " points")]
    for key in ("total_tokens", "sequential_tokens"):
        cells.append(show_interval(of[key].relative, of[key].relative_low, of[key].relative_high, "+"))
    return {"name": cell_name(row, rows), "cells": cells}


def _add_rollouts(views: ThreadViews, rows: Sequence[Row], records: Sequence[Sequence[Row]]) -> None:
    """Add the rollouts of one cell a method: the greediest at the largest window. All methods get the same problems."""
    best: dict[str, int] = {}
    for index, row in enumerate(rows):
        now = best.get(row["method"])
        if now is None or _rank(row) < _rank(rows[now]):
            best[row["method"]] = index
    kept = {method: [r for r in records[index] if r.get("calls")] for method, index in best.items()}
    for place in range(max(map(len, kept.values()))):
        for method, own in kept.items():
            if place < len(own) and views.size < _MAX_VIEW_BYTES:
                views.add(f"{method}, temperature {rows[best[method]]['temperature']:g}", own[place])


def _rank(row: Row) -> tuple[float, float, bool]:
    return row["temperature"], -row["context_window"], row["budget"] is not None
