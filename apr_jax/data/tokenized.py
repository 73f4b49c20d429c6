"""Demonstrations as token arrays: every call of a split, tokenised once and held in one flat array."""

import dataclasses
import logging
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from apr_jax.data.tokenizer import Tokenizer
from apr_jax.tasks.base import Call, Demonstration

_logger = logging.getLogger(__name__)

Sequence1D = dict[str, NDArray[np.generic]]


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """The weight in the loss of each kind of target token. A token that only the engine writes never counts."""

    replay_weight: float  # the replay of a winning path; other completion tokens and EOS count 1
    loss_on_context: bool  # context tokens count 1 instead of 0
    join_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TokenizedCalls:
    """N calls, each as s = BOS + context + completion + ([EOS] unless it ends in a spawn), one after the other.

    tokens: [sum of lengths], uint16 if the vocabulary allows it, else int32.
    starts: [N + 1] int64; call n is tokens[starts[n] : starts[n + 1]].
    completions: [N] int64, the place in s at which the completion begins.
    replays: [N, 2] int64, the places in s at which the replay of the winning path begins and ends; equal without one.
    num_dropped: calls left out because they need more than a row.
    """

    tokens: NDArray[np.generic]
    starts: NDArray[np.int64]
    completions: NDArray[np.int64]
    replays: NDArray[np.int64]
    num_dropped: int

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each call in a row: inputs are s[:-1], targets s[1:]."""
        return np.diff(self.starts) - 1

    def sequence(self, index: int, weights: LossWeights) -> Sequence1D:
        """Return one call as a training sequence: int32 `tokens` and `targets`, float32 `weights`, of one length."""
        s = self.tokens[self.starts[index] : self.starts[index + 1]].astype(np.int32)
        weight = np.ones(len(s), dtype=np.float32)
        if not weights.loss_on_context:
            weight[: self.completions[index]] = 0.0
        replay_start, replay_end = self.replays[index]
        weight[replay_start:replay_end] = weights.replay_weight
        weight[np.isin(s, weights.join_ids)] = 0.0
        return {"tokens": s[:-1], "targets": s[1:], "weights": weight[1:]}


def tokenize_calls(
    demonstrations: Iterable[Demonstration], tokenizer: Tokenizer, *, row_len: int, max_tokens: int | None = None
) -> TokenizedCalls:
    """Tokenise every call of the demonstrations, in order.

    Args:
      demonstrations: the demonstrations.
      tokenizer: the model's.
      row_len: calls that need more tokens than this are dropped, counted and logged.
      max_tokens: stop after the demonstration that brings the tokens kept to this number.

    Raises:
      ValueError: no call fits, or the tokenizer cannot write a call's text.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    kept: list[NDArray[np.generic]] = []
    starts, completions, replays = [0], [], []
    num_dropped = 0
    for demonstration in demonstrations:
        for call, prompt in zip(demonstration.calls, prompts_of(demonstration.calls), strict=True):
            ids, completion, replay = _tokenize(call, prompt, tokenizer)
            if len(ids) - 1 > row_len:
                num_dropped += 1
                continue
            kept.append(np.asarray(ids, dtype=dtype))
            starts.append(starts[-1] + len(ids))
            completions.append(completion)
            replays.append(replay)
        if max_tokens is not None and starts[-1] >= max_tokens:
            break
    if num_dropped:
        _logger.warning(
            "%d of %d calls need more than row_len=%d tokens and are dropped",
            num_dropped,
            num_dropped + len(kept),
            row_len,
        )
    if not kept:
        raise ValueError(f"no call to train on: {num_dropped} calls are longer than row_len={row_len} tokens")
    return TokenizedCalls(
        tokens=np.concatenate(kept),
        starts=np.asarray(starts, dtype=np.int64),
        completions=np.asarray(completions, dtype=np.int64),
        replays=np.asarray(replays, dtype=np.int64).reshape(-1, 2),
        num_dropped=num_dropped,
    )


def prompts_of(calls: Sequence[Call]) -> list[str]:
    """Return the prompt with which the thread of each call began; that of its parent where it is a fork.

    Calls are in the order of a `Demonstration`.
    """
    prompts: list[str] = []
    threads: dict[int, list[tuple[Call, str]]] = {}  # by depth, the latest thread's calls with their prompts
    for call in calls:
        own = threads.get(call.depth, [])
        if own and own[-1][0].ends_in_spawn:  # it goes on
            prompts.append(own[-1][1])
        else:
            own = threads[call.depth] = []
            above = threads.get(call.depth - 1, [])
            forked = (prompt for parent, prompt in above if call.context.startswith(parent.context + parent.completion))
            prompts.append(next(forked, call.context))
        own.append((call, prompts[-1]))
    return prompts


def _tokenize(call: Call, prompt: str, tokenizer: Tokenizer) -> tuple[Sequence[int], int, tuple[int, int]]:
    """Return the call's ids, the place where its completion begins, and where its replay begins and ends."""
    ids = tokenizer.encode_prompt(prompt)
    ids += tokenizer.encode_continuation(call.context[len(prompt) :], ids)
    completion = len(ids)
    ids += tokenizer.encode_continuation(call.completion[: call.replay_start], ids)
    replay_start = len(ids)
    ids += tokenizer.encode_continuation(call.completion[call.replay_start :], ids)
    replay_end = len(ids)
    if not call.ends_in_spawn:
        ids.append(tokenizer.eos_id)
    return ids, completion, (replay_start, replay_end)
