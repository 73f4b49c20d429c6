"""A probe of arithmetic and of search: which tokens a policy finds most likely, given everything before them.

It reads demonstrations instead of decoding, so hundreds of operations take one forward pass. It says how well the
policy computes, chooses what comes next, and copies, but not how it goes on after an error.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from apr_jax.config import ModelConfig
from apr_jax.data.packing import pack, pad_rows
from apr_jax.data.tokenized import LossWeights, TokenizedCalls, tokenize_calls
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.model.params import Params
from apr_jax.tasks.base import Demonstration
from apr_jax.tasks.countdown import trace
from apr_jax.train.scorer import TokenScores, make_scorer, to_mesh

SIZES = (20, 99, 255)  # bounds of the larger operand, by which results are told apart
_PLACES = 4  # of a parent's list, in one share
_OPERATION = "Exploring Operation: "
_Counts = collections.Counter[tuple[str, bool]]  # of a label, right or wrong
_HAS = {"=": "has a", "\n": "has no"}  # result
_DIVIDES = {" unequal: No Solution\n": "/ has no result", "\n": "/ has a result"}
_MOVES = ("Moving to Node #", "<Start Sub Search")


@dataclasses.dataclass(frozen=True)
class Result:
    """One operation's result in a token sequence: tokens[start:stop], in the line tokens[begin:end]."""

    operator: str
    larger_operand: int
    start: int
    stop: int
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class Share:
    """A share of results or tokens that are right."""

    right: int
    total: int

    def __str__(self) -> str:
        return f"{self.right / self.total:.1%} of {self.total:,}" if self.total else "none"


@dataclasses.dataclass(frozen=True)
class Probe:
    """The shares of tokens that a policy gets right along demonstrations.

    results: by "all", by operator ("+"), and by operator and size of the larger operand ("+ to 99").
    tokens: by who writes and what the token says ("child, next operation"). Who writes is a parent, a child, or either
      in its replay of a winning path.
    places: of the lines of operations with a result that a parent's call lists, those whose tokens are all right, by
      their place in the list ("operations 5 to 8"): the state that they copy from stands above the first.
    """

    results: dict[str, Share]
    tokens: dict[str, Share]
    places: dict[str, Share]


def probe_arithmetic(
    params: Params,
    model: ModelConfig,
    mesh: Mesh,
    tokenizer: Tokenizer,
    demonstrations: Iterable[Demonstration],
    rows_a_batch: int = 4,
) -> Probe:
    """Score all results, and all other tokens, that the demonstrations' threads write."""
    calls = TokenizedCalls(tokenize_calls(demonstrations, tokenizer, row_len=model.max_seq_len))
    weights = LossWeights(1.0, False, tokenizer.join_ids)
    sequences = [calls.sequence(index, weights) for index in range(len(calls))]
    packing = pack(sequences, model.max_seq_len)
    top_BT = _top(_make_score(model, mesh), params, mesh, pad_rows(packing.rows, rows_a_batch), rows_a_batch)
    results: _Counts = collections.Counter()
    kinds: _Counts = collections.Counter()
    places: _Counts = collections.Counter()
    for (_, replay_start, replay_end), sequence, top_T in zip(
        calls.parts, sequences, packing.read_back(top_BT), strict=True
    ):
        texts = tokenizer.token_texts([*sequence["tokens"].tolist(), int(sequence["targets"][-1])])
        writer = "parent" if trace.thread_node("".join(texts[1:])) == trace.ROOT_ID else "child"
        lists, listed = writer == "parent" and replay_start >= replay_end, 0
        for result in find_results(texts):
            targets = slice(result.start - 1, result.stop - 1)
            if sequence["weights"][targets].all():
                right = bool(top_T[targets].all())
                for label in ("all", result.operator, f"{result.operator} {_size(result.larger_operand)}"):
                    results[label, right] += 1
                if lists:
                    places[_place(listed), bool(top_T[result.begin - 1 : result.end - 1].all())] += 1
                    listed += 1
        for place, kind in enumerate(token_kinds(texts[1:])):
            if sequence["weights"][place]:
                part = " replay" if replay_start <= place + 1 < replay_end else ""
                kinds[f"{writer}{part}, {kind}", bool(top_T[place])] += 1
    return Probe(_shares(results), _shares(kinds), _shares(places))


