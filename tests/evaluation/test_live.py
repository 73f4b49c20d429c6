"""What is shown of threads while they run."""

import io

import pytest
from rich.console import Console

from apr_jax.engine.threads import Happening, RolloutKey, Thread
from apr_jax.evaluation.live import LiveThreads
from apr_jax.tasks.countdown.task import COUNTDOWN
from tests.reasoning.fixtures import TOKENIZER

KEY = RolloutKey(0, 0)


def show(happenings, **console):
    """What stands on a console after threads (path, text, generated tokens) went through what happened to them."""
    file = io.StringIO()
    with LiveThreads(COUNTDOWN, TOKENIZER, Console(file=file, width=90, color_system=None, **console)) as live:
        for path, text, generated, happening in happenings:
            live(KEY, Thread(path, TOKENIZER.encode(text), rollout=0, key=(0, 0), generated=generated), happening)
    return file.getvalue()


SEARCH = [
    ((), "Moving to Node #0\n", 0, Happening.OPENED),
    ((), "Moving to Node #0\n<Calling Sub Searches>\n", 7, Happening.WAITS),
    ((0, 0), "Moving to Node #0,0\n", 0, Happening.OPENED),
    ((0, 1), "Moving to Node #0,1\n", 0, Happening.OPENED),
    ((0, 0), "Exploring Operation: ", 3, Happening.WROTE),
    ((0, 0), "27,27 equal: Goal Reached\n", 12, Happening.ENDED),
    ((0, 1), "No solution found.\n", 4, Happening.CANCELLED),
]


def test_elsewhere_than_on_a_terminal_each_turn_of_a_thread_is_a_line():
    lines = [line.split(" s  ", 1)[1] for line in show(SEARCH).splitlines()]
    assert [" ".join(line.split()) for line in lines] == [
        "parent starts 0 tokens",
        "parent waits 7 tokens",
        "child 1.1 starts 0 tokens",
        "child 1.2 starts 0 tokens",
        "child 1.1 has a path 12 tokens 27,27 equal: Goal Reached",
        "child 1.2 cancelled 4 tokens No solution found.",
    ]


def test_a_terminal_shows_every_thread_where_it_stands():
    last = show(SEARCH, force_terminal=True, height=20).split("thread")[-1]
    rows = [" ".join(line.split()) for line in last.splitlines()[1:4]]
    assert rows[0] == "parent waits 7 <Calling Sub Searches>"
    assert rows[1] == "child 1.1 has a path 12 27,27 equal: Goal Reached"
    assert rows[2].startswith("child 1.2 cancelled 4")


def test_where_rows_are_short_ended_threads_give_way():
    many = [((0, index), "No solution found.\n", 4, Happening.ENDED) for index in range(30)]
    searching = ((0, 30), "Exploring Operation: ", 2, Happening.WROTE)
    last = show([*many, searching], force_terminal=True, height=10).split("thread")[-1]
    assert "child 1.31" in last
    assert "and 24 more" in last


def test_nested_threads_are_indented():
    (line,) = show([((0, 2, 1, 0), "No solution found.\n", 4, Happening.OPENED)]).splitlines()
    assert "s    child 2.1" in line


@pytest.mark.parametrize("terminal", [True, False])
def test_text_of_a_model_cannot_command_a_terminal(terminal):
    class Hostile:
        def decode(self, ids):
            return "[bold]a\x1b[2Jb\n"

    file = io.StringIO()
    with LiveThreads(
        COUNTDOWN, Hostile(), Console(file=file, width=90, force_terminal=terminal, color_system=None)
    ) as live:
        live(KEY, Thread((), [1], rollout=0, key=(0, 0)), Happening.ENDED)
    assert "[bold]a\u00b7[2Jb" in file.getvalue()
