"""Line charts as SVG text. Colours are CSS variables (templates/figure.css), so one drawing serves light and dark."""

import dataclasses
import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 380, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 46, 30
_MAX_POINTS = 240  # longer curves are averaged in bins


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve: `steps` in ascending order, with one value each."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]


def series_of(records: Iterable[Mapping[str, Any]], phase: str, metric: str, label: str) -> Series | None:
    """Return the curve of a metric that a phase logged in metrics.jsonl; of a step's records the last counts."""
    logged = (record for record in records if record["phase"] == phase and record.get(metric) is not None)
    values = {record["step"]: record[metric] for record in logged}
    steps = sorted(values)
    return Series(label, steps, [values[step] for step in steps]) if steps else None


def line_chart(title: str, series: Sequence[Series], *, percent: bool = False) -> str:
    """Draw an SVG group of WIDTH x HEIGHT units with axes, a legend and one curve a series.

    Values that are not finite are left out. Raises ValueError if none remain.
    """
    series = [_finite(one) for one in series]
    series = [_binned(one) for one in series if one.steps]
    if not series:
        raise ValueError(f"chart {title!r}: no finite value to draw")
    x_ticks = nice_ticks(min(s.steps[0] for s in series), max(s.steps[-1] for s in series), 4)
    low, high = min(min(s.values) for s in series), max(max(s.values) for s in series)
    if low >= 0 and low < 0.6 * high:
        low = 0.0
    y_ticks = nice_ticks(low, min(high, 1.0) if percent else high, 4)
    x_of = _scale(min(s.steps[0] for s in series), max(s.steps[-1] for s in series), _LEFT, WIDTH - _RIGHT)
    y_of = _scale(min(low, y_ticks[0]), max(high, y_ticks[-1]), HEIGHT - _BOTTOM, _TOP)
    parts = [f'<text class="title" x="{_LEFT}" y="17">{html.escape(title)}</text>']
    for tick in y_ticks:
        label = f"{100 * tick:g} %" if percent else _number(tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y_of(tick):.1f}" y2="{y_of(tick):.1f}"/>'
        )
        parts.append(f'<text class="tick" text-anchor="end" x="{_LEFT - 7}" y="{y_of(tick) + 3.5:.1f}">{label}</text>')
    for tick in x_ticks:
        if tick == round(tick):  # a step is whole
            parts.append(
                f'<text class="tick" text-anchor="middle" x="{x_of(tick):.1f}" y="{HEIGHT - 10}">{_number(tick)}</text>'
            )
    legend_x = float(_LEFT)
    for index, one in enumerate(series):
        parts += _curve(one, index, x_of, y_of, percent)
        parts.append(f'<line class="curve c{index}" x1="{legend_x}" x2="{legend_x + 14}" y1="31" y2="31"/>')
        parts.append(f'<text class="legend" x="{legend_x + 19}" y="34.5">{html.escape(one.label)}</text>')
        legend_x += 34 + 6.0 * len(one.label)
    return "".join(parts)


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers in [low, high], at least one."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= raw - 1e-12 * power)
    first = math.ceil(low / step - 1e-9)
    ticks = [round(step * k, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]
    return ticks or [low]


def _curve(
    one: Series, index: int, x_of: Callable[[float], float], y_of: Callable[[float], float], percent: bool
) -> list[str]:
    points = [(x_of(x), y_of(y)) for x, y in zip(one.steps, one.values, strict=True)]
    path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = [f'<path class="curve c{index}" d="{path}"/>']
    radius = 2.6 if len(points) <= 40 else 1.4
    for (x, y), step, value in zip(points, one.steps, one.values, strict=True):
        shown = f"{100 * value:.1f} %" if percent else f"{value:.4g}"
        tip = f"{html.escape(one.label)}, step {_number(step)}: {shown}"
        parts.append(
            f'<circle class="dot c{index}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{tip}</title></circle>'
        )
    return parts


def _finite(one: Series) -> Series:
    kept = [(x, y) for x, y in zip(one.steps, one.values, strict=True) if math.isfinite(y)]
    return Series(one.label, [x for x, _ in kept], [y for _, y in kept])


def _binned(one: Series) -> Series:
    size = -(-len(one.steps) // _MAX_POINTS)
    bins = range(0, len(one.steps), size)
    mean = [(sum(one.steps[i : i + size]), sum(one.values[i : i + size]), len(one.steps[i : i + size])) for i in bins]
    return Series(one.label, [x / n for x, _, n in mean], [y / n for _, y, n in mean])


def _scale(low: float, high: float, begin: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: begin + (end - begin) * (value - low) / span


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
