"""A run's folder, in which one run at a time works, and which all hosts of its job must share."""

import contextlib
import pathlib
import time
from collections.abc import Iterator

from apr_jax.config import ConfigError
from apr_jax.lock import LockedError, locked, read_holder
from apr_jax.parallel import hosts

_SEEN_SECONDS = 15.0  # in which a network file system must show what another host wrote
_POLL_SECONDS = 0.5


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[None]:
    """Hold a run's folder within the block. Host 0 does so for all.

    Raises:
      LockedError: another run holds it.
      ConfigError: a host does not see host 0's lock, so that its folder is another one.
    """
    path = workdir / "lock"
    with contextlib.ExitStack() as stack:

        def lock() -> str:
            try:
                stack.enter_context(locked(path, "wait for it, or choose another --workdir"))
            except LockedError as error:
                return str(error)
            return ""

        if refusal := hosts.from_first(lock):
            raise LockedError(refusal)
        token = hosts.from_first(lambda: read_holder(path))
        seen = hosts.gather(_sees(path, token))
        if blind := [str(host) for host, sees in enumerate(seen) if not sees]:
            raise ConfigError(
                f"host {', '.join(blind)} does not see what host 0 writes to {workdir}; name a folder that all hosts "
                "share, or gs://BUCKET/FOLDER"
            )
        yield


def _sees(path: pathlib.Path, token: dict[str, object]) -> bool:
    """Return True as soon as the lock reads as on host 0; False if it does not for a while."""
    until = time.monotonic() + _SEEN_SECONDS
    while read_holder(path) != token:
        if time.monotonic() > until:
            return False
        time.sleep(_POLL_SECONDS)
    return True
