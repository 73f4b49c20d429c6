"""The change in behaviour under RL, as tables: the paper's own (arXiv 2504.15466, section 5.4)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

Kind = Literal["share", "number"]

# Of summary.json's evaluations, and of GRPO's steps in metrics.jsonl.
_BEHAVIOUR: tuple[tuple[str, str, Kind], ...] = (
    ("accuracy", "solved", "share"),
    ("tokens_per_call", "tokens per call", "number"),
    ("children_per_rollout", "children per rollout", "number"),
    ("children_per_spawn", "children per spawn", "number"),
    ("spawn_depth", "levels of threads below the root", "number"),
    ("total_tokens", "tokens, all threads", "number"),
    ("sequential_tokens", "tokens, one after the other", "number"),
    ("malformed_rate", "malformed", "share"),
)
_OF_STEPS: tuple[tuple[str, str, Kind], ...] = (
    *_BEHAVIOUR,
    ("reward", "reward", "number"),
    ("no_signal_groups", "groups without signal", "share"),
    ("entropy", "entropy per token, nats", "number"),
    ("kl", "KL to the reference, nats", "number"),
    ("clip_fraction", "clipped tokens", "share"),
    ("importance_truncated", "truncated importance weights", "share"),
)


def behaviour_tables(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a run's tables: a title, the names of two columns, and rows of label, before, after and change.

    There is one table for each evaluation that summary.json has before and after, and one for GRPO's first and last
    steps:
    means over a quarter of the steps at either end, with the reasons of malformed rollouts. A change is in points for a
    share and in per cent otherwise. Figures that the run lacks are left out.
    """
    tables = []
    for name in summary:
        after = name.replace("before", "after", 1)
        if name.startswith("before") and after in summary:
            title = "Held-out problems" + name.removeprefix("before").replace("_", ", ")
            tables.append(_table(title, ("before", "after"), summary[name], summary[after], _BEHAVIOUR))
    steps = sorted((record for record in metrics if record["phase"] == "grpo"), key=lambda record: record["step"])
    if len(steps) > 1:
        count = max(1, len(steps) // 4)
        first, last = _mean(steps[:count]), _mean(steps[-count:])
        columns = (_steps_name(steps[:count]), _steps_name(steps[-count:]))
        reasons = sorted(key for key in {*first, *last} if key.startswith("malformed_reasons/"))
        rows = [*_OF_STEPS, *((key, f"malformed a step: {_words(key)}", "number") for key in reasons)]
        first, last = ({**dict.fromkeys(reasons, 0.0), **values} for values in (first, last))
        tables.append(_table("Training rollouts", columns, first, last, rows))
    return tables


def _table(
    title: str,
    columns: tuple[str, str],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    rows: Iterable[tuple[str, str, Any]],
) -> dict[str, Any]:
    shown = [
        {
            "label": label,
            "before": _shown(before[key], kind),
            "after": _shown(after[key], kind),
            "change": _change(before[key], after[key], kind),
        }
        for key, label, kind in rows
        if key in before and key in after
    ]
    return {"title": title, "columns": columns, "rows": shown}


def _shown(value: float, kind: Kind) -> str:
    if kind == "share":
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _change(before: float, after: float, kind: Kind) -> str:
    if kind == "share":
        return f"{100 * (after - before):+.1f} points"
    return f"{100 * (after / before - 1):+.1f} %" if before > 0 else ""


def _mean(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return each figure's mean over the steps. A reason that a step does not name counts 0 there."""
    totals: dict[str, float] = {}
    for record in steps:
        counts = {f"malformed_reasons/{key}": n for key, n in record.get("malformed_reasons", {}).items()}
        for key, value in {**record, **counts}.items():
            if isinstance(value, int | float):
                totals[key] = totals.get(key, 0.0) + value
    return {key: total / len(steps) for key, total in totals.items()}


def _steps_name(steps: Sequence[Mapping[str, Any]]) -> str:
    first, last = steps[0]["step"], steps[-1]["step"]
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _words(key: str) -> str:
    return key.partition("/")[2].replace("_", " ")