def token_kinds(texts: Sequence[str]) -> list[str]:
    """Name what each token of a trace, given as text, says.

    "next line": what comes next, an operation, a move, a spawn or the end; "next operation": an operand or operator;
    "* has a result" and "* has no result": the `=` after an operation, or the end of an attempt; "division": a product
    that tells if there is a quotient; "/ has a result", "/ has no result": whether it is equal; "result"; "numbers":
    those of a state or left by an operation, and the operations that led there; "node": a node's number; "outcome":
    whether the target is reached.
    """
    kinds, line = [], ""
    for text in texts:
        kinds.append(_kind(line, text))
        line = "" if text.endswith("\n") else line + text
    return kinds


def find_results(texts: Sequence[str]) -> list[Result]:
    """Find the results of a sequence's `Exploring Operation` lines, given its tokens' texts."""
    found = []
    for begin, text in enumerate(texts):
        if text != _OPERATION:
            continue
        end = begin + 1
        while end < len(texts) and not texts[end].startswith((",", "\n")):
            end += 1
        if "=" not in texts[begin:end]:
            continue
        start = texts.index("=", begin, end) + 1
        asked = "".join(texts[begin + 1 : start - 1])
        operator = next((char for char in asked if char in "+-*/"), None)
        if operator is not None and end < len(texts):
            larger = max(map(int, asked.split(operator)))
            line_end = next((place + 1 for place in range(end, len(texts)) if texts[place].endswith("\n")), len(texts))
            found.append(Result(operator, larger, start, end, begin, line_end))
    return found


@functools.lru_cache(maxsize=1)
def _make_score(model: ModelConfig, mesh: Mesh) -> Callable[..., TokenScores]:
    scorer = make_scorer(model, mesh, jax.nn.log_softmax)
    return jax.jit(lambda params, batch: scorer(params, batch))


def _top(
    score: Callable[..., TokenScores], params: Params, mesh: Mesh, rows: dict[str, np.ndarray], rows_a_batch: int
) -> np.ndarray:
    """Compute for each target of the rows if it is the most likely token."""
    starts = range(0, len(rows["tokens"]), rows_a_batch)
    batches = [{name: array[start : start + rows_a_batch] for name, array in rows.items()} for start in starts]
    return np.concatenate([np.asarray(score(params, to_mesh(batch, mesh)).top_BT) for batch in batches])


def _kind(line: str, text: str) -> str:
    if not line:
        return "next line"
    if line.startswith(_OPERATION):
        if "Resulting" in line:
            return "numbers"
        if "," in line:
            return _DIVIDES.get(text, "division")
        if "=" in line:
            return "result"
        operator = next((char for char in line if char in "+-*"), None)
        return f"{operator} {_HAS[text]} result" if operator and text in _HAS else "next operation"
    if line.startswith(_MOVES) or (line.startswith("Generated Node #") and ":" not in line):
        return "node"
    return "outcome" if "equal" in text else "numbers"


def _shares(counts: _Counts) -> dict[str, Share]:
    labels = sorted({label for label, _ in counts}, key=lambda label: (label != "all", label))
    return {label: Share(counts[label, True], counts[label, True] + counts[label, False]) for label in labels}


def _place(number: int) -> str:
    first = number - number % _PLACES + 1
    return f"operations {first:2} to {first + _PLACES - 1}"


def _size(operand: int) -> str:
    return next((f"to {size}" for size in SIZES if operand <= size), f"above {SIZES[-1]}")
