"""Which checkpoint of a phase is the best by validation: `best.json` beside the checkpoints keeps every score."""

import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from orbax.checkpoint.checkpoint_managers import PolicyCheckpointInfo, PreservationContext, PreservationPolicy

from apr_jax.checkpoints.phases import Phase
from apr_jax.files import write_json


class Measure(NamedTuple):
    """What a phase's checkpoints are compared by, and how."""

    name: str
    best_of: Callable[[Iterable[float]], float]


MEASURES = {"sft": Measure("validation_loss", min), "grpo": Measure("validation_accuracy", max)}


def read_scores(folder: pathlib.Path, phase: Phase) -> dict[int, float]:
    """The scores of a phase's folder, by step; none where none were written."""
    path = folder / "best.json"
    if not path.exists():
        return {}
    scores = json.loads(path.read_text())[MEASURES[phase].name]
    return {int(step): float(value) for step, value in scores.items()}


def add_score(folder: pathlib.Path, phase: Phase, step: int, value: float) -> None:
    """Adds a step's score, or replaces it. Atomic."""
    scores = {**read_scores(folder, phase), step: value}
    write_json(folder / "best.json", {MEASURES[phase].name: dict(sorted(scores.items()))})


def best_step(folder: pathlib.Path, phase: Phase, steps: Iterable[int]) -> int | None:
    """The step with the best score among `steps`, the later of equal ones; None where none has a score."""
    scores = {step: value for step, value in read_scores(folder, phase).items() if step in set(steps)}
    if not scores:
        return None
    best = MEASURES[phase].best_of(scores.values())
    return max(step for step, value in scores.items() if value == best)


class PreserveBest(PreservationPolicy):
    """Keeps the best of the checkpoints there are, whatever its age."""

    def __init__(self, folder: pathlib.Path, phase: Phase) -> None:
        self._folder, self._phase = folder, phase

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext
    ) -> Sequence[bool]:
        del context
        best = best_step(self._folder, self._phase, [checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step == best for checkpoint in checkpoints]
