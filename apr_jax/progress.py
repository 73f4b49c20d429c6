"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Self, TextIO

from tqdm import tqdm

_LINE_SECONDS = 5.0


class Progress:
    """A count up to `total`, shown while it rises. `progress` makes one; use it as a context manager."""

    def __init__(self, total: int | None, desc: str, unit: str, stream: TextIO) -> None:
        self.total, self.desc, self.unit, self.done = total, desc, unit, 0
        self._stream = stream
        self._values: dict[str, str] = {}
        self._start = self._last_line = time.monotonic()
        self._bar = (
            tqdm(total=total, desc=desc, unit=f" {unit}", file=stream, dynamic_ncols=True, mininterval=0.1)
            if stream.isatty()
            else None
        )

    def update(self, n: int = 1, **values: float | str) -> None:
        """Add `n` to the count, and show `values` such as loss=0.31 beside it."""
        self.done += n
        self._values.update({name: _short(value) for name, value in values.items()})
        if self._bar is not None:
            self._bar.set_postfix(self._values, refresh=False)
            self._bar.update(n)
        elif time.monotonic() - self._last_line >= _LINE_SECONDS:
            self._last_line = time.monotonic()
            print(self._line(), file=self._stream, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        else:
            print(self._line("" if kind is None else " stopped"), file=self._stream, flush=True)

    def _line(self, suffix: str = "") -> str:
        seconds = time.monotonic() - self._start
        rate = self.done / seconds if seconds > 0 else 0.0
        parts = [f"{self.desc}: {self.done:,}" + ("" if self.total is None else f"/{self.total:,}") + f" {self.unit}"]
        parts.append(f"{_short(rate)} {self.unit}/s")
        parts.append(f"{_clock(seconds)} elapsed")
        if self.total is not None and 0 < self.done < self.total and not suffix:
            parts.append(f"{_clock((self.total - self.done) / rate)} left")
        parts += [f"{name} {value}" for name, value in self._values.items()]
        return ", ".join(parts) + suffix


def progress(total: int | None, desc: str, unit: str = "it", stream: TextIO | None = None) -> Progress:
    """Show progress on `stream` (standard error by default).

    A terminal gets a bar with the rate and the time left, anything else a plain line about every five seconds. A last
    line says what was done.

        with progress(total=100, desc="SFT", unit="step") as bar:
            bar.update(1, loss=0.3)
    """
    return Progress(total, desc, unit, sys.stderr if stream is None else stream)


def _short(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
