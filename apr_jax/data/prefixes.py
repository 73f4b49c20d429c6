"""Sequences that begin alike, merged so that their common part stands once (host side, NumPy only).

A thread's next call begins with what its last one did: its prompt, and its own text up to the spawn. Separate sequences
would repeat that, a fifth of all tokens in the laptop's GRPO. Here the calls of one family become the branches of one
sequence. A branch starts with a copy of the last common token if that has a target of its own there. A token sees what
lies before it and has not ended: `reach`, which the attention kernels take beside segment ids. So every token has the
context, the position and the target that it had alone, and its loss is the same.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from apr_jax.data.packing import Array

MIN_SHARED = 32  # tokens; fewer are not worth a longer sequence, which is harder to pack


class _Branches:
    """The calls of one family, one after another. The next one may share the last one's path, from its root."""

    def __init__(self, family: int) -> None:
        self.family = family
        self.size = 0
        self._parts: list[dict[str, Array]] = []
        self._ends = np.zeros(0, np.int64)  # of each token, the first later one that does not see it; 0: none yet
        self._path = np.zeros(0, np.int64)  # where the path's tokens lie
        self._tokens: Array = np.zeros(0, np.int32)  # the path's

    def common(self, sequence: Mapping[str, Array], first_target: int) -> int:
        """Count the path's first tokens that the sequence has too, before its own targets begin."""
        tokens = sequence["tokens"]
        length = min(len(tokens), len(self._tokens))
        differ = np.flatnonzero(tokens[:length] != self._tokens[:length])
        return min(int(differ[0]) if len(differ) else length, first_target)

    def add(self, sequence: Mapping[str, Array], shared: int) -> None:
        """Add a branch after the path's first `shared` tokens."""
        tokens = sequence["tokens"]
        self._ends[self._path[shared:]] = self.size
        added = len(tokens) - shared
        part = {name: array[shared:] for name, array in sequence.items()}
        part["positions"] = np.arange(shared, len(tokens), dtype=np.int32)
        part["call"] = np.full(added, len(self._parts), np.int32)
        self._parts.append(part)
        self._ends = np.concatenate([self._ends, np.zeros(added, np.int64)])
        self._path = np.concatenate([self._path[:shared], np.arange(self.size, self.size + added)])
        self._tokens = tokens
        self.size += added

    def whole(self) -> dict[str, Array]:
        arrays = {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}
        ends = np.where(self._ends > 0, self._ends, self.size)
        return arrays | {"reach": (ends - np.arange(self.size)).astype(np.int32)}


def share_prefixes(
    sequences: Sequence[Mapping[str, Array]], families: Sequence[int], first_targets: Sequence[int], most: int
) -> list[dict[str, Array]]:
    """Merge neighbouring sequences of one family that have MIN_SHARED tokens or more in common into branches of one.

    Args:
        sequences: arrays of one length each, `tokens` (int32) among them; the others belong to the token.
        families: the family of each sequence; only sequences of one family are merged.
        first_targets: for each sequence, the first place whose target carries loss. Tokens before it may be shared.
        most: the most tokens of a merged sequence.

    Returns:
        Fewer or as many sequences, in order, with three more int32 arrays: `positions`, `reach` (the number of tokens
        that
        see this one, from itself on) and `call` (0, 1, .. within the sequence).
    """
    shared: list[_Branches] = []
    for sequence, family, first_target in zip(sequences, families, first_targets, strict=True):
        common = 0
        if shared and shared[-1].family == family:
            common = shared[-1].common(sequence, first_target)
            if common < MIN_SHARED or shared[-1].size + len(sequence["tokens"]) - common > most:
                common = 0
        if not common:
            shared.append(_Branches(family))
        shared[-1].add(sequence, common)
    return [branches.whole() for branches in shared]
