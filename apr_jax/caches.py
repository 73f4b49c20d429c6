"""Folders in which compiled programs are kept: one that can be written, whole files with checksums, and a limit."""

import contextlib
import functools
import hashlib
import os
import pathlib
import stat
import sys
import tempfile
from typing import Any

_CHECKOUT = pathlib.Path(__file__).parents[1]
_LIMIT = 2 << 30  # bytes of JAX's programs
_SUM_DIGITS = 32


@functools.cache
def cache_folder() -> pathlib.Path | None:
    """Return a folder of this user's for compiled programs, or None, and a message, where none can be written.

    It is the checkout's `.jax_cache`, else one in the user's cache or home, else one among the temporary files: a user
    that a container makes up has no home.
    """
    folders = [_CHECKOUT / ".jax_cache"]
    if kept := os.environ.get("XDG_CACHE_HOME"):
        folders.append(pathlib.Path(kept, "apr_jax"))
    if (home := pathlib.Path(os.path.expanduser("~"))).is_absolute():
        folders.append(home / ".cache" / "apr_jax")
    for folder in folders:
        if _is_ours(folder):
            return folder
    others = " and ".join(map(str, folders))
    with contextlib.suppress(FileNotFoundError):  # there is no folder for temporary files
        temporary = pathlib.Path(tempfile.gettempdir(), f"apr_jax-{os.getuid()}")
        if _is_ours(temporary):
            _say(f"compiled programs are kept in {temporary}, because {others} cannot be written")
            return temporary
    _say(f"compiled programs are not kept, because {others} cannot be written; set JAX_COMPILATION_CACHE_DIR")
    return None


def _is_ours(folder: pathlib.Path) -> bool:
    """Return True if the folder, which is made if need be, can be written, and by nobody else: programs lie in it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        with tempfile.TemporaryFile(dir=folder):
            return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    except OSError:
        return False


def keep(path: pathlib.Path, data: bytes) -> None:
    """Write a file whole or not at all, whoever else writes the same one. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            pathlib.Path(file.name).replace(path)
        except BaseException:
            pathlib.Path(file.name).unlink(missing_ok=True)
            raise


def checksum(data: bytes) -> str:
    """Return a digest of a file's content."""
    return hashlib.sha256(data).hexdigest()[:_SUM_DIGITS]


class CompiledPrograms:
    """The cache of JAX's programs, in JAX's own format, with a checksum beside each file.

    What is not as it was written is deleted and compiled again. Beyond the limit the least recently used ones go.
    """

    def __init__(self, folder: pathlib.Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._has_complained = False

    def get(self, key: str) -> bytes | None:
        """Return what was put there under this key; None where there is nothing whole."""
        path, sums = self._paths(key)
        with contextlib.suppress(OSError):
            data = path.read_bytes()
            if sums.exists() and sums.read_bytes() == checksum(data).encode():
                os.utime(path)
                return data
            path.unlink()
        return None

    def put(self, key: str, value: bytes) -> None:
        """Keep a program under this key, or say once that it cannot be kept."""
        path, sums = self._paths(key)
        try:
            keep(path, value)
            keep(sums, checksum(value).encode())
            self._evict()
        except OSError as error:
            if not self._has_complained:
                _say(
                    f"compiled programs cannot be kept in {self._folder}, so each start takes longer: {error.strerror}"
                )
            self._has_complained = True

    def _paths(self, key: str) -> tuple[pathlib.Path, pathlib.Path]:
        return self._folder / f"{key}-cache", self._folder / f"{key}-sum"

    def _evict(self) -> None:
        """Delete the least recently used programs until the rest is within the limit."""
        found = [(path, path.stat()) for path in self._folder.glob("*-cache")]
        size = sum(status.st_size for _, status in found)
        for path, status in sorted(found, key=lambda item: item[1].st_mtime):
            if size <= self._limit:
                break
            size -= status.st_size
            for doomed in self._paths(path.name.removesuffix("-cache")):
                doomed.unlink(missing_ok=True)


@functools.cache
def check_compiled_programs() -> None:
    """Let JAX keep its programs in a `CompiledPrograms`, in the folder and within the limit that its settings say."""
    import jax
    from jax._src import compilation_cache  # the only place where a cache can be put in

    of_jax = compilation_cache.get_file_cache

    def open_cache(folder: str) -> tuple[Any, str] | None:
        if "://" in folder:  # an object store writes whole objects and checks them, and has no disk to fill
            return of_jax(folder)
        given: int = jax.config.jax_compilation_cache_max_size  # type: ignore[attr-defined]
        return CompiledPrograms(pathlib.Path(folder), _LIMIT if given < 0 else given), folder

    compilation_cache.get_file_cache = open_cache  # type: ignore[assignment]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
