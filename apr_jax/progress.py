"""Progress of long work: a bar on a terminal, plain lines elsewhere. Nothing is silent for long."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self, TextIO

from tqdm import tqdm

_LINE_SECONDS = 5.0
_QUIET_SECONDS = 2.0  # work that takes no longer needs no line


class _Ticker:
    """A thread that calls `tick` after `first` seconds, and then every `every` seconds."""

    def __init__(self, tick: Callable[[], None], first: float, every: float) -> None:
        self._tick, self._first, self._every = tick, first, every
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Return when no tick will follow."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        wait = self._first
        while not self._ended.wait(wait):
            self._tick()
            wait = self._every


class Progress:
    """A count up to `total`, shown while it rises. `progress` makes one; use it as a context manager."""

    def __init__(self, total: int | None, desc: str, unit: str, stream: TextIO) -> None:
        self.total, self.desc, self.unit, self.done = total, desc, unit, 0
        self._stream = stream
        self._values: dict[str, str] = {}
        self._start = time.monotonic()
        self._last_line = self._start - _LINE_SECONDS + _QUIET_SECONDS
        self._bar = (
            tqdm(total=total, desc=desc, unit=f" {unit}", file=stream, dynamic_ncols=True, mininterval=0.1)
            if stream.isatty()
            else None
        )

    def update(self, n: int = 1, **values: float | str) -> None:
        """Add `n` to the count, and show `values` such as loss=0.31 beside it."""
        self.done += n
        self._values = {**self._values, **{name: _short(value) for name, value in values.items()}}
        if self._bar is not None:
            self._bar.set_postfix(self._values, refresh=False)
            self._bar.update(n)
        elif self.done != self.total:  # then the last line follows
            self._show_line()

    def __enter__(self) -> Self:
        self._ticker = _Ticker(self._show_line if self._bar is None else self._bar.refresh, 1.0, 1.0)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ticker.stop()
        if self._bar is not None:
            self._bar.close()
        else:
            _print(self._line("" if kind is None else " stopped"), self._stream)

    def _show_line(self) -> None:
        if time.monotonic() - self._last_line >= _LINE_SECONDS:
            self._last_line = time.monotonic()
            _print(self._line(), self._stream)

    def _line(self, suffix: str = "") -> str:
        seconds = time.monotonic() - self._start
        rate = self.done / seconds if seconds > 0 else 0.0
        parts = [f"{self.desc}: {self.done:,}" + ("" if self.total is None else f"/{self.total:,}") + f" {self.unit}"]
        parts.append(f"{_short(rate)} {self.unit}/s")
        parts.append(f"{_clock(seconds)} elapsed")
        if self.total is not None and 0 < self.done < self.total and rate > 0 and not suffix:
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


@contextlib.contextmanager
def busy(what: str, stream: TextIO | None = None) -> Iterator[None]:
    """Say on `stream` (standard error by default) what the block does, every few seconds once it takes longer."""
    began, target = time.monotonic(), sys.stderr if stream is None else stream
    ticker = _Ticker(
        lambda: _print(f"{what}: {_clock(time.monotonic() - began)}", target), _QUIET_SECONDS, _LINE_SECONDS
    )
    try:
        yield
    finally:
        ticker.stop()


def _print(line: str, stream: TextIO) -> None:
    """Print a line. That a terminal is gone, or nobody reads a pipe, stops no work."""
    with contextlib.suppress(OSError):
        print(line, file=stream, flush=True)


def _short(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
