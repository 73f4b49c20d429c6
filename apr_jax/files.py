"""Files of a run's folder: JSON and JSON lines, each written as a whole and read with care.

Whatever lies on a disk may be cut short, empty or another program's. The readers here raise a FileError then, whose
message is one sentence with the path and what to do. `entry.run` prints it and exits with 1. A path may lie in an
object store (`paths`), where a file is written in one go.
"""

import contextlib
import errno
import json
import math
import os
import pathlib
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from apr_jax.config import ConfigError
from apr_jax.paths import StoreError, is_remote, is_there

REMOVE = "remove the file, or restore it"
_MOST_DIGITS = 308  # of a whole number, so that it can become a float
_SEAL = "crc32"
_BOM = b"\xef\xbb\xbf"
_GIT_LFS = b"version https://git-lfs"
_PIECE = 1 << 24  # bytes read at a time
_UPLOAD_SECONDS = 30.0
_OF_STORE = "HTTP response code"  # in what TensorStore says of a store's refusal

_ADVICE = {
    errno.ENOSPC: "free some space on this disk and start again",
    errno.EDQUOT: "free some space of your quota and start again",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f) and start again",
    errno.EROFS: "this file system can only be read: choose another folder",
    errno.EACCES: "check its permissions, or choose another folder",
    errno.EPERM: "check its permissions, or choose another folder",
    errno.EIO: "the disk may be failing: look at the system's log, or choose another folder",
    errno.EMFILE: "raise the limit on open files (ulimit -n) and start again",
}
_IN_THE_WAY = dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), "choose another name, or move it away")


class FileError(Exception):
    """A file or folder that cannot be used. The message names its path, what is wrong with it and what to do."""


def write(path: pathlib.Path, data: bytes) -> None:
    """Write a file as `writing` does."""
    with writing(path) as file:
        file.write(data)


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Write a file atomically, so that a reader sees the old one or the new one. Make its folder.

    A pipe or a device is written to as it is, and a link stays one. An object of a store is sent when the block ends.
    """
    with naming(path):
        if is_remote(path):
            with tempfile.TemporaryFile() as file:
                yield file
                file.seek(0)
                with path.open("wb") as target:
                    shutil.copyfileobj(file, target, _PIECE)
            return
        if path.exists() and (not path.is_file() or path.is_relative_to("/dev")):
            with path.open("wb") as file:
                yield file
            return
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


class GrowingFile:
    """A file to whose end bytes are added.

    An object of a store cannot grow. It is written anew at `sync`, and when half a minute has passed.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._whole: bytearray | None = None  # of an object
        self._sent, self._sent_at = 0, 0.0

    def add(self, data: bytes) -> None:
        """Add bytes to the end. Raises OSError."""
        if not is_remote(self._path):
            with naming(self._path), self._path.open("ab") as file:
                file.write(data)
            return
        if self._whole is None:
            self._whole = bytearray(self._path.read_bytes() if self._path.exists() else b"")
            self._sent, self._sent_at = len(self._whole), time.monotonic()
        self._whole += data
        if time.monotonic() - self._sent_at > _UPLOAD_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Make what was added survive a crash of the machine. Raises OSError."""
        if is_remote(self._path):
            if self._whole is not None and self._sent < len(self._whole):
                write(self._path, bytes(self._whole))
                self._sent, self._sent_at = len(self._whole), time.monotonic()
        elif self._path.exists():
            with naming(self._path), self._path.open("rb") as file:
                os.fsync(file.fileno())


def write_json(path: pathlib.Path, value: Mapping[str, Any], *, sealed: bool = False) -> None:
    """Write one JSON object, as `write` does; with `sealed`, with a checksum that `read_json` compares."""
    seal = {_SEAL: _crc(value)} if sealed else {}
    write(path, (json.dumps({**value, **seal}, indent=2) + "\n").encode())


def write_jsonl(path: pathlib.Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, as `write` does."""
    write(path, "".join(json.dumps(record) + "\n" for record in records).encode())


def read_json(
    path: pathlib.Path,
    advice: str = REMOVE,
    error: type[FileError] = FileError,
    *,
    sealed: bool = False,
    **fields: type | tuple[type, ...],
) -> dict[str, Any]:
    """Return a file's JSON object.

    Args:
      advice: what the user can do about a damaged file, for the message.
      error: the error to raise for a damaged file.
      sealed: compare and remove the checksum. A file without one is not checked.
      fields: fields that the object must have, with their types.
    Raises:
      FileNotFoundError: there is no such file.
      FileError: it holds no such object, or another one than was sealed.
    """
    try:
        value = _object(parse_json(path.read_bytes()), fields)
        if sealed and value.pop(_SEAL, None) not in (None, _crc(value)):
            raise ValueError("another checksum than when it was written")
        return value
    except ValueError as problem:
        raise error(f"{path}: {problem}; {advice}") from problem


