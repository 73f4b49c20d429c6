"""A probe of arithmetic: which results of operations a policy finds most likely, given everything before them.

It reads demonstrations instead of decoding, so hundreds of operations take one forward pass. It says how well the
policy computes, not how well it searches or copies.
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
from apr_jax.train.scorer import TokenScores, make_scorer, to_mesh

SIZES = (20, 99, 255)  # bounds of the larger operand, by which results are told apart
_OPERATION = "Exploring Operation: "


@dataclasses.dataclass(frozen=True)
class Result:
    """One operation's result in a token sequence: tokens[start:stop]."""

    operator: str
    larger_operand: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Share:
    """A share of results that are right."""

    right: int
    total: int

    def __str__(self) -> str:
        return f"{self.right / self.total:.1%} of {self.total:,}" if self.total else "none"


def probe_arithmetic(
    params: Params,
    model: ModelConfig,
    mesh: Mesh,
    tokenizer: Tokenizer,
    demonstrations: Iterable[Demonstration],
    rows_a_batch: int = 4,
) -> dict[str, Share]:
    """Score all results that the demonstrations' threads write.

    Returns: shares by "all", by operator ("+"), and by operator and size of the larger operand ("+ to 99").
    """
    calls = TokenizedCalls(tokenize_calls(demonstrations, tokenizer, row_len=model.max_seq_len))
    weights = LossWeights(1.0, False, tokenizer.join_ids)
    sequences = [calls.sequence(index, weights) for index in range(len(calls))]
    packing = pack(sequences, model.max_seq_len)
    top_BT = _top(_make_score(model, mesh), params, mesh, pad_rows(packing.rows, rows_a_batch), rows_a_batch)
    counts: collections.Counter[tuple[str, bool]] = collections.Counter()
    for sequence, top_T in zip(sequences, packing.read_back(top_BT), strict=True):
        tokens = [*sequence["tokens"].tolist(), int(sequence["targets"][-1])]
        for result in find_results(tokenizer.token_texts(tokens)):
            targets = slice(result.start - 1, result.stop - 1)
            if sequence["weights"][targets].all():
                right = bool(top_T[targets].all())
                for label in ("all", result.operator, f"{result.operator} {_size(result.larger_operand)}"):
                    counts[label, right] += 1
    labels = sorted({label for label, _ in counts}, key=lambda label: (label != "all", label))
    return {label: Share(counts[label, True], counts[label, True] + counts[label, False]) for label in labels}


def find_results(texts: Sequence[str]) -> list[Result]:
    """Find the results of a sequence's `Exploring Operation` lines, given its tokens' texts."""
    found = []
    for begin, text in enumerate(texts):
        if text != _OPERATION:
            continue
        end = begin + 1
        while end < len(texts) and not texts[end].startswith(","):
            end += 1
        if "=" not in texts[begin:end]:
            continue
        start = texts.index("=", begin, end) + 1
        asked = "".join(texts[begin + 1 : start - 1])
        operator = next((char for char in asked if char in "+-*/"), None)
        if operator is not None and end < len(texts):
            larger = max(map(int, asked.split(operator)))
            found.append(Result(operator, larger, start, end))
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


def _size(operand: int) -> str:
    return next((f"to {size}" for size in SIZES if operand <= size), f"above {SIZES[-1]}")
