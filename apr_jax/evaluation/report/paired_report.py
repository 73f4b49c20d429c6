"""Paired comparisons of two policies on the same problems, and the training curves of several runs in one picture."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from apr_jax.evaluation.metrics import Z95
from apr_jax.evaluation.report import charts
from apr_jax.evaluation.report.run_files import read_metrics
from apr_jax.evaluation.report.run_report import write_svg

_RESAMPLES = 10_000
_DRAWS_AT_ONCE = 1_000_000
_PANELS = (
    ("sequential_tokens", "Training rollouts: tokens, one after the other", False),
    ("accuracy", "Training rollouts: solved", True),
    ("children_per_spawn", "Training rollouts: children per spawn", False),
)


@dataclasses.dataclass(frozen=True)
class Difference:
    """The second policy's mean of a figure against the first's over the same problems, with 95 % intervals."""

    first: float
    second: float
    change: float  # second - first
    change_low: float
    change_high: float
    relative: float  # second / first - 1
    relative_low: float
    relative_high: float


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare the figures of each problem under two policies.

    The change's interval is the normal one of the mean paired difference, the relative change's a percentile bootstrap
    over problems (10,000 resamples, seeded). Raises ValueError for unequal numbers of problems, or fewer than two.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"{len(first)} and {len(second)} figures: a comparison takes the same problems, 2 or more")
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    change = float(np.mean(b - a))
    half = Z95 * float(np.std(b - a, ddof=1)) / math.sqrt(len(a))
    rng = np.random.default_rng(0)
    ratios: list[float] = []
    while len(ratios) < _RESAMPLES:  # as many at once as memory takes easily
        many = min(_RESAMPLES - len(ratios), max(1, _DRAWS_AT_ONCE // len(a)))
        chosen = rng.integers(0, len(a), (many, len(a)))
        ratios += map(_ratio, b[chosen].mean(axis=1), a[chosen].mean(axis=1))
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Difference(
        first=float(a.mean()),
        second=float(b.mean()),
        change=change,
        change_low=change - half,
        change_high=change + half,
        relative=_ratio(b.mean(), a.mean()),
        relative_low=float(low),
        relative_high=float(high),
    )


def compare(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> dict[str, Difference]:
    """Compare two policies' records of the same problems (`evaluation.metrics.record_rollout`), figure by figure."""
    keys = {"accuracy": "correct", **{key: key for key in ("sequential_tokens", "total_tokens", "num_children")}}
    return {
        name: paired_difference([float(r[key]) for r in first], [float(r[key]) for r in second])
        for name, key in keys.items()
    }


def cell_name(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a row's method, with those of its other settings in which `rows` differ: "adaptive, temperature 1"."""
    words = {"budget": "budget {}", "temperature": "temperature {:g}", "context_window": "window {}"}
    told = [
        text.format(row[name])
        for name, text in words.items()
        if row[name] is not None and len({other[name] for other in rows}) > 1
    ]
    return ", ".join([row["method"], *told])


def show_interval(value: float, low: float, high: float, sign: str = "", unit: str = " %") -> str:
    """Return a share with its interval, in per cent or points: "75.5 % (73.1 to 77.8)"."""
    return f"{100 * value:{sign}.1f}{unit} ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"


def show_differences(label: str, against: str, differences: Mapping[str, Difference]) -> str:
    """Show the differences as text, one line a figure."""
    lines = [f"{label} against {against} (95 %, paired):"]
    for figure, d in differences.items():
        scale, unit = (100, " points") if figure == "accuracy" else (1, "")
        change = f"{scale * d.change:+.1f}{unit} ({scale * d.change_low:+.1f} to {scale * d.change_high:+.1f})"
        relative = f"{d.relative:+.1%} ({d.relative_low:+.1%} to {d.relative_high:+.1%})"
        lines.append(f"  {figure:18} {scale * d.first:.1f} -> {scale * d.second:.1f}: {change}, {relative}")
    return "\n".join(lines)


def show_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Show the rows of a comparison as a table of text."""
    columns = ("method", "budget", "temp.", "window", "solved (95 %)", "tokens", "sequential", "latency, ms")
    cells = [
        (
            row["method"],
            "" if row["budget"] is None else str(row["budget"]),
            f"{row['temperature']:g}",
            str(row["context_window"]),
            f"{row['accuracy']:.1%} ({row['accuracy_low']:.1%} to {row['accuracy_high']:.1%})",
            f"{row['total_tokens']:,.0f}",
            f"{row['sequential_tokens']:,.0f}",
            f"{row['latency_ms']:,.0f}",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in (columns, *cells)
    ]
    return "\n".join(line.rstrip() for line in lines)


def draw_runs(runs: Mapping[str, pathlib.Path], path: pathlib.Path) -> None:
    """Draw GRPO's curves of several runs, each under its name, as an SVG at `path`.

    Raises ValueError if `path` does not end in .svg, or no run has logged a step of GRPO.
    """
    metrics = {name: read_metrics(folder)[0] for name, folder in runs.items()}
    bodies: list[str] = []
    for key, title, percent in _PANELS:
        drawn = [charts.series_of(records, "grpo", key, name) for name, records in metrics.items()]
        series = [one for one in drawn if one is not None]
        if series:
            place = f"translate({10 + len(bodies) * (charts.WIDTH + 10)},10)"
            bodies.append(f'<g transform="{place}">{charts.line_chart(title, series, percent=percent)}</g>')
    if not bodies:
        raise ValueError(f"nothing to draw: no step of GRPO in {', '.join(map(str, runs.values()))}")
    write_svg(path, "".join(bodies), 10 + len(bodies) * (charts.WIDTH + 10), charts.HEIGHT + 20)


def _ratio(after: float, before: float) -> float:
    return float(after / before - 1) if before else 0.0
