"""The names of a run's phases, in their order."""

from typing import Literal

PhaseName = Literal["sft", "grpo"]
PHASES: tuple[PhaseName, ...] = ("sft", "grpo")
