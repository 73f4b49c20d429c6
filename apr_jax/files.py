"""Files of a run's folder: JSON and JSON lines, each written as a whole."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any


def write(path: pathlib.Path, data: bytes) -> None:
    """Write a file atomically, so that a reader sees the old one or the new one. Make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write one JSON value, as `write` does."""
    write(path, (json.dumps(value, indent=2) + "\n").encode())


def write_jsonl(path: pathlib.Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, as `write` does."""
    write(path, "".join(json.dumps(record) + "\n" for record in records).encode())


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Return a file's object, or an empty one if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_jsonl(path: pathlib.Path) -> list[dict[str, Any]]:
    """Return a file's objects, or none if there is no file. Leave out the torn last line of a killed run."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines if line.strip()]
