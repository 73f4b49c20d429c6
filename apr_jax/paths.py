"""Paths of the files that a run reads and writes: on this machine, or gs://BUCKET/NAME in an object store."""

import os
import pathlib
import re
from typing import cast

from apr_jax.config import ConfigError

RUNS = "runs"  # the folder of runs, where none is named
_STORE = "gs"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/(/?)([^/]?)")


class StoreError(OSError):
    """An object store that refuses, or does not answer. The message names the path, the reason and what to do."""

    @classmethod
    def of(cls, path: object, error: object) -> "StoreError":
        """Make one out of what another library raised on a path."""
        reason = " ".join(str(error).split()) or type(error).__name__
        advice = "check the bucket's name, the network and your rights (gcloud auth application-default login)"
        return cls(f"{path}: {reason}; {advice}")


def path_of(name: str | os.PathLike[str]) -> pathlib.Path:
    """Return the path that a user names: pathlib's, or for gs:// one with the same methods (`store.StorePath`).

    Raises ConfigError for another store, and where the package that reaches gs:// is missing.
    """
    text = os.fspath(name)
    scheme = _SCHEME.match(text)
    if scheme is None:
        return pathlib.Path(text)
    if scheme[1] != _STORE or not (scheme[2] and scheme[3]):
        raise ConfigError(
            f"{text}: files are read and written in folders of this machine and in gs://BUCKET/FOLDER; mount any other "
            "store as a folder, and name that"
        )
    from apr_jax.store import store_path  # etils and fsspec take a moment to import

    return cast(pathlib.Path, store_path(text))


def is_remote(path: object) -> bool:
    """Return True for a path in an object store."""
    return not isinstance(path, pathlib.Path)


def is_there(path: pathlib.Path) -> bool:
    """Return True if there is something at `path`, if only a link that leads nowhere."""
    return path.exists() if is_remote(path) else os.path.lexists(path)


def local_path(name: str | os.PathLike[str], what: str) -> pathlib.Path:
    """Return the path that a user names for `what`, such as "a GGUF file", which no store can hold.

    Raises ConfigError for a path in a store.
    """
    text = os.fspath(name)
    if _SCHEME.match(text):
        raise ConfigError(
            f"{text}: {what} must lie on this machine; name a folder here, and copy with `gcloud storage cp -r`"
        )
    return pathlib.Path(text)
