"""Demonstrations as token arrays: every call of a split, tokenised once and held in one flat array."""

import array
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from apr_jax.data.tokenizer import Tokenizer
from apr_jax.tasks.base import Call, Demonstration

Sequence1D = dict[str, NDArray[np.generic]]
Arrays = dict[str, NDArray[Any]]  # of which a `Calls` is made


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """The weight in the loss of each kind of target token. A token that only the engine writes never counts."""

    replay_weight: float  # the replay of a winning path; other completion tokens and EOS count 1
    loss_on_context: bool  # context tokens count 1 instead of 0
    join_ids: tuple[int, ...]


class Calls(Protocol):
    """Training sequences of N calls, or of N groups of workers, as flat arrays.

    Arrays of several parts of a split, joined by their names, are those of the whole.
    """

    num_dropped: int  # those left out because they need more than a row

    def __init__(self, arrays: Arrays) -> None: ...

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens that each takes in a row, int64 [N]."""

    def sequence(self, index: int, weights: LossWeights) -> Sequence1D:
        """Return one as a training sequence: int32 `tokens` and `targets`, float32 `weights`, .. of one length."""


class TokenizedCalls:
    """N calls, each as s = BOS + context + completion + ([EOS] unless it ends in a spawn), one after the other.

    tokens: [sum of lengths], uint16 if the vocabulary allows it, else int32.
    starts: [N + 1] int64; call n is tokens[starts[n] : starts[n + 1]].
    parts: [N, 3] int32, places in s: the completion begins, and the replay of the winning path begins and ends; the
      last two are equal without one.
    """

    def __init__(self, arrays: Arrays) -> None:
        """Take `tokens`, `sizes` [N], `parts` [3 N] and `dropped`, whose sum counts calls that need more than a row."""
        self.tokens = arrays["tokens"]
        self.starts = starts_of(arrays["sizes"])
        self.parts = arrays["parts"].reshape(-1, 3)
        self.num_dropped = int(arrays["dropped"].sum())

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each call in a row: inputs are s[:-1], targets s[1:]."""
        return np.diff(self.starts) - 1

    def sequence(self, index: int, weights: LossWeights) -> Sequence1D:
        """Return one call as a training sequence: int32 `tokens` and `targets`, float32 `weights`, of one length."""
        s = self.tokens[self.starts[index] : self.starts[index + 1]].astype(np.int32)
        completion, replay_start, replay_end = self.parts[index]
        weight = np.ones(len(s), dtype=np.float32)
        if not weights.loss_on_context:
            weight[:completion] = 0.0
        weight[replay_start:replay_end] = weights.replay_weight
        weight[np.isin(s, weights.join_ids)] = 0.0
        return {"tokens": s[:-1], "targets": s[1:], "weights": weight[1:]}


def tokenize_calls(
    demonstrations: Iterable[Demonstration], tokenizer: Tokenizer, *, row_len: int, max_tokens: int | None = None
) -> Arrays:
    """Tokenise every call of the demonstrations, in order. Return what `TokenizedCalls` takes.

    Args:
      demonstrations: the demonstrations.
      tokenizer: the model's.
      row_len: calls that need more tokens than this are dropped and counted.
      max_tokens: stop after the demonstration that brings the tokens kept to this number.

    Raises ValueError if the tokenizer cannot write a call's text.
    """
    tokens, sizes, parts = array.array("i"), array.array("i"), array.array("i")
    num_dropped = 0
    for demonstration in demonstrations:
        for call, prompt in zip(demonstration.calls, prompts_of(demonstration.calls), strict=True):
            ids, places = _tokenize(call, prompt, tokenizer)
            if len(ids) - 1 > row_len:
                num_dropped += 1
                continue
            tokens.extend(ids)
            sizes.append(len(ids))
            parts.extend(places)
        if max_tokens is not None and len(tokens) >= max_tokens:
            break
    return {
        "tokens": np.array(tokens, dtype=id_type(tokenizer)),
        "sizes": np.array(sizes, np.int32),
        "parts": np.array(parts, np.int32),
        "dropped": np.array([num_dropped], np.int64),
    }


def id_type(tokenizer: Tokenizer) -> type[np.generic]:
    """Return the smallest of the types that hold a tokenizer's ids: uint16 or int32."""
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32


def starts_of(sizes: NDArray[Any]) -> NDArray[np.int64]:
    """Return where each of parts of these sizes begins, and the last one's end: int64 [N + 1]."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


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


def _tokenize(call: Call, prompt: str, tokenizer: Tokenizer) -> tuple[Sequence[int], tuple[int, int, int]]:
    """Return the call's ids, and the places where its completion begins and its replay begins and ends."""
    ids = tokenizer.encode_prompt(prompt)
    ids += tokenizer.encode_continuation(call.context[len(prompt) :], ids)
    completion = len(ids)
    ids += tokenizer.encode_continuation(call.completion[: call.replay_start], ids)
    replay_start = len(ids)
    ids += tokenizer.encode_continuation(call.completion[call.replay_start :], ids)
    replay_end = len(ids)
    if not call.ends_in_spawn:
        ids.append(tokenizer.eos_id)
    return ids, (completion, replay_start, replay_end)
