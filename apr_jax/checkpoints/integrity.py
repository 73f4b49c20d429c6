"""Sizes and checksums of a checkpoint's files, so that damage on disk is noticed.

Orbax notices most files that are cut short, but no flipped bit in an array, and its errors name the array and not the
checkpoint. `SUMS` is written into the folder before the rename that makes it a checkpoint. An object store keeps
checksums itself, so that there only sizes are compared, and it cannot rename: a checkpoint is whole once it has the
object COMMITTED, which Orbax writes last.
"""

import pathlib
import shutil
import sys
from typing import Any

from apr_jax.checkpoints.phases import COMMITTED
from apr_jax.files import FileError, crc_of, parse_json, write, write_json
from apr_jax.paths import is_remote

SUMS = "sums.json"
_LEFT_OUT = (SUMS, "_CHECKPOINT_METADATA", COMMITTED)  # Orbax writes the last two later, and needs neither


class CheckpointError(FileError):
    """A checkpoint that cannot be used. The message says which of its files is wrong, and how."""


def write_sums(folder: pathlib.Path) -> None:
    """Write SUMS: {path in the folder: [bytes, CRC-32]} of every file that is there; in a store the sum is null."""
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
        if crc is not None and _crc(folder / name) != crc:
            raise CheckpointError(f"{name} has another checksum than when it was written")


def read_meta(folder: pathlib.Path) -> dict[str, Any]:
    """Read what `Checkpoints.save` noted about a checkpoint. Raises CheckpointError where it cannot be read."""
    meta = _read(folder, "meta/metadata")
    if not isinstance(meta.get("config"), dict):
        raise CheckpointError("meta/metadata is damaged: it has no configuration")
    return meta


def remove(folder: pathlib.Path) -> None:
    """Remove a checkpoint or reference policy. In a store it stops being one before the first of its arrays goes."""
    if not is_remote(folder):
        shutil.rmtree(folder)
        return
    for name in (COMMITTED, SUMS):
        (folder / name).unlink(missing_ok=True)
    for path in folder.rglob("*"):
        path.unlink()


def set_aside(source: pathlib.Path, target: pathlib.Path, problem: object) -> None:
    """Move a folder that cannot be used to `target`, in place of what was there before, and say why."""
    if target.exists():
        remove(target)
    if is_remote(source):
        for path in source.rglob("*"):
            write(target / path.relative_to(source), path.read_bytes())
        remove(source)
    else:
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


def _crc(path: pathlib.Path) -> int | None:
    return None if is_remote(path) else crc_of(path)
