"""Threads as they are born, search and join, while the engine runs: a table on a terminal, plain lines elsewhere."""

import dataclasses
import time
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from apr_jax.data.tokenizer import Tokenizer
from apr_jax.engine.threads import Happening, Path, RolloutKey, Thread
from apr_jax.tasks.base import Task

_REDRAW_SECONDS = 0.05
_LAST_TOKENS = 96  # that a thread's last line is looked for in
_STATES = {
    Happening.OPENED: ("starts", "dim"),
    Happening.WROTE: ("searches", "cyan"),
    Happening.WAITS: ("waits", "yellow"),
    Happening.RESUMED: ("goes on", "cyan"),
    Happening.ENDED: ("ended", "dim"),
    Happening.CANCELLED: ("cancelled", "dim"),
}
_FOUND = ("has a path", "bold green")  # a claim: `Task.verify` judges it


@dataclasses.dataclass
class _Row:
    thread: Thread
    happening: Happening


class LiveThreads:
    """An `observer` for Engine.run that shows the threads of a problem's samples. Use as a context manager."""

    def __init__(self, task: Task, tokenizer: Tokenizer, console: Console | None = None) -> None:
        """Show them on `console`, by default standard error."""
        self._task, self._tokenizer = task, tokenizer
        self._console = Console(stderr=True, highlight=False) if console is None else console
        self._rows: dict[tuple[int, Path], _Row] = {}  # by sample
        self._start = self._drawn = time.monotonic()
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None

    def __call__(self, key: RolloutKey, thread: Thread, happening: Happening) -> None:
        self._rows[key.sample, thread.path] = _Row(thread, happening)
        if self._live is not None:
            if time.monotonic() - self._drawn >= _REDRAW_SECONDS:
                self._draw()
        elif happening is not Happening.WROTE:
            self._console.print(self._line(key.sample, thread, happening), soft_wrap=True)

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._draw()
            self._live.stop()

    def _draw(self) -> None:
        assert self._live is not None
        self._live.update(self._table(), refresh=True)
        self._drawn = time.monotonic()

    def _table(self) -> Table:
        """Draw every thread, children under their parents; where they don't fit, the ended ones give way first."""
        table = Table(box=None, pad_edge=False, expand=True)
        table.add_column("thread", no_wrap=True)
        table.add_column("", no_wrap=True)
        table.add_column("tokens", justify="right", no_wrap=True)
        table.add_column(f"{time.monotonic() - self._start:.1f} s", ratio=1, no_wrap=True, overflow="ellipsis")
        room = self._console.height - 3
        shown = sorted(self._rows, key=lambda place: (self._rows[place].happening is Happening.ENDED, place))[:room]
        for sample, path in sorted(shown):
            row = self._rows[sample, path]
            state, style = self._state(row.thread, row.happening)
            line = Text(self._last_line(row.thread), style="dim" if style == "dim" else "")
            table.add_row(_name(sample, path), Text(state, style=style), str(row.thread.generated), line)
        if len(shown) < len(self._rows):
            table.add_row("", Text(f"and {len(self._rows) - len(shown)} more", style="dim"))
        return table

    def _line(self, sample: int, thread: Thread, happening: Happening) -> Text:
        seconds = time.monotonic() - self._start
        state, _ = self._state(thread, happening)
        text = f"{seconds:7.2f} s  {_name(sample, thread.path):14} {state:11} {thread.generated:5} tokens"
        ended = happening in (Happening.ENDED, Happening.CANCELLED)
        return Text(text + (f"  {self._last_line(thread)}" if ended else ""))

    def _state(self, thread: Thread, happening: Happening) -> tuple[str, str]:
        if happening is Happening.ENDED and self._task.claims_answer(self._text(thread)):
            return _FOUND
        return _STATES[happening]

    def _text(self, thread: Thread) -> str:
        """Return the thread's latest text. A model may write anything: what a terminal would obey is shown as a dot."""
        text = self._tokenizer.decode(thread.tokens[-_LAST_TOKENS:])
        return "".join(char if char.isprintable() or char == "\n" else "\u00b7" for char in text)

    def _last_line(self, thread: Thread) -> str:
        return self._text(thread).rstrip("\n").rpartition("\n")[2]


def _name(sample: int, path: Path) -> str:
    """Return `parent`, or `child 1.2` for the second of its first spawn; deeper ones are indented.

    Samples after the first have their number before it.
    """
    return (
        (f"#{sample + 1} " if sample else "")
        + "  " * max(0, len(path) // 2 - 1)
        + (f"child {path[-2] + 1}.{path[-1] + 1}" if path else "parent")
    )
