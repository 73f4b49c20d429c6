"""The paper's claims (Pan et al., arXiv 2504.15466, sections 5.2 to 5.4) as one table, the paper's figures beside ours.

A claim whose parts are not done yet says so and has no figures.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from apr_jax.evaluation.compare.store import read_records, read_results
from apr_jax.evaluation.report.paired_report import Difference, compare, show_interval
from apr_jax.files import read_json
from apr_jax.reproduce.parts import OTHERS

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Claim:
    """One line of the table."""

    letter: str
    statement: str
    paper: str
    ours: str
    source: str  # the part whose command gave the figures


def claims(workdir: pathlib.Path) -> list[Claim]:
    """Read all claims from the folders of a reproduction."""
    return [claim for read in _CLAIMS for claim in read(workdir)]


def table(found: Sequence[Claim]) -> str:
    """Return the claims as a table in Markdown."""
    head = "| | claim | the paper | ours (95 %) | from |\n|---|---|---|---|---|\n"
    return head + "".join(f"| {c.letter} | {c.statement} | {c.paper} | {c.ours} | `{c.source}` |\n" for c in found)


class _Cells:
    """The cells of one comparison, with their problems' records."""

    def __init__(self, workdir: pathlib.Path, name: str) -> None:
        self._folder = workdir / "comparisons" / name
        self.source = f"compare_{name}"
        self.rows = read_results(self._folder)

    def of(self, method: str) -> list[Row]:
        """Return the cells of a row of --methods."""
        return [row for row in self.rows if row["method"] == method]

    def widest(self, method: str) -> Row | None:
        """Return its cell with the largest context window and budget."""
        return max(self.of(method), key=lambda row: (row["context_window"], row["budget"] or 0), default=None)

    def records(self, row: Row) -> list[dict[str, Any]]:
        """Return a cell's records, one a problem."""
        return read_records(self._folder, row)

    def difference(self, first: Row, second: Row) -> Mapping[str, Difference]:
        """Compare two cells, problem by problem."""
        return compare(self.records(first), self.records(second))


def _context(workdir: pathlib.Path) -> list[Claim]:
    cells = _Cells(workdir, "windows")
    found = []
    for stage, ending, paper in (("SFT", "", "75.5 - 57.3 = +18.2"), ("after RL", "_rl", "83.4 - 60.0 = +23.4")):
        adaptive, serial = cells.widest(f"adaptive{ending}"), cells.widest(f"serial{ending}")
        ours = _NOT_YET
        if adaptive and serial:
            of = cells.difference(serial, adaptive)["accuracy"]
            ours = f"{_share(adaptive)} - {_share(serial)} = {_points(of)} at {adaptive['context_window']:,} tokens"
        found.append(Claim("a", f"equal context, {stage}: adaptive - serial", paper, ours, cells.source))
    return found


def _tokens(workdir: pathlib.Path) -> list[Claim]:
    cells = _Cells(workdir, "tokens")
    adaptive = sorted(cells.of("adaptive_budget"), key=lambda row: row["total_tokens"])
    several = [row for row in cells.rows if row.get("cons_at_k") and "serial" in row["method"]]
    votes, passes = _NOT_YET, _NOT_YET
    if adaptive and several:
        votes, passes = _votes(adaptive, several), _passes(adaptive, several)
    statement = "equal tokens: adaptive against cons@n of serial"
    return [
        Claim("b", statement, "80.1 against 66.6 at 20k", votes, cells.source),
        Claim("b", "tokens to reach pass@8", "-57.4 %", passes, cells.source),
    ]


def _votes(adaptive: Sequence[Row], several: Sequence[Row]) -> str:
    """Compare budgets of adaptive, by their tokens, with the best vote of serial that takes no more tokens."""

    def best_vote(tokens: float) -> float:
        return max((accuracy for spent, accuracy in _by_tokens(several, "cons_at_k") if spent <= tokens), default=0.0)

    most = adaptive[-1]
    ahead = [row["total_tokens"] for row in adaptive if row["accuracy"] > best_vote(row["total_tokens"])]
    where = f"ahead from {ahead[0]:,.0f} tokens" if ahead else "never ahead"
    spent = most["total_tokens"]
    return f"{_share(most)} at {spent:,.0f} tokens, votes of serial {100 * best_vote(spent):.1f} % at most; {where}"


def _passes(adaptive: Sequence[Row], several: Sequence[Row]) -> str:
    """Find the fewest tokens at which adaptive solves as much as some of all samples of serial."""
    tokens, level = _by_tokens(several, "pass_at_k")[-1]
    there = (
        f"pass@{max(len(row['pass_at_k']) for row in several)} of serial {100 * level:.1f} % at {tokens:,.0f} tokens; "
    )
    for row in adaptive:
        if row["accuracy"] >= level:
            return f"{there}adaptive as much with {row['total_tokens'] / tokens - 1:+.1%}"
    return f"{there}adaptive {100 * max(row['accuracy'] for row in adaptive):.1f} % at most"


