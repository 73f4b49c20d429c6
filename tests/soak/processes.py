"""Runs of launch/train.py as processes of their own, and what they leave behind."""

import contextlib
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from tests.launch.processes import environment

LONGEST = 600.0  # seconds that any run may take


class Run:
    """A command with its output in a file, so that no pipe is ever full."""

    def __init__(self, command: Sequence[str], place: pathlib.Path, mark: str, max_file_bytes: int | None = None):
        self.mark = mark  # in the environment of it and of all that it starts
        self._output = place / f"output-{time.monotonic_ns()}.txt"
        shared = environment(place, GLIBC_TUNABLES="", SOAK_MARK=mark)  # the first: no second start for huge pages
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *command], cwd=place, env=shared, stdout=output, stderr=subprocess.STDOUT
            )
        if max_file_bytes is not None:
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))

    @property
    def text(self) -> str:
        return self._output.read_text(encoding="utf-8", errors="replace")

    def wait(self, seconds: float = LONGEST) -> int:
        """Returns the exit code. Raises TimeoutError for a run that hangs, which is then killed."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            kill_all(self.mark)
            raise TimeoutError(f"no end after {seconds:.0f} s:\n{self.text[-3_000:]}") from None

    def end_within(self, seconds: float, what: Callable[[], None]) -> int | None:
        """Waits so long, does `what` if the run still goes on, and returns the exit code if it has ended by itself."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            what()
            return None


def marked(mark: str) -> list[int]:
    """Returns the ids of all living processes with this mark in their environment."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            has_mark = f"SOAK_MARK={mark}\0".encode() in (folder / "environ").read_bytes()
            dead = (folder / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            continue
        if has_mark and not dead:
            found.append(int(folder.name))
    return found


def kill_all(mark: str) -> None:
    """Kills all processes with this mark."""
    for pid in marked(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def assert_no_orphans(mark: str, seconds: float = 10.0) -> None:
    """Raises AssertionError if processes with this mark are alive after so many seconds."""
    deadline = time.monotonic() + seconds
    while left := marked(mark):
        assert time.monotonic() < deadline, f"processes {left} outlive the run that started them"
        time.sleep(0.05)
