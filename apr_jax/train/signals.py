"""Stopping a run by a signal, with everything saved."""

import contextlib
import signal
import types
from collections.abc import Iterator


class StoppedError(Exception):
    """The run was asked to stop. What was finished is saved; starting again goes on."""


class StopSignal:
    """Turns SIGTERM and SIGINT into a request that loops ask about; a second signal ends the process at once."""

    def __init__(self) -> None:
        self.requested = False
        self._interrupting = False

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        """Handles the signals within the block. Main thread only."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within the block a signal raises StoppedError at once: for long work that is redone from its start anyway."""
        self.check()
        self._interrupting = True
        try:
            yield
        finally:
            self._interrupting = False

    def check(self) -> None:
        """Raises StoppedError once a stop was requested."""
        if self.requested:
            raise StoppedError("stopped by a signal")

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        del frame
        if self.requested:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.requested = True
        if self._interrupting:
            self.check()