def _latency(workdir: pathlib.Path) -> list[Claim]:
    found = []
    for lanes in (1, 8, 64):
        cells = _Cells(workdir, f"latency_{lanes}")
        adaptive, serial = cells.widest("adaptive_rl"), cells.of("serial_rl")
        ours = _NOT_YET
        if adaptive and serial:
            within = [row for row in serial if row["latency_ms"] <= adaptive["latency_ms"]] or serial[:1]
            best = max(within, key=lambda row: row["accuracy"])
            gain = _points(cells.difference(best, adaptive)["accuracy"])
            told = [f"{_share(row)} at {row['latency_ms']:,.0f} ms" for row in (adaptive, best)]
            ours = f"{told[0]}, serial {told[1]} = {gain}"
        statement = f"equal latency, one problem at a time on {lanes} lane{'s' * (lanes > 1)}"
        found.append(Claim("c", statement, "75.2 against 57.3 at 5 s", ours, cells.source))
    return found


_AFTER_RL = {
    ("adaptive_rl", "accuracy"): "+7.9 points",
    ("adaptive_rl", "children_per_rollout"): "+34.4 %",
    ("adaptive_rl", "tokens_per_call"): "+22.1 %",
    ("adaptive_rl", "sequential_tokens"): "-",
    ("serial_rl", "accuracy"): "+2.7 points",
    ("serial_rl", "total_tokens"): "+20.9 %",
}


def _reinforcement(workdir: pathlib.Path) -> list[Claim]:
    found = []
    for (name, key), paper in _AFTER_RL.items():
        path = workdir / "runs" / name / "summary.json"
        ours = _NOT_YET
        if path.exists():
            summary = read_json(path)
            before, after = summary["before"], summary["after"]
            if key == "accuracy":
                ours = f"{_share(before)} to {_share(after)}"
            else:
                change = f" ({after[key] / before[key] - 1:+.1%})" if before[key] else ""
                ours = f"{before[key]:,.1f} to {after[key]:,.1f}{change}"
        found.append(Claim("d", f"RL of {name.removesuffix('_rl')}: {_WORDS[key]}", paper, ours, name))
    return found


def _width(workdir: pathlib.Path) -> list[Claim]:
    cells = _Cells(workdir, "width")
    before, after = cells.widest("adaptive_budget"), cells.widest("adaptive_budget_rl")
    ours = _NOT_YET
    if before and after:
        of = cells.difference(before, after)["accuracy"]
        ours = f"{_share(before)}, {_share(after)}: {_points(of)}"
    return [Claim("e", "ten children named in the prompt, before and after RL", "83.2, 83.3", ours, cells.source)]


def _path(workdir: pathlib.Path) -> list[Claim]:
    cells = _Cells(workdir, "path")
    without, priced = cells.widest("adaptive_rl"), cells.widest("adaptive_path")
    ours = _NOT_YET
    if without and priced:
        of = cells.difference(without, priced)
        chain = of["sequential_tokens"]
        interval = f"{chain.relative_low:+.1%} to {chain.relative_high:+.1%}"
        ours = f"{chain.relative:+.1%} ({interval}) on the longest chain, accuracy {_points(of['accuracy'])}"
    return [Claim("f", "a price on the longest chain: -25 % at no loss", "-", ours, cells.source)]


def _methods(workdir: pathlib.Path) -> list[Claim]:
    windows, cells = _Cells(workdir, "windows"), _Cells(workdir, "methods")  # of the same problems
    serial, found = windows.widest("serial"), []
    for name in OTHERS:
        other, ours = cells.widest(name), _NOT_YET
        if serial and other:
            of = compare(windows.records(serial), cells.records(other))["accuracy"]
            ours = f"{_share(other)} at {other['total_tokens']:,.0f} tokens, over serial {_points(of)}"
        found.append(Claim("-", f"equal context, SFT: {name}", "-", ours, cells.source))
    return found


_CLAIMS = (_context, _tokens, _latency, _reinforcement, _width, _path, _methods)
_NOT_YET = "not run yet"
_WORDS = {
    "accuracy": "solved",
    "children_per_rollout": "children",
    "tokens_per_call": "tokens per call",
    "sequential_tokens": "tokens one after the other",
    "total_tokens": "tokens",
}


def _share(row: Row) -> str:
    return show_interval(row["accuracy"], row["accuracy_low"], row["accuracy_high"])


def _points(of: Difference) -> str:
    return show_interval(of.change, of.change_low, of.change_high, "+", " points")


def _by_tokens(rows: Sequence[Row], key: str) -> list[tuple[float, float]]:
    """Return tokens and accuracy of the first k samples, for each k, of the row with most samples."""
    row = max(rows, key=lambda row: len(row[key]))
    return sorted(zip(row["tokens_at_k"], row[key], strict=True))
