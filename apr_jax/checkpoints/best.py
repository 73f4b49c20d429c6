"""Validation scores of a phase's checkpoints, which `best.json` beside them keeps, and the best of them."""

import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from orbax.checkpoint.checkpoint_managers import PolicyCheckpointInfo, PreservationContext, PreservationPolicy

from apr_jax.checkpoints.integrity import CheckpointError
from apr_jax.checkpoints.phases import PhaseName
from apr_jax.files import FileError, read_json, reading, write_json

SCORES = "best.json"


class Measure(NamedTuple):
    """The metric that compares a phase's checkpoints."""

    name: str
    best_of: Callable[[Iterable[float]], float]
    lag: int  # a step's line of metrics.jsonl has the score of the checkpoint so many steps before


MEASURES = {"sft": Measure("validation_loss", min, 0), "grpo": Measure("validation_accuracy", max, 1)}


def read_scores(folder: pathlib.Path, phase: PhaseName) -> dict[int, float]:
    """Return the scores in a phase's folder by step, {} where nothing was validated yet."""
    path, measure = folder / SCORES, MEASURES[phase].name
    if not path.exists():
        return {}
    advice = "launch/train.py makes it anew from metrics.jsonl as the run goes on"
    scores = read_json(path, advice, CheckpointError, sealed=True, **{measure: dict})[measure]
    with reading(path, advice):
        return {int(step): float(value) for step, value in scores.items()}


def add_score(folder: pathlib.Path, phase: PhaseName, step: int, value: float) -> None:
    """Add a step's score, or replace it."""
    write_scores(folder, phase, {**read_scores(folder, phase), step: value})


def write_scores(folder: pathlib.Path, phase: PhaseName, scores: Mapping[int, float]) -> None:
    """Write the scores of a phase's steps."""
    named = {str(step): value for step, value in sorted(scores.items())}
    write_json(folder / SCORES, {MEASURES[phase].name: named}, sealed=True)


def mend_scores(folder: pathlib.Path, phase: PhaseName, records: Iterable[Mapping[str, Any]]) -> None:
    """Make a phase's scores anew from the lines of metrics.jsonl if their file is damaged or missing."""
    name, _, lag = MEASURES[phase]
    try:
        if (folder / SCORES).exists():
            read_scores(folder, phase)
            return
    except FileError as error:
        print(error, file=sys.stderr)
    found = {
        record["step"] - lag: float(value)
        for record in records
        if record["phase"] == phase and isinstance(value := record.get(name), int | float) and record["step"] > lag
    }
    if found or (folder / SCORES).exists():
        write_scores(folder, phase, found)


def best_step(folder: pathlib.Path, phase: PhaseName, steps: Iterable[int]) -> int | None:
    """Return the step with the best score among `steps`, the later of equals; None where none has a score."""
    scores = {step: value for step, value in read_scores(folder, phase).items() if step in set(steps)}
    if not scores:
        return None
    best = MEASURES[phase].best_of(scores.values())
    return max(step for step, value in scores.items() if value == best)


class PreserveBest(PreservationPolicy):
    """An Orbax policy that keeps the best of the checkpoints there are, whatever its age."""

    def __init__(self, folder: pathlib.Path, phase: PhaseName) -> None:
        self._folder, self._phase = folder, phase

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext
    ) -> Sequence[bool]:
        best = best_step(self._folder, self._phase, [checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step == best for checkpoint in checkpoints]
