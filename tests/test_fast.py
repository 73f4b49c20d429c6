"""`make test-fast` runs something of every room."""

import pathlib
import re

import pytest

TESTS = pathlib.Path(__file__).parent
LEFT_OUT = re.compile(r"^pytestmark = .*\.(heavy|slow|aot|browser|peers)\b", re.MULTILINE)


@pytest.mark.parametrize("room", sorted({path.parent.name for path in TESTS.glob("*/test_*.py")}))
def test_every_room_has_fast_tests(room: str):
    assert any(not LEFT_OUT.search(path.read_text()) for path in (TESTS / room).rglob("test_*.py"))