def read_jsonl(path: pathlib.Path, advice: str = REMOVE, **fields: type | tuple[type, ...]) -> list[dict[str, Any]]:
    """Return the JSON objects of a file's lines, without the torn last line of a killed run; [] without a file.

    Arguments and errors are those of `read_json`; a FileError names the line.
    """
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    records = []
    for number, line in enumerate(whole.split(b"\n"), start=1):
        try:
            records += [_object(parse_json(line), fields)] if line.strip() else []
        except ValueError as problem:
            raise FileError(f"{path}, line {number}: {problem}; {advice}") from problem
    return records


@contextlib.contextmanager
def reading(path: pathlib.Path, advice: str) -> Iterator[None]:
    """Raise FileError where the block cannot make sense of what the file held. For contents with many parts."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise FileError(f"{path}: unexpected contents ({type(error).__name__}: {error}); {advice}") from error


def file_in(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Return the path of a file of a folder that came from elsewhere: nothing is read that lies outside it.

    A link may lead to another file of the folder, or to the blobs of Hugging Face's cache that the folder is a part of.

    Raises:
      FileNotFoundError: there is no such file.
      FileError: it is a folder, a pipe, a link to elsewhere or a git-lfs pointer.
    """
    path, whole = folder / name, folder.resolve()
    if not is_there(path):
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
    if is_remote(path):
        return path
    if not path.exists():
        raise FileError(f"{path}: a link that leads nowhere; put the file itself in its place")
    real, places = path.resolve(), [whole]
    if whole.parent.name == "snapshots":
        places.append(whole.parents[1] / "blobs")
    if not real.is_file():
        raise FileError(f"{path}: a folder, a pipe or a device, and no file; put the file itself in its place")
    if not any(real.is_relative_to(place) for place in places):
        raise FileError(f"{path}: a link to {real}, outside its folder; put the file itself in its place")
    with real.open("rb") as file:
        if file.read(len(_GIT_LFS)) == _GIT_LFS:
            raise FileError(f"{path}: a git-lfs pointer, and not the file; run `git lfs pull` in {folder}")
    return path


def parse_json(data: bytes) -> Any:
    """Return a JSON text's value. Raise ValueError, with a short reason, for what is no JSON or holds no finite number.

    A byte order mark may stand before it.
    """
    try:
        text = data.removeprefix(_BOM).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from error
    if not text.strip():
        raise ValueError("empty")
    try:
        value = json.loads(text, parse_int=_whole, parse_float=_finite, parse_constant=_finite)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
        return value
    except RecursionError as error:
        raise ValueError("not JSON (nested too deeply)") from error
    except (json.JSONDecodeError, UnicodeEncodeError) as error:
        raise ValueError(f"not JSON ({error})") from error


def explain(error: OSError) -> str:
    """Return one sentence that says what the system refused, on which file, and what to do."""
    if error.errno is None or error.strerror is None:
        return str(error)
    where = f"{error.filename}: " if error.filename is not None else ""
    advice = (_ADVICE | _IN_THE_WAY).get(error.errno)
    return f"{where}{error.strerror}" + (f"; {advice}" if advice else "")


def is_refusal(error: BaseException) -> bool:
    """Return True if the system refused to read or write a file, which need not be damaged then."""
    return isinstance(error, StoreError) or (isinstance(error, OSError) and error.errno in _ADVICE)


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Raise the system's errors in the block as OSErrors with a file: `path` if they name none.

    Errors of writing name none, and libraries in C++ only quote the system in errors of their own.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except (FileError, ConfigError):
        raise
    except Exception as error:
        if is_remote(path) and _OF_STORE in str(error):
            raise StoreError.of(path, error) from error
        quoted = [code for code in _ADVICE if os.strerror(code) in str(error)]
        if not quoted:
            raise
        raise OSError(quoted[0], os.strerror(quoted[0]), str(path)) from error


def crc_of(path: pathlib.Path) -> int:
    """Return the CRC-32 of a file, read a piece at a time."""
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            crc = zlib.crc32(piece, crc)
    return crc


def _crc(value: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(value).encode())


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"not JSON (a number of {len(digits):,} digits)")
    return int(digits)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"not JSON (the number {text[:20]} is not finite)")
    return value


def _object(value: Any, fields: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    for name, kind in fields.items():
        if name not in value:
            raise ValueError(f"the field {name} is missing")
        if not isinstance(value[name], kind) or (isinstance(value[name], bool) and kind is not bool):
            raise ValueError(f"the field {name} holds {type(value[name]).__name__}")
    return value
