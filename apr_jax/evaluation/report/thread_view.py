"""Rollouts as templates/viewer.js takes them: what each thread held and wrote, token by token.

A record (evaluation/metrics.py, with its calls) becomes one drawing (viewer.py) and one plain dict. A page holds each
token text once, in a list, and threads refer to them by number.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from apr_jax.evaluation.report import page
from apr_jax.evaluation.report.viewer import bar_class, critical_threads, draw_threads, problem_name, thread_name

WIDTH = 1000
_END = "⟨end⟩"  # how a token without text, as the one that ends a thread, is shown

Json = dict[str, Any]


class ThreadViews:
    """The rollouts of one page. templates/viewer.html shows its `svgs` and `data`."""

    def __init__(self) -> None:
        self.svgs: list[Markup] = []
        self.size = 0  # characters that the page grows by
        self._ids: dict[str, int] = {}
        self._texts: list[str] = []
        self._rollouts: list[Json] = []

    def add(self, label: str, record: Mapping[str, Any]) -> None:
        """Add a record under the label that people choose it by. One without calls is left out."""
        if not record.get("calls"):
            return
        body, height = draw_threads(record, WIDTH)
        self.svgs.append(page.svg(body, WIDTH, height))
        rollout = {
            "label": label,
            "name": problem_name(record),
            "key": _key(record),
            "correct": bool(record["correct"]),
            "verdict": str(record["verdict"]).replace("_", " "),
            "threads": self._threads(record),
        }
        self._rollouts.append(rollout)
        self.size += len(self.svgs[-1]) + len(json.dumps(rollout))

    @property
    def data(self) -> Json:
        """The rollouts and token texts, for `page.embed`."""
        return {"tokens": self._texts, "rollouts": self._rollouts}

    def __len__(self) -> int:
        return len(self._rollouts)

    def _threads(self, record: Mapping[str, Any]) -> list[Json]:
        """Return the rows of the drawing: the root first, children under their parent in spawn order."""
        results = {tuple(thread["path"]): thread["result"] for thread in record["threads"]}
        critical = critical_threads(record["calls"])
        of_thread: dict[tuple[int, ...], list[tuple[int, Mapping[str, Any]]]] = {}
        for index, call in enumerate(record["calls"]):
            of_thread.setdefault(tuple(call["path"]), []).append((index, call))
        return [
            {
                "name": thread_name(path),
                "result": results[path].replace("_", " "),
                "kind": bar_class(results[path], path),
                "critical": path in critical,
                "calls": self._calls(calls),
            }
            for path, calls in sorted(of_thread.items())
        ]

    def _calls(self, calls: Sequence[tuple[int, Mapping[str, Any]]]) -> list[Json]:
        """Return a thread's calls, each with its context's change since the call before: what came and what went."""
        shown: list[Json] = []
        before, written = "", 0  # what the thread held when its last call ended, and how much of that the call wrote
        for index, call in calls:
            kept = _common_prefix(before, call["context"])
            if shown:  # a token goes or stays as a whole
                shown[-1]["kept"], kept = self._leading(shown[-1]["tokens"], len(before) - written, kept)
            tokens, logprobs = _tokens(call)
            shown.append(
                {
                    "index": index,
                    "context": call["context"][kept:],
                    "tokens": [self._id(text) for text in tokens],
                    "logprobs": logprobs,
                    "kept": len(tokens),
                    "advantage": call.get("advantage"),
                    "note": f"{call['num_tokens']} tokens from {call['clock_start']} on, stop: {call['stop']}",
                }
            )
            before, written = call["context"] + call["text"], len(call["text"])
        return shown

    def _id(self, text: str) -> int:
        if text not in self._ids:
            self._ids[text] = len(self._texts)
            self._texts.append(text)
        return self._ids[text]

    def _leading(self, ids: Sequence[int], begin: int, limit: int) -> tuple[int, int]:
        """Count the tokens from character `begin` on that end by character `limit`; return the last one's end too."""
        end = begin
        for count, token in enumerate(ids):
            size = 0 if self._texts[token] == _END else len(self._texts[token])
            if end + size > limit:
                return count, min(end, limit)
            end += size
        return len(ids), end


def _tokens(call: Mapping[str, Any]) -> tuple[list[str], list[float] | None]:
    """Return token texts and log-probabilities. A record without them gets lines of text."""
    if "tokens" not in call:
        return call["text"].splitlines(keepends=True), None
    return [text or _END for text in call["tokens"]], call["logprobs"]


def _common_prefix(first: str, second: str) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


def _key(record: Mapping[str, Any]) -> str:
    """Return a key that rollouts of one problem share, whatever their method. The samples of a group differ."""
    which = f"{problem_name(record)} {record.get('sample', 0)}"
    return hashlib.blake2b(which.encode(), digest_size=6).hexdigest()
