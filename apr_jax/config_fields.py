"""The ranges of the configuration's numbers. A field's type names its range: `lanes: Count`, `b1: Decay`.

A number must be finite and lie in its range, ends included. `config.check_range` says so, with the field's name.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any

LARGEST_INT = 2**31 - 1  # counts and sizes become int32 on the device
BY_DEVICES = -1  # as a count: the devices at hand decide it

# Below this a temperature counts as 0: logits divided by less would fall below masked ones, or overflow.
LEAST_TEMPERATURE = 1e-20


@dataclasses.dataclass(frozen=True)
class Range:
    """A closed interval of finite numbers."""

    low: float
    high: float
    rule: str = ""  # what follows a number outside in its message; "": the end that it lies beyond
    by_devices: bool = False  # BY_DEVICES is taken, too

    def fault(self, value: float) -> str | None:
        """Return what is wrong with a number, to be written behind it; None for one that lies in the range."""
        if self.low <= value <= self.high or (self.by_devices and value == BY_DEVICES):
            return None
        if isinstance(value, float) and not math.isfinite(value):
            return f" must be a finite number from {_shown(self.low)} to {_shown(self.high)}"
        end = f"least {_shown(self.low)}" if value < self.low else f"most {_shown(self.high)}"
        return self.rule or f" must be at {end}" + f", or {BY_DEVICES}: as the devices allow" * self.by_devices


ANY_NUMBER = Range(-1e30, 1e30)  # of a number whose type names no range

Count = Annotated[int, Range(1, LARGEST_INT)]
CountOrFit = Annotated[int, Range(1, LARGEST_INT, by_devices=True)]
Natural = Annotated[int, Range(0, LARGEST_INT)]
Length = Annotated[int, Range(1, 2**24)]  # tokens of a row or a thread
Layers = Annotated[int, Range(1, 10_000)]
Processes = Annotated[int, Range(1, 4_096)]
Devices = Annotated[int, Range(1, 65_536)]
DevicesOrAll = Annotated[int, Range(1, 65_536, by_devices=True)]
GroupSize = Annotated[
    int, Range(2, 1_000_000, ": an advantage needs at least 2 rollouts a prompt, and a million at most")
]
Seed = Annotated[int, Range(0, 2**63 - 1)]
Share = Annotated[float, Range(0.0, 1.0, " must lie in [0, 1]")]
ShareAbove0 = Annotated[float, Range(0.01, 1.0, " must lie in [0.01, 1]")]
ShareBelow1 = Annotated[float, Range(0.0, 0.99, " must lie in [0, 0.99]")]
Decay = Annotated[float, Range(0.0, 0.999999, " must lie in [0, 0.999999]")]  # of a moment: 1 would divide by zero
Rate = Annotated[float, Range(0.0, 100.0)]  # a learning rate, or what one is multiplied by
Weight = Annotated[float, Range(0.0, 1e6)]
Price = Annotated[float, Range(0.0, 1e6, " must be a number >= 0 (0 is free) and at most 1e6")]
Temperature = Annotated[float, Range(0.0, 1e6, " must be >= 0 (0 is greedy) and at most 1e6")]
Epsilon = Annotated[float, Range(1e-12, 0.1)]
Positive = Annotated[float, Range(1e-6, 1e12)]
Threshold = Annotated[float, Range(-1e6, 1e6)]


def number_range(hint: Any) -> Range | None:
    """Return the range of a type hint, read with its extras: that of the number, or of a tuple's numbers.

    None for a hint of something else than numbers.
    """
    if typing.get_origin(hint) is tuple:
        return number_range(typing.get_args(hint)[0])
    if typing.get_origin(hint) is Annotated:
        return next((extra for extra in hint.__metadata__ if isinstance(extra, Range)), None)
    return ANY_NUMBER if hint in (int, float) else None


@functools.cache
def ranges_of(section: Any) -> Mapping[str, Range]:
    """Return the range of each number, or tuple of numbers, among a dataclass's fields."""
    hints = typing.get_type_hints(section, include_extras=True)
    ranges = {name: number_range(hint) for name, hint in hints.items()}
    return MappingProxyType({name: found for name, found in ranges.items() if found is not None})


def numbers_of(section: Any) -> Iterator[tuple[str, float, Range]]:
    """Yield name, value and range of each number in a dataclass's own fields, also of those in tuples."""
    kind: Any = type(section)
    for name, allowed in ranges_of(kind).items():
        value = getattr(section, name)
        for number in value if isinstance(value, tuple) else (value,):
            yield name, number, allowed


def _shown(end: float) -> str:
    return f"{end:,}" if isinstance(end, int) else f"{end:g}"
