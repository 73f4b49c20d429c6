"""Stopping a run by a signal, with everything saved, on all hosts of a job at the same step."""

import contextlib
import signal
import time
import types
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
from jax.sharding import Mesh

from apr_jax.parallel import hosts

T = TypeVar("T")

_LISTEN_SECONDS = 1.0


class StoppedError(Exception):
    """The run was asked to stop. What was finished is saved; starting again goes on."""


class StopSignal:
    """A request to stop, made by SIGTERM or SIGINT, which loops ask about. A second signal ends the process at once."""

    def __init__(self) -> None:
        self.requested = False
        self._signalled = False
        self._interrupting = False

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        """Handle the signals within the block. Main thread only."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let a signal raise StoppedError at once within the block, for long work that a restart repeats anyway."""
        self.check()
        self._interrupting = True
        try:
            yield
        finally:
            self._interrupting = False

    def agreed(self) -> bool:
        """Return True when it is time to stop. All hosts of a job ask once a step, and get the same answer."""
        return self.requested

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do `work` on all hosts of a job, and return each host's result. `work` itself calls nothing that they share.

        A restart repeats the work anyway, so a signal on any host raises StoppedError at once on all.
        """
        with self.interrupting():
            return [work()]

    def listen(self) -> None:
        """Raise StoppedError when another host was asked to stop. `together`'s work calls it now and then."""

    def check(self) -> None:
        """Raise StoppedError once a stop was requested."""
        if self.requested:
            raise StoppedError("stopped by a signal")

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        del frame
        if self._signalled:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.requested = self._signalled = True
        if self._interrupting:
            self.check()


class StopTogether(StopSignal):
    """The stop signal of a job of several hosts, any of which may be asked to stop. A step later all know it."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self._vote = hosts.Vote(mesh)
        self._listened = 0.0

    def agreed(self) -> bool:
        agreed = self._vote.cast(self.requested)
        self.requested |= agreed
        return agreed

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Interrupt nothing, because a host must not leave work that it shares with others (see `together`)."""
        yield

    def together(self, work: Callable[[], T]) -> list[T]:
        done: list[T] | None = None
        try:
            with super().interrupting():
                done = [work()]
        except StoppedError:
            hosts.tell_stop()
        everybody = hosts.gather(done)
        if None in everybody:  # only then: a signal that came meanwhile is this host's own knowledge
            self.requested = True
            self.check()
        return [result for results in everybody if results is not None for result in results]

    def listen(self) -> None:
        if time.monotonic() - self._listened > _LISTEN_SECONDS:
            self._listened = time.monotonic()
            self.requested |= hosts.was_told_stop()
            self.check()


def stop_signal(mesh: Mesh) -> StopSignal:
    """Make the stop signal of this process, which may be one host of a job over `mesh`."""
    return StopSignal() if jax.process_count() == 1 else StopTogether(mesh)
