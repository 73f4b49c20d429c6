"""Packing of sequences of different lengths into fixed rows (host side, NumPy only).

Each row takes the longest sequence that is left, as in first-fit decreasing, and then the choice of others that fills
it most. First-fit would leave half of a short sequence empty in every row: 5 % where children take 60 of 512 tokens.
Rows carry segment ids and positions, by which attention kernels keep the sequences of a row apart.
"""

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]


@dataclasses.dataclass(frozen=True)
class Packing:
    """Packed rows, and the place of each sequence in them.

    rows: name -> [R, row_len, ...] array. Every array of the sequences (0 where padded), and `segment_ids` (int32; 1,
        2, .. from left to right in each row, 0 = padding) and `positions` (int32; they restart at 0 in every segment,
        unless the sequences bring their own).
    places: [N, 2] int64: sequence n lies in row places[n, 0] from column places[n, 1] on.
    lengths: [N] int64, tokens of each sequence.
    """

    rows: dict[str, Array]
    places: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @property
    def num_rows(self) -> int:
        return len(self.rows["segment_ids"])

    @property
    def filled(self) -> float:
        """Share of the rows that is not padding."""
        return float(self.lengths.sum()) / self.rows["segment_ids"].size

    def read_back(self, values: Array) -> list[Array]:
        """Return per-token values of the rows, [R, row_len, ...], as one array a sequence, in the order of `pack`."""
        spans = zip(self.places.tolist(), self.lengths.tolist(), strict=True)
        return [values[row, start : start + length] for (row, start), length in spans]


def pack(sequences: Sequence[Mapping[str, Array]], row_len: int) -> Packing:
    """Pack sequences, each a dict of arrays of one length (tokens, targets, weights, advantages, ...).

    All sequences have the same names. An array may have further axes, of the same sizes in all sequences. The result is
    deterministic. Raises ValueError for no sequences, an empty one, one longer than `row_len`, arrays of different
    lengths, and differing names.
    """
    lengths = _checked_lengths(sequences, row_len)
    places = _fill_rows(lengths, row_len)
    num_rows = int(places[:, 0].max()) + 1
    rows: dict[str, Array] = {
        name: np.zeros((num_rows, row_len, *array.shape[1:]), array.dtype) for name, array in sequences[0].items()
    }
    segment_ids = np.zeros((num_rows, row_len), dtype=np.int32)
    positions = np.zeros((num_rows, row_len), dtype=np.int32)
    segments = [0] * num_rows
    arange = np.arange(row_len, dtype=np.int32)
    for index in np.lexsort((places[:, 1], places[:, 0])).tolist():
        (row, start), length = places[index].tolist(), int(lengths[index])
        segments[row] += 1
        span = slice(start, start + length)
        for name, array in sequences[index].items():
            rows[name][row, span] = array
        segment_ids[row, span] = segments[row]
        positions[row, span] = arange[:length]
    rows["segment_ids"] = segment_ids
    rows.setdefault("positions", positions)
    return Packing(rows=rows, places=places, lengths=lengths)


def pad_rows(rows: Mapping[str, Array], multiple: int) -> dict[str, Array]:
    """Append empty rows (all zero: segment 0, no weight) until the number of rows is a multiple of `multiple`."""
    missing = -len(next(iter(rows.values()))) % multiple
    return {
        name: np.pad(rows_BT, ((0, missing), *((0, 0) for _ in rows_BT.shape[1:]))) for name, rows_BT in rows.items()
    }


def _fill_rows(lengths: NDArray[np.int64], row_len: int) -> NDArray[np.int64]:
    """Return the row and start column of each sequence, [N, 2]. Sequences of equal length keep their order."""
    waiting: dict[int, deque[int]] = {}  # length -> sequences, longest first
    for index in np.argsort(-lengths, kind="stable").tolist():
        waiting.setdefault(int(lengths[index]), deque()).append(index)
    places = np.zeros((len(lengths), 2), dtype=np.int64)
    row = 0
    while waiting:
        longest = next(iter(waiting))
        chosen = [longest, *_fullest_choice(waiting, longest, row_len - longest)]
        start = 0
        for length in chosen:
            places[waiting[length].popleft()] = row, start
            start += length
            if not waiting[length]:
                del waiting[length]
        row += 1
    return places


def _fullest_choice(waiting: Mapping[int, deque[int]], taken: int, room: int) -> list[int]:
    """Return those of the waiting lengths, less one of length `taken`, whose sum comes closest to `room` from below.

    An integer's bits hold the subset sums: bit s is set if some choice adds up to s. Long sequences are preferred.
    """
    sums, considered = 1, []
    below = (1 << (room + 1)) - 1
    for length, indices in waiting.items():
        if sums >> room:
            break
        count = min(len(indices) - (length == taken), room // length)
        if count > 0:
            considered.append((length, sums))
            for _ in range(count):
                sums |= (sums << length) & below
    total, chosen = sums.bit_length() - 1, []
    for length, sums_without in reversed(considered):
        while not (sums_without >> total) & 1:
            chosen.append(length)
            total -= length
    return chosen[::-1]


def _checked_lengths(sequences: Sequence[Mapping[str, Array]], row_len: int) -> NDArray[np.int64]:
    if not sequences:
        raise ValueError("there is nothing to pack: no sequences")
    names = sequences[0].keys()
    lengths = np.zeros(len(sequences), dtype=np.int64)
    for index, sequence in enumerate(sequences):
        if sequence.keys() != names:
            raise ValueError(f"sequence {index} has {sorted(sequence)}, the first one has {sorted(names)}")
        shapes = {array.shape for array in sequence.values()}
        if len({shape[:1] for shape in shapes}) != 1 or () in shapes:
            raise ValueError(f"sequence {index}: its arrays must be of one length, not {sorted(shapes)}")
        lengths[index] = next(iter(shapes))[0]
        if not 0 < lengths[index] <= row_len:
            raise ValueError(f"sequence {index} has {lengths[index]} tokens; a row takes 1 to {row_len}")
    return lengths
