"""Files of a run's folder."""

import json
import pathlib
from typing import Any


def write_json(path: pathlib.Path, value: Any) -> None:
    """Atomic: a reader sees the old file or the new one. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)
