"""Run a command as a job of several hosts, which are processes on this machine.

    python launch/local_hosts.py --hosts=2 --devices-per-host=2 -- \\
        python launch/train.py --config=configs/grpo.py:smoke

Each process learns its place from the environment (apr_jax/parallel/hosts.py) and splits its CPU into as many devices
as asked. Lines of output carry their host's name. SIGTERM, SIGINT and a closed terminal reach all hosts, which save and
exit with 75. When a host dies, a message names it and the others are ended; the same command resumes the job. No host
outlives the launcher.

Exit codes: 0 all done, 75 stopped by a signal with everything saved, 2 bad arguments, else that of the first host to
fail (128 + N if signal N killed it).
"""

import ctypes
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

from apr_jax import entry
from apr_jax.config import ConfigError
from apr_jax.stopping import leave_terminal

_HOSTS = entry.define_number("hosts", 2, "Number of processes.", low=1, high=1_024)
_DEVICES = entry.define_number("devices-per-host", 1, "CPU devices of each process.", low=1, high=4_096)

_GRACE_SECONDS = 5.0  # in which hosts may say why they fail, when one has failed
_POLL_SECONDS = 0.05
_FOREIGN = ("[Gloo] ",)  # lines that no user asked for
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclasses.dataclass(frozen=True)
class Host:
    """One process and the threads that print its lines."""

    name: str
    process: subprocess.Popen[str]
    printers: tuple[threading.Thread, ...]


def main(command: Sequence[str]) -> int:
    if not command:
        raise ConfigError("no command: local_hosts.py --hosts=2 --devices-per-host=2 -- COMMAND")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"  # free, until host 0 takes it
    hosts = [_start(command, _place(index, coordinator), f"host {index}") for index in range(_HOSTS.value)]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: _pass_on(hosts, number))
    try:
        return _wait(hosts)
    finally:
        _signal_all(hosts, signal.SIGKILL)
        for host in hosts:
            for printer in host.printers:
                printer.join()


def _place(index: int, coordinator: str) -> dict[str, str]:
    """Return the environment from which a process learns its place in the job."""
    return {
        "APR_HOSTS": str(_HOSTS.value),
        "APR_HOST": str(index),
        "APR_COORDINATOR": coordinator,
        "JAX_NUM_CPU_DEVICES": str(_DEVICES.value),
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "APR_HEARTBEAT_SECONDS": "3600",  # who dies is seen here; a machine that sleeps for a while kills nobody
        "APR_LAUNCHER": str(os.getpid()),  # a host ends with it
        "PYTHONUNBUFFERED": "1",
    }


def _start(command: Sequence[str], place: Mapping[str, str], name: str) -> Host:
    """Start a host apart from this terminal, so that its signals come from here alone."""
    process = subprocess.Popen(
        command,
        env={**os.environ, **place},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        process_group=0,
        preexec_fn=_end_with_launcher,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    streams = ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    printers = tuple(
        threading.Thread(target=_copy_lines, args=(source, target, name), daemon=True) for source, target in streams
    )
    for printer in printers:
        printer.start()
    return Host(name, process, printers)


def _end_with_launcher() -> None:
    """Let Linux kill this process when the launcher is gone. Elsewhere `parallel.hosts` ends it."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _copy_lines(source: IO[str], target: IO[str], name: str) -> None:
    for line in source:
        if not line.startswith(_FOREIGN):
            print(f"{name}: {line.rstrip()}", file=target, flush=True)


def _pass_on(hosts: Sequence[Host], number: int) -> None:
    if number == signal.SIGHUP:
        leave_terminal()
        number = signal.SIGTERM
    _signal_all(hosts, number)


def _signal_all(hosts: Sequence[Host], number: int) -> None:
    for host in hosts:
        if host.process.poll() is None:
            host.process.send_signal(number)


def _wait(hosts: Sequence[Host]) -> int:
    """Wait until every host has ended, or one has failed and the others had time to say why. Return the exit code."""
    while True:
        codes = [host.process.poll() for host in hosts]
        failed = [(host, code) for host, code in zip(hosts, codes, strict=True) if code not in (None, 0, entry.STOPPED)]
        if failed:
            break
        if None not in codes:
            return entry.STOPPED if entry.STOPPED in codes else 0
        time.sleep(_POLL_SECONDS)
    host, code = min(failed, key=lambda failure: failure[1] > 0)  # one that was killed: others may end because of it
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    print(f"{host.name} {how}: ending the other hosts. The same command resumes the job.", file=sys.stderr, flush=True)
    deadline = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < deadline and any(host.process.poll() is None for host in hosts):
        time.sleep(_POLL_SECONDS)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    sys.argv, words = sys.argv[:end], sys.argv[end + 1 :]
    entry.run(lambda: main(words))
