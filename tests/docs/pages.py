"""Pages of docs/ as programs."""

import pathlib
import re
from typing import Any

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def blocks(page: str, section: str | None = None) -> list[tuple[int, str]]:
    """Return the Python blocks of docs/PAGE, or of its section, in order, each with the line it begins at."""
    text = (DOCS / page).read_text(encoding="utf-8")
    start, end = 0, len(text)
    if section is not None:
        start = text.index(f"\n## {section}\n") + 1
        end = text.find("\n## ", start) if "\n## " in text[start:] else end
    return [
        (text[: found.start(1)].count("\n"), found[1])
        for found in re.compile(r"^```python\n(.*?)^```$", re.M | re.S).finditer(text, start, end)
    ]


def run_page(page: str, section: str | None = None) -> dict[str, Any]:
    """Run all blocks as one program, and return its names. Tracebacks name the page and its lines."""
    names: dict[str, Any] = {"__name__": page}
    for line, block in blocks(page, section):
        exec(compile("\n" * line + block, str(DOCS / page), "exec"), names)
    return names
