"""Stopping by a signal: SIGTERM, SIGINT (Ctrl-C) or SIGHUP (a closed terminal)."""

import contextlib
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

T = TypeVar("T")

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_INSIST_SECONDS = 0.3
_DEAF = ("__del__", "_xla_gc_callback")  # functions in which Python prints and forgets what is raised
_UNHEARD_SECONDS = 10.0
_LATE_SECONDS = 1.0


class StoppedError(BaseException):
    """The work was asked to stop. What was finished is saved; starting again goes on.

    Like KeyboardInterrupt this is no Exception, so that a handler of errors cannot take it for one.
    """


class StoppedAtOnceError(StoppedError):
    """A stop of a program that nothing else listened for: of this process alone, if it is one of several hosts."""


class StopSignal:
    """A request to stop, made by a signal, which loops ask about. A second signal ends the process at once.

    If nobody asks for ten seconds, because something waits for what does not come, StoppedError ends the wait.
    """

    _ends_waits = True

    def __init__(self, error: type[StoppedError] = StoppedError) -> None:
        self.requested = False
        self._error = error
        self._signalled = False
        self._interrupting = False
        self._heard = False
        self._due = 0.0  # when the alarm comes that ends a wait

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        """Handle the signals within the block, but no SIGHUP that `nohup` lets the process ignore. Main thread only."""
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        numbers = [number for number in _SIGNALS if number is not signal.SIGHUP or not ignored]
        before = {number: signal.signal(number, self._handle) for number in (*numbers, signal.SIGALRM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let a signal raise StoppedError at once within the block, for long work that a restart repeats anyway.

        What is raised in a finaliser or in a callback from C may get lost, so it is raised again and again until it
        arrives.
        """
        self.check()
        self._interrupting = True
        try:
            yield
        finally:
            self._interrupting = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.check()

    def agreed(self) -> bool:
        """Return True when it is time to stop. All hosts of a job ask once a step, and get the same answer."""
        self._hear()
        return self.requested

    def together(self, work: Callable[[], T], types: Collection[type] = ()) -> list[T]:
        """Do `work` on all hosts of a job, and return each host's result. `work` itself calls nothing that they share.

        A restart repeats the work anyway, so a signal on any host raises StoppedError at once on all. `types` are those
        of the result that hosts may send each other (`parallel/wire.py`).
        """
        with self.interrupting():
            return [work()]

    def listen(self) -> None:
        """Raise StoppedError when another host was asked to stop. `together`'s work calls it now and then."""

    def check(self) -> None:
        """Raise StoppedError once a stop was requested."""
        self._hear()
        if self.requested:
            raise self._error("stopped by a signal; the same command starts again")

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if number != signal.SIGALRM:
            if self._signalled:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            if number == signal.SIGHUP:
                leave_terminal()
            self.requested = self._signalled = True
        if self._interrupting:
            signal.setitimer(signal.ITIMER_REAL, _INSIST_SECONDS)
            if not _is_on_its_way(sys.exc_info()[1]) and not _is_deaf(frame):
                self.check()
        elif self.requested and self._ends_waits and not self._heard:
            self._end_wait(number)

    def _end_wait(self, number: int) -> None:
        """Raise StoppedError where nobody has asked for so long that the program must be waiting for something.

        An alarm that comes late found it at work in a library, after which it will ask.
        """
        if number == signal.SIGALRM and time.monotonic() - self._due < _LATE_SECONDS:
            self.check()
        self._due = time.monotonic() + _UNHEARD_SECONDS
        signal.setitimer(signal.ITIMER_REAL, _UNHEARD_SECONDS)

    def _hear(self) -> None:
        """Note that the program knows of the request. From then on it saves, for as long as that takes."""
        if self.requested and not self._heard:
            self._heard = True
            if not self._interrupting:
                signal.setitimer(signal.ITIMER_REAL, 0)


def _is_on_its_way(error: BaseException | None) -> bool:
    """Return True if the exception that is being handled is a stop, or came while one was."""
    while error is not None and not isinstance(error, StoppedError):
        error = error.__context__
    return error is not None


def _is_deaf(frame: types.FrameType | None) -> bool:
    """Return True if what is raised in this frame would get lost."""
    while frame is not None and frame.f_code.co_name not in _DEAF:
        frame = frame.f_back
    return frame is not None


def leave_terminal() -> None:
    """Send what is written to a terminal nowhere from now on: it is closed, and writing would fail."""
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None and stream.isatty():
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
