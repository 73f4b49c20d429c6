"""The way of a problem in docs/architecture.md exists, is short, and can be followed import by import."""

import pathlib
import re

from tests.docs.pages import DOCS
from tests.test_imports import ROOT, imports


def _file(module: str) -> pathlib.Path | None:
    path = ROOT / module.replace(".", "/")
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in candidates if file.exists()), None)


def _imported(path: pathlib.Path) -> set[str]:
    """The modules that a file imports, and their packages, which Python imports with them."""
    parts = [module.split(".") for module in imports(path)]
    return {".".join(names[:end]) for names in parts for end in range(2, len(names) + 1)}


def _within_two_imports(path: pathlib.Path) -> set[str]:
    direct = _imported(path)
    return direct.union(*(_imported(file) for module in direct if (file := _file(module))))


def test_the_way_from_a_problem_to_a_gradient_is_at_most_25_files_and_can_be_followed():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    files = re.findall(r"^\| \d+ \| `([\w/]+\.py)` \|", text, re.M)
    assert 15 < len(files) <= 25
    known: set[str] = set()
    for file in files:
        module = file.removesuffix(".py").replace("/", ".")
        assert module in known or file == files[0], f"no file above {file} leads to it"
        known |= _within_two_imports(ROOT / file)
