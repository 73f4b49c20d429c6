"""Batches of packed rows from demonstrations, with Grain: shuffled every epoch, sharded by host, resumable anywhere.

    batches = train_iterator(load_split(config, "train"), tokenizer, row_len=512, rows_per_batch=8, ...)
    batch = next(batches); state = batches.get_state()

A batch is a dict of [B, T] arrays, B rows of T = row_len tokens: `tokens`, `targets`, `segment_ids` (0 = padding) and
`positions` (restart at 0 in every segment) are int32, `weights` float32. Workers on a shared cache bring further arrays
(`shared_sequences.py`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from numpy.typing import NDArray

from apr_jax.data.packing import Packing, pack, pad_rows
from apr_jax.data.shared_sequences import SharedCalls, tokenize_shared
from apr_jax.data.tokenized import LossWeights, Sequence1D, TokenizedCalls, tokenize_calls
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.tasks.base import Demonstration

PackedBatch = dict[str, NDArray[np.generic]]

_ROWS_PER_WINDOW = 128  # rows that are packed together; more fill better and take longer to resume
_IN_MEMORY = grain.ReadOptions(num_threads=0)  # the calls are arrays in memory: threads would only get in the way


class TrainIterator(Iterator[PackedBatch]):
    """An endless stream of batches. `train_iterator` makes one."""

    def __init__(self, calls: TokenizedCalls | SharedCalls, batches: grain.DatasetIterator[PackedBatch]) -> None:
        self._calls, self._batches = calls, batches

    def __next__(self) -> PackedBatch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """Return the stream's place as a small dict that is ready for JSON."""
        return self._batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue where `get_state` was called, bit for bit (same data, tokenizer and settings)."""
        self._batches.set_state(state)

    @property
    def num_calls(self) -> int:
        """Calls in an epoch of this host's shard."""
        return len(self._calls)

    @property
    def num_tokens(self) -> int:
        """Tokens in an epoch of this host's shard, without padding."""
        return int(self._calls.lengths.sum())

    @property
    def num_dropped(self) -> int:
        """Calls of this host's shard that were left out because they need more than a row."""
        return self._calls.num_dropped


def train_iterator(
    source: Sequence[Demonstration],
    tokenizer: Tokenizer,
    *,
    row_len: int,
    rows_per_batch: int,
    seed: int,
    replay_weight: float,
    loss_on_context: bool,
    shares_cache: bool,
    shard_index: int,
    shard_count: int,
    make_facts: Callable[[int], Sequence[Sequence1D]] | None = None,
) -> TrainIterator:
    """Return batches for training, without end.

    The shard is tokenised at once (2 bytes a token in the built-in vocabulary).

    Args:
      source: the split's demonstrations; this host takes every `shard_count`-th of them from `shard_index` on.
      tokenizer: the model's.
      row_len: T, tokens of a row. Longer calls are dropped and counted (`num_dropped`).
      rows_per_batch: rows of this host in a batch.
      seed: the seed of the order, which differs in every epoch.
      replay_weight: loss weight of a winning path's replay, relative to the completion's other tokens.
      loss_on_context: True if context tokens have loss.
      shares_cache: True if calls are workers that saw each other: those of a demonstration are one sequence.
      shard_index: this host.
      shard_count: number of hosts.
      make_facts: more sequences to mix in, given how many tokens the shard's calls have.

    Raises:
      ValueError: shard_index is not below shard_count, or nothing is left to train on.
    """
    seed %= 1 << 32  # what Grain and NumPy take
    tokenize = _tokenizing(shares_cache=shares_cache)
    calls = tokenize(_shard(source, shard_index, shard_count), tokenizer, row_len=row_len)
    weights = LossWeights(replay_weight, loss_on_context, tokenizer.join_ids)
    facts = make_facts(int(calls.lengths.sum())) if make_facts is not None else ()
    sequences: grain.MapDataset[Sequence1D] = (
        grain.MapDataset.range(len(calls) + len(facts))
        .shuffle(seed=seed)
        .repeat()
        .map(lambda index: calls.sequence(int(index), weights) if index < len(calls) else facts[index - len(calls)])
    )
    num_tokens = int(calls.lengths.sum()) + len(facts) * (len(facts[0]["tokens"]) if facts else 0)
    window_len = math.ceil(_ROWS_PER_WINDOW * row_len * (len(calls) + len(facts)) / num_tokens)
    rows = _PackedRows(sequences.to_iter_dataset(_IN_MEMORY), row_len=row_len, window_len=window_len, seed=seed)
    return TrainIterator(calls, iter(rows.batch(rows_per_batch, drop_remainder=True)))


def validation_batches(
    source: Sequence[Demonstration],
    tokenizer: Tokenizer,
    *,
    row_len: int,
    rows_per_batch: int,
    num_rows: int,
    replay_weight: float,
    loss_on_context: bool,
    shares_cache: bool,
    shard_index: int = 0,
    shard_count: int = 1,
) -> list[PackedBatch]:
    """Return a fixed list of batches: as many of the shard's first calls as `num_rows` rows hold.

    Every shard gets `num_rows / rows_per_batch` batches. If its data do not fill them, empty rows follow (segment 0,
    weight 0). Raises ValueError as `train_iterator` does, and if `num_rows` is not a multiple of `rows_per_batch`.
    """
    if num_rows < 1 or num_rows % rows_per_batch:
        raise ValueError(f"num_rows={num_rows} must be a positive multiple of rows_per_batch={rows_per_batch}")
    shard = _shard(source, shard_index, shard_count)
    tokenize = _tokenizing(shares_cache=shares_cache)
    calls = tokenize(shard, tokenizer, row_len=row_len, max_tokens=num_rows * (row_len + 1))
    weights = LossWeights(replay_weight, loss_on_context, tokenizer.join_ids)
    num_calls = len(calls)
    packing = pack([calls.sequence(index, weights) for index in range(num_calls)], row_len)
    while packing.num_rows > num_rows:
        num_calls -= packing.num_rows - num_rows  # a row too many is at least a call too many
        packing = pack([calls.sequence(index, weights) for index in range(num_calls)], row_len)
    rows = pad_rows(packing.rows, num_rows)
    return [
        {name: array[start : start + rows_per_batch] for name, array in rows.items()}
        for start in range(0, num_rows, rows_per_batch)
    ]


def _tokenizing(*, shares_cache: bool) -> Callable[..., TokenizedCalls | SharedCalls]:
    """Choose the tokenisation: each call of a thread is a sequence, but workers that see each other share one."""
    return tokenize_shared if shares_cache else tokenize_calls


def _shard(source: Sequence[Demonstration], shard_index: int, shard_count: int) -> Iterator[Demonstration]:
    if not 0 <= shard_index < shard_count:
        raise ValueError(f"shard_index={shard_index} must lie in 0..{shard_count - 1} (shard_count={shard_count})")
    return (source[index] for index in range(shard_index, len(source), shard_count))


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
