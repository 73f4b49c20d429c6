"""Whether a checkpoint on disk is what was written: sizes and checksums of its files.

Orbax notices most files that are cut short, but not a bit that flipped in an array, and what it raises names the array
and not the checkpoint. `SUMS` is written into the folder before the rename that makes it a checkpoint.
"""

import json
import pathlib
import zlib

SUMS = "sums.json"
_LEFT_OUT = (SUMS, "_CHECKPOINT_METADATA", "commit_success.txt")  # Orbax writes the last two later, and needs neither
_PIECE = 1 << 24  # bytes read at a time


class CheckpointError(Exception):
    """A checkpoint that cannot be used. The message says which of its files is wrong, and how."""


def write_sums(folder: pathlib.Path) -> None:
    """Writes SUMS: {path in the folder: [bytes, CRC-32]} of every file that is there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in _LEFT_OUT)
    sums = {str(path.relative_to(folder)): [path.stat().st_size, _crc(path)] for path in files}
    (folder / SUMS).write_text(json.dumps(sums, indent=0) + "\n")


def check_files(folder: pathlib.Path) -> None:
    """Raises CheckpointError unless a checkpoint's files are as written, or SUMS is absent (older checkpoints)."""
    path = folder / SUMS
    if not path.exists():
        return
    try:
        sums = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{SUMS} is damaged: {error}") from error
    for name, (size, _) in sums.items():
        actual = _size(folder / name)
        if actual != size:
            raise CheckpointError(f"{name} " + ("is missing" if actual is None else f"has {actual} of {size} bytes"))
    for name, (_, crc) in sums.items():
        if _crc(folder / name) != crc:
            raise CheckpointError(f"{name} has another checksum than when it was written")


def _size(path: pathlib.Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _crc(path: pathlib.Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            crc = zlib.crc32(piece, crc)
    return crc
