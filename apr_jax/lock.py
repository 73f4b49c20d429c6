"""A lock on a folder, so that one process at a time works there. The lock's file says which.

The system's own lock (flock) goes with its process, so a killed one leaves nothing to clean up. Some file systems have
no such lock, and on some it does not reach other hosts. So the file also records its holder. A process of this host is
looked up; one of another host renews the record while it lives. In an object store there is the record alone, with the
time of its last renewal by its holder's clock.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from apr_jax.config import ConfigError
from apr_jax.files import naming, parse_json, write
from apr_jax.paths import is_remote

_RENEW_SECONDS = 10.0
_LIFE_SECONDS = 60.0  # a record of another host that is older belongs to a dead process
_POLL_SECONDS = 0.2
_SETTLE_SECONDS = 1.0  # after which of two records that were written to a store at once the later one is there
_RENEWED = "renewed"  # the field of a record in a store
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


class LockedError(ConfigError):
    """A folder that another process works in. The message names the process, its host, and what to do."""


@contextlib.contextmanager
def locked(path: pathlib.Path, advice: str, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock `path` within the block, and take over the lock of a dead process.

    Its folder is made, and removed again if the block leaves nothing in it.

    Args:
      advice: what the user can do while another process holds it, for the message.
      on_wait: called once with the message, before waiting for the other process; None: do not wait.
    Raises:
      LockedError: another process holds it, and there is no waiting.
    """
    is_new = not path.parent.exists()
    take = _take_object if is_remote(path) else _try_to_lock
    held, holder = take(path)
    if held is None and on_wait is not None:
        on_wait(f"{path.parent}: waiting for {holder}, which works here")
    while held is None:
        if on_wait is None:
            raise LockedError(f"{path.parent}: {holder} works here; {advice}")
        time.sleep(_POLL_SECONDS)
        held, holder = take(path)
    released = threading.Event()
    renewal = threading.Thread(target=_renew, args=(held, released), name=f"lock {path}", daemon=True)
    renewal.start()
    try:
        yield
    finally:
        released.set()
        renewal.join()
        with contextlib.suppress(OSError):
            path.unlink()
        held.close()
        if is_new and not is_remote(path):
            with contextlib.suppress(OSError):  # not empty: the usual case
                path.parent.rmdir()


class _HeldFile:
    """The open file of a lock that this process holds."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def renew(self) -> None:
        """Set the file's time to now."""
        os.utime(self._file.fileno())

    def close(self) -> None:
        """Release the system's lock."""
        self._file.close()


class _HeldObject:
    """The record of a lock that this process holds in an object store."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path, self._record = path, _own_record()

    def renew(self) -> None:
        """Write the record with the present time. It differs from every other holder's."""
        write(self._path, (json.dumps({**self._record, _RENEWED: time.time()}) + "\n").encode())

    def is_ours(self) -> bool:
        """Return True if the store has this process's record."""
        return read_holder(self._path) == self._record

    def close(self) -> None:
        """Do nothing: the object is gone."""


def _take_object(path: pathlib.Path) -> tuple[_HeldObject | None, str]:
    """Do what `_try_to_lock` does, for a lock in an object store. Of two that write at once the later one has it."""
    holder, held = _read_record(path), _HeldObject(path)
    if holder.get("host") == socket.gethostname():
        is_alive = holder.get("started") == _started(holder.get("pid"))
    else:
        renewed = holder.get(_RENEWED)
        is_alive = isinstance(renewed, int | float) and time.time() - renewed < _LIFE_SECONDS
    if not is_alive:
        held.renew()
        time.sleep(_SETTLE_SECONDS)
        if held.is_ours():
            return held, ""
        holder = _read_record(path)
    return None, _words(holder)


def read_holder(path: pathlib.Path) -> dict[str, Any]:
    """Return the record of the process that holds a lock, without the time of its renewal; {} where nobody does."""
    return {name: value for name, value in _read_record(path).items() if name != _RENEWED}


def _read_record(path: pathlib.Path) -> dict[str, Any]:
    try:
        return _parse(path.read_bytes())
    except FileNotFoundError:
        return {}


def _try_to_lock(path: pathlib.Path) -> tuple[_HeldFile | None, str]:
    """Return the lock if this process now holds it, or None and the words for its holder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+b", buffering=0)
        has_lock, holder = _flock(file), _read(file)
        if has_lock is False or _is_alive(holder, has_lock is None, path):
            file.close()
            return None, _words(holder)
        try:
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                break
        except FileNotFoundError:
            pass
        file.close()  # its holder has just removed it
    with naming(path):
        file.truncate(0)
        file.write((json.dumps(_own_record()) + "\n").encode())
    return _HeldFile(file), ""


def _own_record() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), "since": _now()}


def _flock(file: BinaryIO) -> bool | None:
    """Try to lock a file. Return True if that worked, False if another process holds it, None without locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return None
        raise
    return True


def _is_alive(holder: dict[str, Any], unlocked: bool, path: pathlib.Path) -> bool:
    """Return True if the process of a record may still be at work, though flock does not say so."""
    if holder.get("host") == socket.gethostname():
        return unlocked and holder.get("started") == _started(holder.get("pid"))
    if not holder:
        return False
    with tempfile.TemporaryFile(dir=path.parent) as now:  # by the clock of the file system
        age = os.fstat(now.fileno()).st_mtime - path.stat().st_mtime
    return age < _LIFE_SECONDS


def _read(file: BinaryIO) -> dict[str, Any]:
    """Return the holder's record, {} if there is none or it is damaged."""
    file.seek(0)
    return _parse(file.read())


def _parse(data: bytes) -> dict[str, Any]:
    try:
        record = parse_json(data)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _words(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    host = holder.get("host")
    words = f"process {holder.get('pid')} on {host}, since {holder.get('since')},"
    if host != socket.gethostname():
        words += f" (or, if {host} has died, it counts as gone after {_LIFE_SECONDS:.0f} seconds)"
    return words


def _started(pid: Any) -> int | None:
    """Return a number that tells a process from others of the same id; None if there is no such process."""
    try:
        stat = pathlib.Path(f"/proc/{int(pid)}/stat").read_text()
    except (OSError, TypeError, ValueError):
        return None
    return int(stat.rpartition(")")[2].split()[19])  # proc(5): starttime


def _renew(held: _HeldFile | _HeldObject, released: threading.Event) -> None:
    while not released.wait(_RENEW_SECONDS):
        with contextlib.suppress(OSError):
            held.renew()


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(" ", "seconds")
