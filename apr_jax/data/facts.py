"""Bare facts of a task as training sequences: lines such as `31-26=5`, with no target that gives the result away.

One in thirty of a search's tokens is the result of an operation, and the target often tells what it must be. So a small
model learns to search long before it learns to add. Facts, mixed into every batch, take six tokens each, or some more
where a task has longer ones. They are written as in a trace, and only what follows from what is given has loss.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from apr_jax.data.tokenized import Sequence1D
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.tasks.base import Task

FACTS_A_SEQUENCE = 32  # or fewer, where a row is too short for them


class Facts(Sequence[Sequence1D]):
    """Training sequences of random facts, each a function of the seed and of its index."""

    def __init__(
        self, task: Task, section: Any, tokenizer: Tokenizer, *, seed: int, num_sequences: int, row_len: int
    ) -> None:
        self._task, self._section, self._tokenizer = task, section, tokenizer
        self._seed, self._num_sequences, self._row_len = seed, num_sequences, row_len

    @classmethod
    def of_share(
        cls, share: float, num_tokens: int, task: Task, section: Any, tokenizer: Tokenizer, *, seed: int, row_len: int
    ) -> "Facts":
        """Make as many sequences as fill `share` of all tokens when `num_tokens` are others."""
        some = cls(task, section, tokenizer, seed=seed, num_sequences=16, row_len=row_len)
        mean = float(np.mean([len(sequence["tokens"]) for sequence in some]))
        num_sequences = round(share / (1 - share) * num_tokens / mean)
        return cls(task, section, tokenizer, seed=seed, num_sequences=num_sequences, row_len=row_len)

    def __len__(self) -> int:
        return self._num_sequences

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._num_sequences:
            raise IndexError(f"there are {self._num_sequences} sequences of facts, not {index}")
        rng = random.Random(f"{self._seed}/facts/{index}")
        tokens, weights = [self._tokenizer.bos_id], [0.0]
        for _ in range(FACTS_A_SEQUENCE):
            asked, result = self._task.draw_fact(rng, self._section)
            given = self._tokenizer.encode_continuation(asked, tokens)
            learnt = self._tokenizer.encode_continuation(f"{result}\n", [*tokens, *given])
            if len(tokens) + len(given) + len(learnt) > self._row_len + 1:
                break
            tokens += given + learnt
            weights += [0.0] * len(given) + [1.0] * len(learnt)
        ids = np.asarray(tokens, dtype=np.int32)
        return {"tokens": ids[:-1], "targets": ids[1:], "weights": np.asarray(weights[1:], dtype=np.float32)}
