"""The phases of a run, in their order."""

from typing import Literal

Phase = Literal["sft", "grpo"]
PHASES: tuple[Phase, ...] = ("sft", "grpo")
