"""Stopping all hosts of a job at the same step, with everything saved, when any of them is asked to stop."""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

import jax
from jax.sharding import Mesh

from apr_jax.parallel import hosts
from apr_jax.stopping import StoppedError, StopSignal

T = TypeVar("T")

_LISTEN_SECONDS = 1.0


class StopTogether(StopSignal):
    """The stop signal of a job of several hosts, any of which may be asked to stop. A step later all know it."""

    _ends_waits = False  # a wait may be for the other hosts, who wait for this one

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

    def together(self, work: Callable[[], T], types: Collection[type] = ()) -> list[T]:
        done: list[T] | None = None
        try:
            with super().interrupting():
                done = [work()]
        except StoppedError:
            hosts.tell_stop()
        everybody = hosts.gather(done, types)
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
