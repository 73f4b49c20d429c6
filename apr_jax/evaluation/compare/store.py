"""A comparison's folder, written cell by cell, so that it can be stopped at any moment and gone on with.

WORKDIR/results.jsonl          one object a finished cell
WORKDIR/records/CELL.jsonl.gz  its records, one a problem (evaluation/metrics.py); the first ones with their threads

A cell's records are written before its line: a whole line is a cell that is done.
"""

import gzip
import hashlib
import json
import pathlib
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from apr_jax.config import ConfigError
from apr_jax.evaluation.compare.grid import Cell
from apr_jax.files import FileError, parse_json, read_jsonl, write, write_jsonl

KEY = ("method", "budget", "temperature", "context_window")
# Settings that all cells of a folder share: without these in common, no two of them can be compared.
SHARED = ("problems", "seed", "engine.lanes", "at_once")

Json = dict[str, Any]


class Results:
    """The finished cells of a folder."""

    def __init__(self, workdir: pathlib.Path) -> None:
        self.workdir = workdir
        self._path = workdir / "results.jsonl"
        self._rows = read_results(workdir)

    def find(self, cell: Cell, settings: Mapping[str, Any]) -> Json | None:
        """Return the row of a cell that is done, or None.

        Raises ConfigError where it was made with other settings, or any row with other SHARED ones.
        """
        for row in self._rows:
            is_cell = all(row[name] == cell.key[name] for name in KEY)
            fields = sorted({*row["settings"], *settings}) if is_cell else SHARED
            self._check_same(row, settings, fields)
            if is_cell and (self.workdir / row["records"]).exists():
                return row
        return None

    def add(self, cell: Cell, settings: Mapping[str, Any], figures: Mapping[str, Any], records: Sequence[Json]) -> Json:
        """Keep a finished cell, and return its row."""
        digest = fingerprint(settings)
        name = re.sub(r"[^a-z0-9]+", "-", cell.row.label.lower()).strip("-")
        path = self.workdir / "records" / f"{name}-{digest}.jsonl.gz"
        write_records(path, records)
        place = str(path.relative_to(self.workdir))
        row = {**cell.key, **figures, "fingerprint": digest, "records": place, "settings": dict(settings)}
        self._rows = [other for other in self._rows if any(other[name] != row[name] for name in KEY)]
        self._rows.append(row)
        self._write()
        return row

    def _check_same(self, row: Json, settings: Mapping[str, Any], fields: Sequence[str]) -> None:
        there = row["settings"]
        lines = [
            f"  {name}: {there.get(name, 'absent')!r} there, {settings.get(name, 'absent')!r} now"
            for name in fields
            if there.get(name) != settings.get(name)
        ]
        if lines:
            cell = ", ".join(f"{name} {row[name]}" for name in KEY)
            raise ConfigError(
                f"{self._path} has a cell ({cell}) that was made otherwise:\n" + "\n".join(lines) + "\n"
                "Choose another --workdir, or remove its line."
            )

    def _write(self) -> None:
        write_jsonl(self._path, self._rows)


def read_results(workdir: pathlib.Path) -> list[Json]:
    """Return the rows of WORKDIR/results.jsonl; none where it is missing. A half-written last line is left out.

    Raises ConfigError, which names the line, for a line that is whole and no row.
    """
    path = workdir / "results.jsonl"
    advice = "no row of a comparison; remove it, or choose another --workdir"
    try:
        rows = read_jsonl(path, advice, settings=dict, records=str)
    except FileError as error:
        raise ConfigError(str(error)) from error
    for number, row in enumerate(rows, start=1):
        if set(KEY) - set(row):
            raise ConfigError(f"{path}, line {number}: {advice}")
    return rows


def write_records(path: pathlib.Path, records: Sequence[Json]) -> None:
    """Write one object a line, compressed, as `files.write` does: the same bytes for the same records."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    write(path, gzip.compress(text.encode(), mtime=0))


def read_records(workdir: pathlib.Path, row: Mapping[str, Any]) -> list[Json]:
    """Read a row's records, in the order of its problems.

    Raises FileNotFoundError where they are missing, and ConfigError, which names the file, where they are damaged.
    """
    path = workdir / row["records"]
    try:
        text = gzip.decompress(path.read_bytes())
        if not text:
            raise EOFError("it is empty")
        return [parse_json(line) for line in text.splitlines()]
    except FileNotFoundError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ConfigError(
            f"{path}: damaged records ({error}); remove the file and start launch/compare.py again to make them anew"
        ) from error


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Return sixteen hex digits that differ where a setting does."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()
