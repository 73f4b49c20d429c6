"""Worker processes die with their parent, and one that is killed ends the work with one message, at any moment."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from apr_jax.config import ConfigError
from apr_jax.tasks.workers import map_in_processes

pytestmark = pytest.mark.heavy
ROOT = pathlib.Path(__file__).parents[2]


def _square(number):
    return number * number


def _die(item):
    """Dies while it works, or while it writes a result that no pipe holds at once."""
    number, how = item
    if number == 3 and how == "in a result":
        time.sleep(0.2)
        pid = os.getpid()
        subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(0.3); os.kill({pid}, 9)"])
        return os.urandom(1 << 28)
    if number == 3:
        os.kill(os.getpid(), how) if isinstance(how, signal.Signals) else os._exit(how)
    return b""


def _refuse(number):
    raise ConfigError(f"no {number}")


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order(workers):
    assert list(map_in_processes(_square, range(50), workers)) == [number * number for number in range(50)]
    assert list(map_in_processes(_square, [], workers)) == []


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (signal.SIGKILL, "was killed by SIGKILL; is memory short"),
        (signal.SIGSEGV, "was killed by SIGSEGV"),
        (7, "ended with 7"),
        (0, "ended with 0"),
        ("in a result", "was killed by SIGKILL"),
    ],
)
def test_the_death_of_a_worker_is_one_message(how, message):
    with pytest.raises(ChildProcessError, match=rf"worker process \d+ {message}"):
        list(map_in_processes(_die, [(number, how) for number in range(40)], 2))


def test_a_workers_exception_is_the_callers():
    with pytest.raises(ConfigError) as caught:
        list(map_in_processes(_refuse, range(5), 2))
    assert str(caught.value) in {f"no {number}" for number in range(5)}


PARENT = """
import os, signal, sys, time
from apr_jax.tasks.workers import map_in_processes
from tests.tasks.test_workers import SLOW
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
    print(os.getpid(), flush=True)
    for pid in map_in_processes(SLOW[sys.argv[1]], range(1000), 2):
        print(pid, flush=True)
"""


def _sleeping(number):
    time.sleep(0.01 if number < 4 else 100)
    return os.getpid()


def _computing(number):
    while number >= 4:
        pass
    return os.getpid()


SLOW = {"sleeping": _sleeping, "computing": _computing}


@pytest.mark.parametrize("doing", SLOW)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path, doing, number):
    """Also those in the middle of something: who reads the parent's output sees its end."""
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py"), doing]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as parent:
        lines = [parent.stdout.readline() for _ in range(5)]
        parent.send_signal(number)
        try:
            parent.communicate(timeout=10)  # to the end of its output, which workers hold too
        finally:
            parent.kill()
    for pid in {int(line) for line in lines[1:]}:
        deadline = time.monotonic() + 5
        while pathlib.Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not pathlib.Path(f"/proc/{pid}").exists()
