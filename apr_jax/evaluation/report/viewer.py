"""One rollout drawn as a tree of threads over time.

Each thread is a row, each call a bar, and x counts sequential tokens, which had to be written one after the other. Full
lines open children, dashed lines hand their results back. The critical path, the chain that `sequential_tokens` counts,
is marked.
"""

import dataclasses
import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from apr_jax.evaluation.report.charts import nice_ticks
from apr_jax.tasks.dialect import VALUES

_ROW, _BAR, _LEFT, _RIGHT, _TOP, _BOTTOM = 24, 15, 118, 96, 62, 34
_LEGEND = (("root", "parent"), ("", "child"), ("solved", "child with a right path"), ("failed", "malformed or cut off"))

ThreadPath = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Bar:
    """One call: tokens [begin, end) of the rollout's clock, on the row of its thread."""

    index: int  # in the record's calls
    path: ThreadPath
    row: int
    begin: int
    end: int
    critical: bool


def layout(calls: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """Place a record's calls on rows and clocks, the root first, children under their parent in spawn order."""
    paths = sorted({tuple(call["path"]) for call in calls})
    rows = {path: row for row, path in enumerate(paths)}
    critical = critical_threads(calls)
    bars = []
    for index, call in enumerate(calls):
        path, begin = tuple(call["path"]), int(call["clock_start"])
        end = begin + int(call["num_tokens"])
        bars.append(Bar(index, path, rows[path], begin, end, path in critical))
    return bars


def critical_threads(calls: Sequence[Mapping[str, Any]]) -> set[ThreadPath]:
    """Return the longest causal chain: the root and, for each spawn of a thread in it, its last child to end.

    A child that a sibling's success cancelled gives way to that sibling, which ended at the same clock.
    """
    ends: dict[ThreadPath, tuple[int, bool]] = {}
    for call in calls:
        path, end = tuple(call["path"]), int(call["clock_start"]) + int(call["num_tokens"])
        ends[path] = max(ends.get(path, (0, False)), (end, call["stop"] != "cancelled"))
    chain: set[ThreadPath] = {()}
    for path in sorted(ends, key=len):
        siblings = [other for other in ends if other[:-1] == path[:-1] and len(other) == len(path)]
        if path and path[:-2] in chain and path == max(siblings, key=lambda other: (ends[other], [-i for i in other])):
            chain.add(path)
    return chain


def draw_threads(record: Mapping[str, Any], width: int = 1000) -> tuple[str, int]:
    """Draw one record's rollout as an SVG body, a group of `width` units, and return it with its height.

    The record needs its "calls" (evaluation/run.py). All model text is escaped.
    """
    calls, results = record["calls"], {tuple(thread["path"]): thread["result"] for thread in record["threads"]}
    bars = layout(calls)
    last = max((bar.end for bar in bars), default=1) or 1
    height = _TOP + _ROW * (max(bar.row for bar in bars) + 1) + _BOTTOM

    def x_of(clock: float) -> float:
        return _LEFT + (width - _LEFT - _RIGHT) * clock / last

    parts = _frame(record, x_of, last, width, height)
    parts += _links(bars, x_of)
    for bar in bars:
        parts.append(_call(bar, calls[bar.index], results[bar.path], x_of))
    for path, row in sorted({(bar.path, bar.row) for bar in bars}):
        y = _y(row) + 4
        indent = 10 * (len(path) // 2)
        parts.append(f'<text x="{12 + indent}" y="{y:.1f}">{thread_name(path)}</text>')
        end = max(bar.end for bar in bars if bar.path == path)
        end = max(end, _resumed(bars, path, end) or 0)
        verdict = "" if results[path] == "no_solution" and path else results[path].replace("_", " ")
        parts.append(f'<text class="note" x="{x_of(end) + 8:.1f}" y="{y:.1f}">{html.escape(verdict)}</text>')
    return "".join(parts), height


def bar_class(result: str, path: ThreadPath) -> str:
    """Return the colour class of a thread's bars."""
    if not path:
        return "root"
    if result == "solved":
        return "solved"
    return "" if result in ("no_solution", "cancelled", "proposed", *VALUES) else "failed"


def thread_name(path: ThreadPath) -> str:
    """Return a thread's name for people: its spawn and its place in that, both counted from 1."""
    return f"child {path[-2] + 1}.{path[-1] + 1}" if path else "parent"


def problem_name(record: Mapping[str, Any]) -> str:
    """Return a record's problem for people: its title, and for Countdown its numbers and target."""
    return record["title"] if "title" in record else f"{', '.join(map(str, record['numbers']))} to {record['target']}"


def describe(record: Mapping[str, Any]) -> str:
    """Describe the drawing in one line."""
    solved = "solved" if record["correct"] else f"not solved ({record['verdict'].replace('_', ' ')})"
    return (
        f"{problem_name(record)}: {solved} · {record['num_children']} children · "
        f"{record['total_tokens']:,} tokens in all, {record['sequential_tokens']:,} one after the other"
    )


def _frame(record: Mapping[str, Any], x_of: Callable[[float], float], last: int, width: int, height: int) -> list[str]:
    parts = [f'<text class="title" x="12" y="20">{html.escape(describe(record))}</text>']
    x = 12.0
    for name, label in _LEGEND:
        parts.append(f'<rect class="bar {name}" x="{x}" y="32" width="16" height="9" rx="2"/>')
        parts.append(f'<text class="legend" x="{x + 21}" y="40.5">{label}</text>')
        x += 38 + 5.6 * len(label)
    parts.append(f'<line class="link critical" x1="{x}" x2="{x + 18}" y1="36.5" y2="36.5"/>')
    parts.append(f'<text class="legend" x="{x + 23}" y="40.5">critical path</text>')
    for tick in nice_ticks(0, last, 6):
        x = x_of(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{height - _BOTTOM + 2}"/>')
        parts.append(f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{height - 17}">{tick:g}</text>')
    parts.append(f'<text class="note" text-anchor="end" x="{width - 8}" y="{height - 17}">sequential tokens</text>')
    return parts


def _call(bar: Bar, call: Mapping[str, Any], result: str, x_of: Callable[[float], float]) -> str:
    """Draw a bar, with a text for pointers (title) and screen readers (label) alike."""
    tip = (
        f"{thread_name(bar.path)}, {result.replace('_', ' ')}: {call['num_tokens']} tokens from {bar.begin} on, "
        f"stop: {call['stop']}, {call['start_ms']:.0f} to {call['end_ms']:.0f} ms"
    )
    classes = " ".join(filter(None, ("bar", bar_class(result, bar.path), "critical" if bar.critical else "")))
    size = max(2.0, x_of(bar.end) - x_of(bar.begin))
    return (
        f'<g class="call" data-call="{bar.index}" role="button"><title>{html.escape(tip)}</title>'
        f'<rect class="{classes}" x="{x_of(bar.begin):.1f}" y="{_y(bar.row) - _BAR / 2:.1f}" width="{size:.1f}" '
        f'height="{_BAR}" rx="3"/></g>'
    )


def _links(bars: Sequence[Bar], x_of: Callable[[float], float]) -> list[str]:
    """Draw the spawn and join lines, the critical ones last so that they lie on top."""
    plain: list[str] = []
    marked: list[str] = []
    spans: dict[ThreadPath, tuple[int, int, int, bool]] = {}
    for bar in bars:
        begin, end, row, critical = spans.get(bar.path, (bar.begin, bar.end, bar.row, bar.critical))
        spans[bar.path] = (min(begin, bar.begin), max(end, bar.end), row, critical)
    for path, (begin, end, row, critical) in spans.items():
        if not path:
            continue
        resumed = _resumed(bars, path, end)
        parent_row = next((bar.row for bar in bars if bar.path == path[:-2]), 0)
        x, mark = x_of(begin), " critical" if critical else ""
        lines = [f'<path class="link{mark}" d="M{x:.1f},{_y(parent_row) + _BAR / 2:.1f}V{_y(row):.1f}h3"/>']
        if resumed is not None:
            back, below = x_of(resumed), _y(parent_row) + _BAR / 2
            lines.append(
                f'<path class="link join{mark}" d="M{x_of(end):.1f},{_y(row):.1f}H{back:.1f}V{below + 6:.1f}"/>'
            )
            lines.append(f'<path class="head{mark}" d="M{back - 4:.1f},{below + 8:.1f}h8l-4,-7z"/>')
        (marked if critical else plain).extend(lines)
    return plain + marked


def _resumed(bars: Sequence[Bar], path: ThreadPath, end: int) -> int | None:
    """Return the clock at which the parent of `path` went on after `end`. None if it never did, or for the root."""
    return min((bar.begin for bar in bars if path and bar.path == path[:-2] and bar.begin >= end), default=None)


def _y(row: int) -> float:
    return _TOP + _ROW * (row + 0.5)
