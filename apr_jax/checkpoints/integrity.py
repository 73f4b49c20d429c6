"""Sizes and checksums of a checkpoint's files, so that damage on disk is noticed.

Orbax notices most files that are cut short, but no flipped bit in an array, and its errors name the array and not the
checkpoint. `SUMS` is written into the folder before the rename that makes it a checkpoint.
"""

import pathlib
import shutil
import sys
import zlib
from typing import Any

from apr_jax.files import FileError, parse_json, write_json

SUMS = "sums.json"
_LEFT_OUT = (SUMS, "_CHECKPOINT_METADATA", "commit_success.txt")  # Orbax writes the last two later, and needs neither
_PIECE = 1 << 24  # bytes read at a time


class CheckpointError(FileError):
    """A checkpoint that cannot be used. The message says which of its files is wrong, and how."""


def write_sums(folder: pathlib.Path) -> None:
    """Write SUMS: {path in the folder: [bytes, CRC-32]} of every file that is there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in _LEFT_OUT)
    sums = {str(path.relative_to(folder)): [path.stat().st_size, _crc(path)] for path in files}
    write_json(folder / SUMS, sums)


def check_files(folder: pathlib.Path) -> None:
    """Raise CheckpointError unless a checkpoint's files are as written. Passes where SUMS is absent."""
    if not (folder / SUMS).exists():
        return
    sums = _read(folder, SUMS)
    try:
        pairs = [(name, size, crc) for name, (size, crc) in sums.items()]
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{SUMS} is damaged: {error}") from error
    for name, size, _ in pairs:
        actual = _size(folder / name)
        if actual != size:
            raise CheckpointError(f"{name} " + ("is missing" if actual is None else f"has {actual} of {size} bytes"))
    for name, _, crc in pairs:
        if _crc(folder / name) != crc:
            raise CheckpointError(f"{name} has another checksum than when it was written")


def read_meta(folder: pathlib.Path) -> dict[str, Any]:
    """Read what `Checkpoints.save` noted about a checkpoint. Raises CheckpointError where it cannot be read."""
    meta = _read(folder, "meta/metadata")
    if not isinstance(meta.get("config"), dict):
        raise CheckpointError("meta/metadata is damaged: it has no configuration")
    return meta


def set_aside(source: pathlib.Path, target: pathlib.Path, problem: object) -> None:
    """Move a folder that cannot be used to `target`, in place of what was there before, and say why."""
    if target.exists():
        shutil.rmtree(target)
    target.parent.mkdir(exist_ok=True)
    source.rename(target)
    print(f"{source} cannot be used and is now {target}: {problem}", file=sys.stderr)


def _read(folder: pathlib.Path, name: str) -> dict[str, Any]:
    try:
        value = parse_json((folder / name).read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{name} is missing") from error
    except ValueError as error:
        raise CheckpointError(f"{name} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} is damaged: it is no JSON object")
    return value


def _size(path: pathlib.Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _crc(path: pathlib.Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            crc = zlib.crc32(piece, crc)
    return crc
