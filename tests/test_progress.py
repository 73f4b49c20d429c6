"""Progress: plain lines away from a terminal, a bar on one, and always a last line."""

import io
import time

import pytest

from apr_jax.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_last_line_says_what_was_done():
    out = io.StringIO()
    with progress(total=1500, desc="SFT", unit="step", stream=out) as bar:
        bar.update(1000, loss=0.25)
        bar.update(500, loss=0.125)
    (line,) = out.getvalue().splitlines()
    assert line.startswith("SFT: 1,500/1,500 step, ")
    assert line.endswith(", loss 0.125")
    assert "left" not in line


def test_lines_come_every_few_seconds_with_time_left(monkeypatch):
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    out = io.StringIO()
    with progress(total=10, desc="work", stream=out) as bar:
        for _ in range(10):
            bar.update()
    lines = out.getvalue().splitlines()
    assert 2 < len(lines) < 9
    assert all("left" in line for line in lines[:-1])


def test_a_block_that_fails_says_stopped():
    out = io.StringIO()

    def fail():
        with progress(total=10, desc="work", stream=out) as bar:
            bar.update(3)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert out.getvalue().splitlines()[-1].endswith("stopped")


def test_a_terminal_gets_a_bar_and_an_unknown_total_none():
    out = Terminal()
    with progress(total=4, desc="work", unit="row", stream=out) as bar:
        bar.update(4, loss=1.5)
    assert "100%" in out.getvalue()
    assert "loss=1.5" in out.getvalue()
    plain = io.StringIO()
    with progress(total=None, desc="work", stream=plain) as bar:
        bar.update(7)
    assert plain.getvalue().startswith("work: 7 it, ")
