"""A signal ends any wait within seconds, and interrupts nothing that asks in time."""

import os
import signal
import threading
import time

import pytest

from apr_jax import stopping
from apr_jax.stopping import StoppedError, StopSignal


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(stopping, "_UNHEARD_SECONDS", 0.3)


@pytest.mark.parametrize(
    "wait",
    [threading.Event().wait, lambda: time.sleep(20), lambda: os.read(os.pipe()[0], 1), threading.Lock().acquire],
    ids=["event", "sleep", "pipe", "lock"],
)
def test_a_wait_ends(wait):
    if isinstance(getattr(wait, "__self__", None), type(threading.Lock())):
        wait()  # the second one waits
    began = time.monotonic()
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with StopSignal().listening(), pytest.raises(StoppedError):
        wait()
    assert time.monotonic() - began < 10


def test_saving_is_not_interrupted():
    with StopSignal().listening() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed()
        time.sleep(1)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_program_at_work_in_a_library_is_not_interrupted(monkeypatch):
    monkeypatch.setattr(stopping, "_LATE_SECONDS", -1.0)  # every alarm comes late
    with StopSignal().listening() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        assert stop.agreed()
