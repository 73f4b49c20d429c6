"""The lines of metrics.jsonl, one a finished step, with a word for each that is damaged or missing."""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from apr_jax.checkpoints.phases import PHASES, PhaseName
from apr_jax.files import parse_json


class StepLog(NamedTuple):
    """The steps that a file holds."""

    records: list[dict[str, Any]]
    lines: list[bytes]  # of the records, as they stand
    damage: list[str]  # "line 7 is damaged: not UTF-8 (byte 3)"


def read_step_log(path: pathlib.Path) -> StepLog:
    """Read the lines of a file, none where there is no file. A torn last line, as a killed run leaves, is no damage."""
    whole, _, _ = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
    log = StepLog([], [], [])
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            log.records.append(_record(line))
            log.lines.append(line + b"\n")
        except ValueError as error:
            log.damage.append(f"line {number} is damaged: {error}")
    return log


def missing_steps(records: Iterable[Mapping[str, Any]], done: Mapping[PhaseName, int]) -> list[str]:
    """Return "steps 3 to 5 of sft are missing" for each phase that lacks a record of its first `done` steps."""
    there = {(record["phase"], record["step"]) for record in records}
    found = []
    for phase, last in done.items():
        if missing := [step for step in range(1, last + 1) if (phase, step) not in there]:
            found.append(f"{_steps(missing)} of {phase} {'is' if len(missing) == 1 else 'are'} missing")
    return found


def place(phase: str, step: int) -> tuple[int, int]:
    """Return what orders the steps of a run."""
    return PHASES.index(phase), step


def _record(line: bytes) -> dict[str, Any]:
    record = parse_json(line)
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    if record.get("phase") not in PHASES:
        raise ValueError(f"phase {record.get('phase')!r:.40} is none of {', '.join(PHASES)}")
    step = record.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 1:
        raise ValueError(f"step {step!r:.40} is no whole number above 0")
    return record


def _steps(numbers: Iterable[int]) -> str:
    """Return "step 3", or "steps 3 to 5 and 9"."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    words = [str(first) if first == last else f"{first} to {last}" for first, last in ranges]
    if len(words) > 6:
        words = [*words[:5], f"{len(words) - 5} more ranges"]
    plural = len(ranges) > 1 or ranges[0][0] != ranges[0][1]
    return f"step{'s' if plural else ''} " + " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
