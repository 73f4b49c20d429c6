"""A lock on a folder, so that one process at a time works there. The lock's file says which.

The system's own lock (flock) goes with its process, so a killed one leaves nothing to clean up. Some file systems have
no such lock, and on some it does not reach other hosts. So the file also records its holder. A process of this host is
looked up; one of another host renews the record while it lives.
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
from apr_jax.files import naming, parse_json

_RENEW_SECONDS = 10.0
_LIFE_SECONDS = 60.0  # a record of another host that is older belongs to a dead process
_POLL_SECONDS = 0.2
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
    file, holder = _try_to_lock(path)
    if file is None and on_wait is not None:
        on_wait(f"{path.parent}: waiting for {holder}, which works here")
    while file is None:
        if on_wait is None:
            raise LockedError(f"{path.parent}: {holder} works here; {advice}")
        time.sleep(_POLL_SECONDS)
        file, holder = _try_to_lock(path)
    released = threading.Event()
    renewal = threading.Thread(target=_renew, args=(file, released), name=f"lock {path}", daemon=True)
    renewal.start()
    try:
        yield
    finally:
        released.set()
        renewal.join()
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()
        if is_new:
            with contextlib.suppress(OSError):  # not empty: the usual case
                path.parent.rmdir()


def _try_to_lock(path: pathlib.Path) -> tuple[BinaryIO | None, str]:
    """Return the open file of a lock that this process now holds, or None and the words for its holder."""
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
    own = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), "since": _now()}
    with naming(path):
        file.truncate(0)
        file.write((json.dumps(own) + "\n").encode())
    return file, ""


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
    try:
        record = parse_json(file.read())
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


def _renew(file: BinaryIO, released: threading.Event) -> None:
    while not released.wait(_RENEW_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(file.fileno())


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(" ", "seconds")
