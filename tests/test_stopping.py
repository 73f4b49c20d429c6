"""A signal stops a program with exit code 75 and one sentence, whoever catches exceptions on the way."""

import gc
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from apr_jax import stopping
from apr_jax.stopping import StoppedError, StopSignal

ROOT = pathlib.Path(__file__).parents[1]
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def _stopped(work):
    with StopSignal().listening() as stop, pytest.raises(StoppedError), stop.interrupting():
        work()


@pytest.mark.parametrize("number", SIGNALS)
def test_no_handler_of_errors_takes_a_stop_for_one(number):
    def read():
        try:
            signal.raise_signal(number)
        except Exception as error:
            raise ValueError("the data set is broken") from error

    _stopped(read)
    assert not issubclass(StoppedError, Exception)


class _Swallows:
    """Gets a signal while it is finalised, where Python prints and forgets exceptions."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


def _swallow():
    swallows = _Swallows()
    del swallows


def test_a_stop_lets_the_work_clean_up(monkeypatch):
    monkeypatch.setattr(stopping, "_INSIST_SECONDS", 0.05)
    cleaned = []

    def work():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            try:
                raise OSError("something else")
            except OSError:
                time.sleep(0.3)
            time.sleep(0.3)
            cleaned.append(True)

    _stopped(work)
    assert cleaned == [True]


class _Forgets:
    def __call__(self, phase, info):
        if phase == "start":
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_in_a_callback_of_the_garbage_collector_comes_again(monkeypatch):
    """As JAX has one, in which a tenth of all signals arrives while libraries load."""
    monkeypatch.setattr(stopping, "_INSIST_SECONDS", 0.05)
    forgets = _Forgets()

    def work():
        gc.callbacks.append(forgets)
        gc.collect()
        gc.callbacks.remove(forgets)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            pass
        pytest.fail("nobody stopped")

    _stopped(work)


def test_a_stop_that_got_lost_comes_again(monkeypatch):
    monkeypatch.setattr(stopping, "_INSIST_SECONDS", 0.05)

    def work():
        _swallow()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            pass
        pytest.fail("nobody stopped")

    _stopped(work)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_stop_that_got_lost_is_known_at_the_end_of_the_block():
    _stopped(_swallow)


def test_outside_of_interruptible_work_a_signal_only_asks():
    with StopSignal().listening() as stop:
        for number in SIGNALS[:1]:
            signal.raise_signal(number)
        assert stop.requested
        with pytest.raises(StoppedError), stop.interrupting():
            pytest.fail("began")


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal().listening() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


PROGRAM = """
import signal, sys, time
from apr_jax import entry
def main():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    print("at work", flush=True)
    for _ in range(2000):
        try:
            time.sleep(0.01)
            if sys.stdout.isatty():
                print(".", end="", flush=True)
        except Exception:
            print("broken", flush=True)
    return 3
entry.run(main)
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": ""}


@pytest.mark.heavy
@pytest.mark.parametrize("number", SIGNALS)
def test_a_program_that_is_stopped_says_so_in_a_line(number):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", PROGRAM], env=ENVIRONMENT, **pipes) as process:
        assert process.stdout.readline() == "at work\n"
        process.send_signal(number)
        output, errors = process.communicate(timeout=20)
    assert (process.returncode, output) == (75, "")
    assert errors == "-c: stopped by a signal; the same command starts again\n"


@pytest.mark.heavy
def test_a_closed_terminal_stops_a_program_that_writes_to_it():
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=ENVIRONMENT, preexec_fn=lambda: os.login_tty(theirs), pass_fds=[theirs]
    )
    os.close(theirs)
    seen = b""
    while b"at work" not in seen:
        seen += os.read(ours, 1000)
    os.close(ours)
    assert process.wait(timeout=20) == 75


INTERRUPTED = """
import sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
sys.argv = ["train.py"]
import runpy; runpy.run_path("launch/train.py", run_name="__main__")
"""


@pytest.mark.parametrize("name", ["apr_jax.config_dict", "apr_jax.reasoning.adaptive", "apr_jax.gguf_file"])
def test_an_interrupt_while_a_program_imports_ends_it_without_a_traceback(name):
    command = [sys.executable, "-c", INTERRUPTED.format(name=name)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_another_error_while_a_program_imports_keeps_its_traceback():
    code = "import apr_jax.interrupts; 1 / 0"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "ZeroDivisionError" in done.stderr
