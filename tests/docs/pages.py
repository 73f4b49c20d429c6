"""Pages of docs/ as programs."""

import pathlib
import re
from typing import Any

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def blocks(page: str) -> list[tuple[int, str]]:
    """The Python blocks of docs/PAGE in order, each with the line it begins at."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return [
        (text[: found.start(1)].count("\n"), found[1])
        for found in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    ]


def run_page(page: str) -> dict[str, Any]:
    """Runs all blocks as one program; returns its names. Tracebacks name the page and its lines."""
    names: dict[str, Any] = {"__name__": page}
    for line, block in blocks(page):
        exec(compile("\n" * line + block, str(DOCS / page), "exec"), names)
    return names
