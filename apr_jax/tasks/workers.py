"""Worker processes for pure functions. They end with their parent, and the death of one is one message.

Each worker has a pipe of its own: one that is killed, even in the middle of a result, shows as the end of its pipe and
leaves no lock behind on which the others would wait.
"""

import atexit
import itertools
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection
from typing import Any, TypeVar

_ITEMS_AHEAD = 4  # results a worker that may wait until they are asked for
_EXIT_SECONDS = 5.0  # in which a process whose pipe has ended is gone
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # a terminal sends them to all; the parent acts on them

_Item = TypeVar("_Item")
_T = TypeVar("_T")


def map_in_processes(function: Callable[[_Item], _T], items: Iterable[_Item], num_workers: int) -> Iterator[_T]:
    """Yield `function` of each item, in order, computed by worker processes (one worker: by this process).

    `function`, items and results must pickle, and `__main__` must be importable without side effects. An exception in
    `function` is raised here. Raises ChildProcessError if a worker dies.
    """
    if num_workers == 1:
        yield from map(function, items)
        return
    workers = [_Worker(function) for _ in range(num_workers)]

    def end() -> None:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()
            worker.pipe.close()
        workers.clear()

    atexit.register(end)  # where this is left unfinished: Python would send SIGTERM, which they block, and wait
    forget = atexit.unregister  # at the very end its module's names are gone
    try:
        yield from _in_order(workers, enumerate(items))
    finally:
        forget(end)
        end()


class _Worker:
    def __init__(self, function: Callable[[Any], Any]) -> None:
        # Spawned, not forked: the caller may have started JAX, whose threads a fork would cut off.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, function), daemon=True)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # the worker inherits it
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # the worker alone holds that end, so that its death ends the pipe

    def ask(self, number: int, item: Any) -> None:
        try:
            self.pipe.send((number, item))
        except OSError as error:
            raise self._death() from error

    def answer(self) -> tuple[int, Any]:
        """Return an item's number and its result. Raise what the function raised, or ChildProcessError."""
        try:
            number, result, error = self.pipe.recv()
        except (EOFError, OSError) as gone:
            raise self._death() from gone
        if error is not None:
            raise error
        return number, result

    def _death(self) -> ChildProcessError:
        self.process.join(_EXIT_SECONDS)
        code = self.process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"
        why = "; is memory short? Fewer of them (data.num_workers) need less" if code == -signal.SIGKILL else ""
        return ChildProcessError(f"worker process {self.process.pid} {how}{why}. The same command begins again")


def _in_order(workers: list[_Worker], numbered: Iterator[tuple[int, Any]]) -> Iterator[Any]:
    idle, busy = list(workers), dict[Any, _Worker]()
    results: dict[int, Any] = {}
    for wanted in itertools.count():
        while wanted not in results:
            while idle and len(results) < len(workers) * _ITEMS_AHEAD and (item := next(numbered, None)) is not None:
                worker = idle.pop()
                worker.ask(*item)
                busy[worker.pipe] = worker
            if not busy:
                return
            for pipe in connection.wait(list(busy)):
                worker = busy.pop(pipe)
                number, result = worker.answer()
                results[number] = result
                idle.append(worker)
        yield results.pop(wanted)


def _work(pipe: Any, function: Callable[[Any], Any]) -> None:
    """Answer the parent until it is gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            number, item = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer: tuple[int, Any, Exception | None] = (number, function(item), None)
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = (number, None, error)
        try:
            pipe.send(answer)
        except OSError:
            return


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
