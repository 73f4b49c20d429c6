"""Paths in an object store, gs://BUCKET/NAME (etils.epath), with the methods of pathlib.Path that this project uses.

A store holds objects and no folders: one "is there" while an object lies below it. An object is written as a whole, and
whoever reads it gets the old one or the new one.
"""

import contextlib
import dataclasses
import errno
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import fsspec.config
from etils.epath.gpath import PosixGPath
from etils.epath.stat_utils import StatResult

from apr_jax.config import ConfigError
from apr_jax.paths import StoreError

_ANSWERS = (FileExistsError, IsADirectoryError, NotADirectoryError)


class StorePath(PosixGPath):
    """A path of an object, or of what objects' names begin with. What the store refuses is a StoreError."""

    @property
    def _backend(self) -> Any:
        return _Named(super()._backend)

    def absolute(self) -> "StorePath":
        """Return the path itself."""
        return self

    def resolve(self, strict: bool = False) -> "StorePath":
        """Return the path itself: a store has no links."""
        return self

    def rglob(self, pattern: str) -> Iterator["StorePath"]:
        """Yield all objects below the path. Raise NotImplementedError for another pattern than "*"."""
        if pattern != "*":
            raise NotImplementedError(f"rglob({pattern!r}) in a store")
        for child in self.iterdir() if self.is_dir() else ():
            if child.is_dir():
                yield from child.rglob(pattern)
            else:
                yield child

    def stat(self) -> "_Status":
        """Return an object's size and time under the names that pathlib has."""
        return _Status(**vars(super().stat()))

    def read_bytes(self) -> bytes:
        """Read an object."""
        with _naming(self):
            return super().read_bytes()

    def write_bytes(self, data: bytes) -> int:
        """Write an object."""
        with _naming(self):
            return super().write_bytes(data)


def store_path(name: str) -> StorePath:
    """Return the path of a store's name. Raise ConfigError where the package that reaches the store is missing."""
    if importlib.util.find_spec("gcsfs") is None and importlib.util.find_spec("tensorflow") is None:
        raise ConfigError(f"{name}: the package gcsfs, which reaches gs://, is missing; install it (pip install gcsfs)")
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False  # other hosts, and TensorStore, write too
    return StorePath(name)


class _Status(StatResult):
    @property
    def st_size(self) -> int:
        return self.length

    @property
    def st_mtime(self) -> float:
        return self.mtime


@dataclasses.dataclass(frozen=True)
class _Named:
    """A backend of etils whose errors name the path."""

    backend: Any

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.backend, name)

        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            with _naming(path):
                return method(path, *args, **kwargs)

        return call


@contextlib.contextmanager
def _naming(path: Any) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "no such object", str(path)) from error
    except (*_ANSWERS, StoreError):
        raise
    except Exception as error:  # of the network, of credentials, of the store: each library has its own
        raise StoreError.of(path, error) from error
