"""Batches of packed rows from demonstrations, shuffled every epoch by Grain, resumable anywhere.

    calls = tokenize(load_split(config, "train"), tokenizer, options)
    batches = train_iterator(calls, tokenizer, options, rows_per_batch=8, seed=0)
    batch = next(batches); state = batches.get_state()

A batch is a dict of [B, T] arrays, B rows of T = row_len tokens: `tokens`, `targets`, `segment_ids` (0 = padding) and
`positions` (restart at 0 in every segment) are int32, `weights` float32. Workers on a shared cache bring further arrays
(`shared_sequences.py`).
"""

import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import grain
import numpy as np
from numpy.typing import NDArray

from apr_jax.data.packing import pack, pad_rows
from apr_jax.data.shared_sequences import SharedCalls, tokenize_shared
from apr_jax.data.tokenized import Arrays, Calls, LossWeights, Sequence1D, TokenizedCalls, tokenize_calls
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.tasks.base import Demonstration
from apr_jax.tasks.workers import map_in_processes

_logger = logging.getLogger(__name__)

PackedBatch = dict[str, NDArray[np.generic]]

_ROWS_PER_WINDOW = 128  # rows that are packed together; more fill better and take longer to resume


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
    num_workers: int = 1,
    reopen: Callable[[], Calls] | None = None,
) -> "RowBatches":
    """Return batches for training, without end. `get_state` and `set_state` go on anywhere, bit for bit.

    Args:
      calls: the split's, tokenised (`tokenize`, or `token_store`).
      tokenizer: the model's.
      options: what becomes of them.
      rows_per_batch: rows of a batch.
      seed: the seed of the order, which differs in every epoch.
      make_facts: more sequences to mix in, given how many tokens the calls have.
      num_workers: processes that pack; with 1 this one does. Batches do not depend on it.
      reopen: returns the calls in another process, which more than one worker needs.
    """
    seed %= 1 << 32  # what Grain and NumPy take
    weights, num_tokens = _weights(tokenizer, options), int(calls.lengths.sum())
    facts = make_facts(num_tokens) if make_facts is not None else ()
    num_tokens += len(facts) * (len(facts[0]["tokens"]) if facts else 0)
    window_len = math.ceil(_ROWS_PER_WINDOW * options.row_len * (len(calls) + len(facts)) / num_tokens)
    if reopen is None or num_workers == 1:
        num_workers, reopen = 1, lambda: calls
    windows = _Windows(reopen, facts, weights, row_len=options.row_len, window_len=window_len, seed=seed)
    return RowBatches(windows, rows_per_batch, num_workers)


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
    calls = as_calls(arrays, options)
    unit, dropped, kept = "demonstrations" if options.shares_cache else "calls", calls.num_dropped, len(calls)
    if not kept:
        raise ValueError(f"nothing to train on: {dropped} {unit} are longer than row_len={options.row_len} tokens")
    if dropped:
        text = "%d of %d %s need more than row_len=%d tokens and are dropped"
        _logger.warning(text, dropped, dropped + kept, unit, options.row_len)
    return calls


def as_calls(arrays: Arrays, options: SequenceOptions) -> Calls:
    """Return what the arrays hold."""
    calls: Calls = (SharedCalls if options.shares_cache else TokenizedCalls)(arrays)
    return calls


def _weights(tokenizer: Tokenizer, options: SequenceOptions) -> LossWeights:
    return LossWeights(options.replay_weight, options.loss_on_context, tokenizer.join_ids)


@dataclasses.dataclass(frozen=True)
class _Windows:
    """A function from a number to packed rows: those of `window_len` neighbours among all shuffled sequences.

    Grain's own first-fit packer gives up a set of rows as soon as one long sequence does not fit, which leaves more
    padding. A window keeps rows fuller, and is a function of its number alone, so any process can pack it. It opens the
    calls where it is first called.
    """

    open_calls: Callable[[], Calls]
    facts: Sequence[Sequence1D]
    weights: LossWeights
    _: dataclasses.KW_ONLY
    row_len: int
    window_len: int
    seed: int

    def __call__(self, window: int) -> PackedBatch:
        """Return the window's rows, [R, T], in random order."""
        begin = window * self.window_len
        indices = (int(self._order[place]) for place in range(begin, begin + self.window_len))
        packing = pack([self._sequence(index) for index in indices], self.row_len)
        order = np.random.default_rng((self.seed, window)).permutation(packing.num_rows)
        return {name: rows_RT[order] for name, rows_RT in packing.rows.items()}

    def _sequence(self, index: int) -> Sequence1D:
        num_calls = len(self._calls)
        return self._calls.sequence(index, self.weights) if index < num_calls else self.facts[index - num_calls]

    @functools.cached_property
    def _calls(self) -> Calls:
        return self.open_calls()

    @functools.cached_property
    def _order(self) -> Sequence[int]:
        order: Sequence[int] = (
            grain.MapDataset.range(len(self._calls) + len(self.facts)).shuffle(seed=self.seed).repeat()
        )
        return order


class RowBatches(Iterator[PackedBatch]):
    """Batches of rows without end, from one window after the other. Its state is a place in them."""

    def __init__(self, windows: _Windows, rows_per_batch: int, num_workers: int) -> None:
        self._windows, self._rows_per_batch, self._num_workers = windows, rows_per_batch, num_workers
        self._window = self._next_row = 0
        self._rows: PackedBatch | None = None  # of the present window; None: not packed yet
        self._packed = self._windows_from(0)

    def __next__(self) -> PackedBatch:
        parts: list[PackedBatch] = []
        missing = self._rows_per_batch
        while missing:
            if self._rows is None:
                self._rows = next(self._packed)
            num_rows = len(self._rows["tokens"])
            end = min(self._next_row + missing, num_rows)
            parts.append({name: rows_RT[self._next_row : end] for name, rows_RT in self._rows.items()})
            missing, self._next_row = missing - (end - self._next_row), end
            if end == num_rows:
                self._window, self._next_row, self._rows = self._window + 1, 0, None
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def get_state(self) -> dict[str, int]:
        """Return the place of the next batch, which `set_state` takes."""
        return {"window": self._window, "next_row": self._next_row}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Go to a place that `get_state` returned."""
        self._window, self._next_row, self._rows = state["window"], state["next_row"], None
        self._packed = self._windows_from(self._window)

    def _windows_from(self, first: int) -> Iterator[PackedBatch]:
        return map_in_processes(self._windows, itertools.count(first), self._num_workers)
