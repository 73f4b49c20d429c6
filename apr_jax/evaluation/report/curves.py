"""Accuracy against cost, as SVG text: points with their 95 % intervals, and a curve a method.

Colours are CSS variables (templates/figure.css), as in charts.py. The markers' shapes tell curves apart without colour.
"""

import dataclasses
import html
import math
from collections.abc import Callable, Sequence

from apr_jax.evaluation.report.charts import nice_ticks

_LEFT, _RIGHT, _TOP, _BOTTOM, _LINE = 52, 18, 30, 42, 17
_COLOURS = 8
_LOG_FROM = 5.0  # a wider range than this factor is drawn on a logarithmic axis
_MARKS: tuple[Callable[[float, float], str], ...] = (
    lambda x, y: f"M{x - 4:.1f},{y:.1f}a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    lambda x, y: f"M{x - 3.6:.1f},{y - 3.6:.1f}h7.2v7.2h-7.2z",
    lambda x, y: f"M{x:.1f},{y - 4.8:.1f}l4.4,8h-8.8z",
    lambda x, y: f"M{x:.1f},{y - 5:.1f}l5,5l-5,5l-5,-5z",
)


@dataclasses.dataclass(frozen=True)
class Point:
    """One accuracy with its 95 % interval, as shares, its cost, and the name of its setting."""

    x: float
    y: float
    low: float
    high: float
    name: str


@dataclasses.dataclass(frozen=True)
class Curve:
    """One method's points, drawn in the order of x."""

    label: str
    points: tuple[Point, ...]


def accuracy_chart(
    title: str, x_label: str, curves: Sequence[Curve], width: int = 560, height: int = 330
) -> tuple[str, int]:
    """Draw an SVG group of `width` units, `height` of them below the legend, and return it with its height.

    The y axis runs from 0 to 100 %, the x axis is logarithmic if its range is wide. Raises ValueError if there is
    nothing to draw, and for x <= 0.
    """
    xs = [point.x for curve in curves for point in curve.points]
    if not xs or min(xs) <= 0:
        raise ValueError(f"chart {title!r}: no point to draw, or one at {min(xs, default=0)}")
    legend, top = _legend(curves, width)
    bottom = top + height - _BOTTOM
    x_of, ticks = _x_axis(min(xs), max(xs), width)

    def y_of(share: float) -> float:
        return bottom + (top - bottom) * share

    parts = [f'<text class="title" x="{_LEFT}" y="17">{html.escape(title)}</text>', *legend]
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1):
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{_LEFT - 7}" y="{y + 3.5:.1f}">{100 * tick:g} %</text>')
    for tick in ticks:
        parts.append(
            f'<line class="grid" x1="{x_of(tick):.1f}" x2="{x_of(tick):.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        )
        parts.append(f'<text class="tick" text-anchor="middle" x="{x_of(tick):.1f}" y="{bottom + 17}">{tick:,g}</text>')
    middle = (_LEFT + width - _RIGHT) / 2
    parts.append(
        f'<text class="note" text-anchor="middle" x="{middle}" y="{bottom + 34}">{html.escape(x_label)}</text>'
    )
    for index, curve in enumerate(curves):
        parts += _curve(curve, index, x_of, y_of)
    return "".join(parts), bottom + _BOTTOM


def _legend(curves: Sequence[Curve], width: int) -> tuple[list[str], int]:
    """Return the labels with their marks, in as many lines as they take, and the y where the drawing begins."""
    parts, x, y = [], float(_LEFT), _TOP + 6
    for index, curve in enumerate(curves):
        size = 36 + 6.0 * len(curve.label)
        if x > _LEFT and x + size > width - _RIGHT:
            x, y = float(_LEFT), y + _LINE
        parts.append(f'<path class="{_class("curve", index)}" d="M{x:.1f},{y}h18"/>')
        parts.append(f'<path class="{_class("dot", index)}" d="{_mark(index)(x + 9, y)}"/>')
        parts.append(f'<text class="legend" x="{x + 23:.1f}" y="{y + 3.5}">{html.escape(curve.label)}</text>')
        x += size
    return parts, y + 20


def _curve(curve: Curve, index: int, x_of: Callable[[float], float], y_of: Callable[[float], float]) -> list[str]:
    points = sorted(curve.points, key=lambda point: point.x)
    path = "M" + "L".join(f"{x_of(p.x):.1f},{y_of(p.y):.1f}" for p in points)
    parts = [f'<path class="{_class("curve", index)}" d="{path}"/>'] if len(points) > 1 else []
    for point in points:
        x, low, high = x_of(point.x), y_of(point.low), y_of(point.high)
        parts.append(
            f'<path class="{_class("curve interval", index)}" d="M{x - 3:.1f},{low:.1f}h6m-3,0V{high:.1f}m-3,0h6"/>'
        )
        interval = f"{100 * point.y:.1f} % ({100 * point.low:.1f} to {100 * point.high:.1f})"
        tip = f"{point.name}: {interval} at {_number(point.x)}"
        parts.append(
            f'<path class="{_class("dot", index)}" d="{_mark(index)(x, y_of(point.y))}">'
            f"<title>{html.escape(tip)}</title></path>"
        )
    return parts


def _x_axis(low: float, high: float, width: int) -> tuple[Callable[[float], float], list[float]]:
    """Return a function that places an x, and whole numbers to mark."""
    begin, end = _LEFT + 14, width - _RIGHT - 14
    if high / low > _LOG_FROM:
        first, last = math.log(low), math.log(high)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
        return lambda x: begin + (end - begin) * (math.log(x) - first) / (last - first), ticks
    if low == high:
        return lambda x: (begin + end) / 2, [low]
    room = 0.06 * (high - low)
    low, high = max(0.0, low - room), high + room
    return lambda x: begin + (end - begin) * (x - low) / (high - low), [
        tick for tick in nice_ticks(low, high, 5) if tick == round(tick)
    ]


def _class(kind: str, index: int) -> str:
    return f"{kind} c{index % _COLOURS}" + (" dashed" if index >= _COLOURS and "curve" in kind else "")


def _mark(index: int) -> Callable[[float, float], str]:
    return _MARKS[index % len(_MARKS)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"
