"""Batches of packed rows from demonstrations, with Grain: shuffled every epoch, resumable anywhere.

    calls = tokenize(load_split(config, "train"), tokenizer, options)
    batches = train_iterator(calls, tokenizer, options, rows_per_batch=8, seed=0)
    batch = next(batches); state = batches.get_state()

A batch is a dict of [B, T] arrays, B rows of T = row_len tokens: `tokens`, `targets`, `segment_ids` (0 = padding) and
`positions` (restart at 0 in every segment) are int32, `weights` float32. Workers on a shared cache bring further arrays
(`shared_sequences.py`).
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grain
import numpy as np
from numpy.typing import NDArray

from apr_jax.data.packing import Packing, pack, pad_rows
from apr_jax.data.shared_sequences import SharedCalls, tokenize_shared
from apr_jax.data.tokenized import Arrays, Calls, LossWeights, Sequence1D, TokenizedCalls, tokenize_calls
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.tasks.base import Demonstration

_logger = logging.getLogger(__name__)

PackedBatch = dict[str, NDArray[np.generic]]

_ROWS_PER_WINDOW = 128  # rows that are packed together; more fill better and take longer to resume
_IN_MEMORY = grain.ReadOptions(num_threads=0)  # the calls are arrays in memory: threads would only get in the way


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceOptions:
    """The way in which demonstrations become training sequences."""

    row_len: int  # T, tokens of a row; longer sequences are dropped, counted and logged
    replay_weight: float  # loss weight of a winning path's replay, relative to the completion's other tokens
    loss_on_context: bool  # context tokens have loss
    shares_cache: bool  # calls are workers that saw each other: those of a demonstration are one sequence


def train_iterator(
    calls: Calls,
    tokenizer: Tokenizer,
    options: SequenceOptions,
    *,
    rows_per_batch: int,
    seed: int,
    make_facts: Callable[[int], Sequence[Sequence1D]] | None = None,
) -> grain.DatasetIterator[PackedBatch]:
    """Return batches for training, without end. `get_state` and `set_state` go on anywhere, bit for bit.

    Args:
      calls: the split's, tokenised (`tokenize`, or `token_store`).
      tokenizer: the model's.
      options: what becomes of them.
      rows_per_batch: rows of a batch.
      seed: the seed of the order, which differs in every epoch.
      make_facts: more sequences to mix in, given how many tokens the calls have.
    """
    seed %= 1 << 32  # what Grain and NumPy take
    weights, num_tokens = _weights(tokenizer, options), int(calls.lengths.sum())
    facts = make_facts(num_tokens) if make_facts is not None else ()
    sequences: grain.MapDataset[Sequence1D] = (
        grain.MapDataset.range(len(calls) + len(facts))
        .shuffle(seed=seed)
        .repeat()
        .map(lambda index: calls.sequence(int(index), weights) if index < len(calls) else facts[index - len(calls)])
    )
    num_tokens += len(facts) * (len(facts[0]["tokens"]) if facts else 0)
    window_len = math.ceil(_ROWS_PER_WINDOW * options.row_len * (len(calls) + len(facts)) / num_tokens)
    examples = sequences.to_iter_dataset(_IN_MEMORY)
    rows = _PackedRows(examples, row_len=options.row_len, window_len=window_len, seed=seed)
    return iter(rows.batch(rows_per_batch, drop_remainder=True))


def validation_batch(
    source: Iterable[Demonstration], tokenizer: Tokenizer, options: SequenceOptions, num_rows: int
) -> PackedBatch:
    """Return a fixed batch: as many of the first calls as `num_rows` rows hold.

    If the data do not fill them, empty rows follow (segment 0, weight 0). Raises ValueError as `tokenize` does.
    """
    calls = tokenize(source, tokenizer, options, max_tokens=num_rows * (options.row_len + 1))
    weights, num_calls = _weights(tokenizer, options), len(calls)
    packing = pack([calls.sequence(index, weights) for index in range(num_calls)], options.row_len)
    while packing.num_rows > num_rows:
        num_calls -= packing.num_rows - num_rows  # a row too many is at least a call too many
        packing = pack([calls.sequence(index, weights) for index in range(num_calls)], options.row_len)
    return pad_rows(packing.rows, num_rows)


def tokenize(
    source: Iterable[Demonstration], tokenizer: Tokenizer, options: SequenceOptions, max_tokens: int | None = None
) -> Calls:
    """Tokenise demonstrations in memory, up to `max_tokens`. Raise ValueError if nothing is left to train on."""
    return calls_of(tokenize_arrays(source, tokenizer, options, max_tokens), options)


def tokenize_arrays(
    source: Iterable[Demonstration], tokenizer: Tokenizer, options: SequenceOptions, max_tokens: int | None = None
) -> Arrays:
    """Tokenise: each call of a thread is a sequence, but workers that see each other share one."""
    of_kind: Callable[..., Arrays] = tokenize_shared if options.shares_cache else tokenize_calls
    return of_kind(source, tokenizer, row_len=options.row_len, max_tokens=max_tokens)


def calls_of(arrays: Arrays, options: SequenceOptions) -> Calls:
    """Return what the arrays hold, and say how many were too long. Raise ValueError for nothing to train on."""
    calls: Calls = (SharedCalls if options.shares_cache else TokenizedCalls)(arrays)
    unit, dropped, kept = "demonstrations" if options.shares_cache else "calls", calls.num_dropped, len(calls)
    if not kept:
        raise ValueError(f"nothing to train on: {dropped} {unit} are longer than row_len={options.row_len} tokens")
    if dropped:
        text = "%d of %d %s need more than row_len=%d tokens and are dropped"
        _logger.warning(text, dropped, dropped + kept, unit, options.row_len)
    return calls


def _weights(tokenizer: Tokenizer, options: SequenceOptions) -> LossWeights:
    return LossWeights(options.replay_weight, options.loss_on_context, tokenizer.join_ids)


class _PackedRows(grain.IterDataset[PackedBatch]):
    """A dataset that packs windows of `window_len` sequences into rows and yields each window's rows in random order.

    Grain's own first-fit packer gives up a set of rows as soon as one long sequence does not fit, which leaves more
    padding. A window keeps the state as small (its parent's state at the start, and a count) and the rows fuller.
    """

    def __init__(self, parent: grain.IterDataset[Sequence1D], *, row_len: int, window_len: int, seed: int) -> None:
        super().__init__(parent)
        self._row_len, self._window_len, self._seed = row_len, window_len, seed

    def __iter__(self) -> "_PackedRowsIterator":
        return _PackedRowsIterator(iter(self._parent), self._row_len, self._window_len, self._seed)


class _PackedRowsIterator(grain.DatasetIterator[PackedBatch]):
    def __init__(self, parent: grain.DatasetIterator[Sequence1D], row_len: int, window_len: int, seed: int) -> None:
        super().__init__(parent)
        self._sequences = parent
        self._row_len, self._window_len, self._seed = row_len, window_len, seed
        self._window = 0  # windows begun and finished before the present one
        self._next_row = 0  # rows of the present window that were yielded
        self._window_start: Any = parent.get_state()
        self._packing: Packing | None = None  # of the present window; None: not packed yet
        self._order: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def __next__(self) -> PackedBatch:
        packing = self._pack_window() if self._packing is None else self._packing
        if self._next_row == packing.num_rows:
            self._window, self._next_row = self._window + 1, 0
            self._window_start = self._sequences.get_state()
            packing = self._pack_window()
        row = self._order[self._next_row]
        self._next_row += 1
        return {name: array[row] for name, array in packing.rows.items()}

    def get_state(self) -> dict[str, Any]:
        return {"window_start": self._window_start, "window": self._window, "next_row": self._next_row}

    def set_state(self, state: dict[str, Any]) -> None:
        self._sequences.set_state(state["window_start"])
        self._window_start = self._sequences.get_state()
        self._window, self._next_row, self._packing = state["window"], state["next_row"], None

    def _pack_window(self) -> Packing:
        packing = pack([next(self._sequences) for _ in range(self._window_len)], self._row_len)
        self._order = np.random.default_rng((self._seed, self._window)).permutation(packing.num_rows)
        self._packing = packing
        return packing
