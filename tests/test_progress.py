"""Progress: plain lines away from a terminal, a bar on one, and always a last line."""

import errno
import io
import time

import pytest

from apr_jax import progress as module
from apr_jax.progress import busy, progress


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


def test_a_count_that_does_not_rise_is_not_silent(monkeypatch):
    monkeypatch.setattr(module, "_LINE_SECONDS", 0.5)
    monkeypatch.setattr(module, "_QUIET_SECONDS", 0.5)
    out = io.StringIO()
    with progress(total=10, desc="SFT", unit="step", stream=out):
        time.sleep(2.5)
    assert sum(line.startswith("SFT: 0/10 step") for line in out.getvalue().splitlines()) >= 3


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, 0), (0.7, 2)])
def test_long_work_without_a_count_says_what_it_is(seconds, lines, monkeypatch):
    monkeypatch.setattr(module, "_QUIET_SECONDS", 0.2)
    monkeypatch.setattr(module, "_LINE_SECONDS", 0.3)
    out = io.StringIO()
    with busy("Compiling", out):
        time.sleep(seconds)
    assert [line.partition(":")[0] for line in out.getvalue().splitlines()] == ["Compiling"] * lines


class Gone(io.StringIO):
    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")


def test_a_terminal_that_is_gone_stops_no_work(monkeypatch):
    monkeypatch.setattr(module, "_QUIET_SECONDS", 0.01)
    with progress(total=4, desc="work", stream=Gone()) as bar, busy("more", Gone()):
        bar.update(4)
        time.sleep(0.1)


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
