"""A folder has one process that works in it; a dead one's lock is taken over, a live one's is named."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from apr_jax import lock
from apr_jax.lock import LockedError, locked

ADVICE = "wait for it"
HOLD = """
import pathlib, sys, time
from apr_jax.lock import locked
with locked(pathlib.Path(sys.argv[1]), "wait"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=pathlib.Path(__file__).parents[1])
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def _write_record(path, **changes):
    own = {"host": socket.gethostname(), "pid": os.getpid(), "started": lock._started(os.getpid()), "since": "then"}
    path.write_text(json.dumps(own | changes))


@pytest.fixture
def without_flock(monkeypatch):
    monkeypatch.setattr(lock, "_flock", lambda file: None)


def test_the_holder_is_named_and_its_death_frees_the_lock(tmp_path, holder):
    with pytest.raises(LockedError) as error, locked(tmp_path / "lock", ADVICE):
        pass
    assert str(error.value).startswith(f"{tmp_path}: process {holder.pid} on {socket.gethostname()}, since 20")
    assert str(error.value).endswith(f"works here; {ADVICE}")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path / "lock", ADVICE):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
        with pytest.raises(LockedError, match=str(os.getpid())), locked(tmp_path / "lock", ADVICE):
            pass
    assert list(tmp_path.iterdir()) == []


def test_who_waits_is_told_for_whom(tmp_path, holder):
    said = []

    def say(text):
        said.append(text)
        holder.kill()

    with locked(tmp_path / "lock", ADVICE, say):
        pass
    assert said == [said[0]]
    assert f"waiting for process {holder.pid}" in said[0]


def test_a_new_folder_that_was_not_needed_is_gone(tmp_path):
    with locked(tmp_path / "b" / "lock", ADVICE):
        pass
    assert not (tmp_path / "b").exists()
    with locked(tmp_path / "lock", ADVICE):
        (tmp_path / "result").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


@pytest.mark.parametrize("record", [b"", b"{", b"[]", b"\xff", b'{"host": 3}', b'{"pid": "x", "started": null}'])
def test_a_damaged_record_is_nobodys(tmp_path, record):
    (tmp_path / "lock").write_bytes(record)
    old = time.time() - 100
    os.utime(tmp_path / "lock", (old, old))
    with locked(tmp_path / "lock", ADVICE):
        pass


@pytest.mark.usefixtures("without_flock")
@pytest.mark.parametrize("changes", [{"pid": 2**22 + 1}, {"started": 1}, {"pid": None}, {"pid": "x"}])
def test_without_flock_a_dead_or_another_process_of_that_id_is_not_the_holder(tmp_path, changes):
    _write_record(tmp_path / "lock", **changes)
    with locked(tmp_path / "lock", ADVICE):
        pass


@pytest.mark.usefixtures("without_flock")
def test_without_flock_a_live_process_is_the_holder(tmp_path):
    _write_record(tmp_path / "lock")
    with pytest.raises(LockedError, match=f"process {os.getpid()}"), locked(tmp_path / "lock", ADVICE):
        pass


def test_another_hosts_lock_counts_while_it_is_renewed(tmp_path):
    _write_record(tmp_path / "lock", host="elsewhere")
    with pytest.raises(LockedError, match="if elsewhere has died"), locked(tmp_path / "lock", ADVICE):
        pass
    old = time.time() - 100
    os.utime(tmp_path / "lock", (old, old))
    with locked(tmp_path / "lock", ADVICE):
        pass


def test_a_lock_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_RENEW_SECONDS", 0.05)
    with locked(tmp_path / "lock", ADVICE):
        os.utime(tmp_path / "lock", (1, 1))
        time.sleep(0.5)
        assert (tmp_path / "lock").stat().st_mtime > 1
