"""The way of a problem in docs/architecture.md exists, is short, and can be followed import by import."""

import re

from tests.docs.pages import DOCS
from tests.test_imports import ROOT, imports


def test_the_way_from_a_problem_to_a_gradient_is_at_most_25_files_and_can_be_followed():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    files = re.findall(r"^\| \d+ \| `([\w/]+\.py)` \|", text, re.M)
    assert 15 < len(files) <= 25
    known: set[str] = set()
    for file in files:
        module = file.removesuffix(".py").replace("/", ".")
        assert module in known or file == files[0], f"no file above {file} imports it"
        known |= imports(ROOT / file)
