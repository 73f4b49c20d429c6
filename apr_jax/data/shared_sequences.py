"""Training sequences of workers on a shared cache: the prompt, and every worker's segment, with what each token saw.

    prompt prompt prompt | header text text text .. | header text text ..
    workers 0 0 0        | 1 1 1 ..                 | 2 2 2 ..

The rules are the engine's (`engine/groups.py`): time 0 reads the last token of every header; at time t a worker sees of
the others what they have read at times up to t; earlier tokens see none of them.
"""

import dataclasses
import logging
from collections.abc import Iterable, Sequence

import numpy as np

from apr_jax.data.tokenized import LossWeights, Sequence1D
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.tasks.base import Call, Demonstration

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Segment:
    """One worker's tokens."""

    header: Sequence[int]  # what it was given after the prompt, at least one token
    written: Sequence[int]  # what it wrote, the token that ended it included


def shared_sequence(prompt: Sequence[int], segments: Sequence[Segment]) -> Sequence1D:
    """Return the workers of one group as one training sequence; all arrays int32, of one length.

    Returns `tokens`, `targets` (0 where the next token is no worker's own), `written` (1 where the target is a token
    that a worker wrote), `positions` (in the worker's own row), and what `model.shared_attention.SharedRows` takes:
    `workers`, `places` and `seen` `[T, W]`. Read are the prompt and of each segment all but its last token.

    Raises ValueError for an empty prompt, and for a worker without a header.
    """
    if not prompt or any(not segment.header for segment in segments):
        raise ValueError("workers on a shared cache need a prompt, and each of them a header")
    count = len(segments)
    headers = np.array([len(segment.header) for segment in segments])
    lengths = np.array([len(segment.header) + len(segment.written) - 1 for segment in segments])  # tokens read
    blank = np.zeros(len(prompt), np.int32)
    parts = [
        {
            "tokens": np.asarray(prompt, np.int32),
            "targets": blank,
            "written": blank,
            "positions": np.arange(len(prompt), dtype=np.int32),
            "workers": blank,
            "places": blank,
            "seen": np.zeros((len(prompt), count), np.int32),
        }
    ]
    for number, segment in enumerate(segments):
        own = np.array([*segment.header, *segment.written], np.int32)
        places = np.arange(lengths[number], dtype=np.int32)
        times = places - (headers[number] - 1)
        seen = np.minimum(times[:, None] + headers, lengths) * (times >= 0)[:, None]
        parts.append(
            {
                "tokens": own[:-1],
                "targets": own[1:],
                "written": (times >= 0).astype(np.int32),
                "positions": len(prompt) + places,
                "workers": np.full(len(places), 1 + number, np.int32),
                "places": places,
                "seen": seen.astype(np.int32),
            }
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@dataclasses.dataclass(frozen=True)
class _Tokenized:
    """One worker's call, as ids."""

    segment: Segment
    replay: tuple[int, int]  # where in its header and text together the replay begins and ends


class SharedCalls:
    """Demonstrations of workers, each one training sequence. As `data.tokenized.TokenizedCalls`."""

    def __init__(self, groups: Sequence[tuple[Sequence[int], Sequence[_Tokenized]]], num_dropped: int) -> None:
        self._groups = groups
        self.num_dropped = num_dropped
        self.lengths = np.array([_length(*group) for group in groups], np.int64)

    def __len__(self) -> int:
        return len(self._groups)

    def sequence(self, index: int, weights: LossWeights) -> Sequence1D:
        """Return one demonstration as `shared_sequence` does, and `weights` float32 on what the workers wrote."""
        prompt, workers = self._groups[index]
        arrays = shared_sequence(prompt, [worker.segment for worker in workers])
        written = arrays.pop("written")
        weight = np.sign(arrays["workers"] if weights.loss_on_context else written).astype(np.float32)
        begin = len(prompt)
        for worker in workers:
            first, last = worker.replay
            weight[begin + first - 1 : begin + last - 1] = weights.replay_weight
            begin += len(worker.segment.header) + len(worker.segment.written) - 1
        return {**arrays, "weights": weight}


def tokenize_shared(
    demonstrations: Iterable[Demonstration], tokenizer: Tokenizer, *, row_len: int, max_tokens: int | None = None
) -> SharedCalls:
    """Tokenise demonstrations whose calls are workers on one cache. Arguments and errors as `tokenize_calls`.

    What the calls' contexts have in common, up to the last line that is a worker's own, is the prompt.
    """
    groups: list[tuple[Sequence[int], Sequence[_Tokenized]]] = []
    num_dropped = total = 0
    for demonstration in demonstrations:
        prompt_text = common_prompt([call.context for call in demonstration.calls])
        prompt = tokenizer.encode_prompt(prompt_text)
        group = prompt, [_tokenize(call, len(prompt_text), prompt, tokenizer) for call in demonstration.calls]
        if _length(*group) > row_len:
            num_dropped += 1
            continue
        groups.append(group)
        total += _length(*group)
        if max_tokens is not None and total >= max_tokens:
            break
    if num_dropped:
        _logger.warning("%d demonstrations need more than row_len=%d tokens and are dropped", num_dropped, row_len)
    if not groups:
        raise ValueError(f"nothing to train on: {num_dropped} demonstrations are longer than row_len={row_len} tokens")
    return SharedCalls(groups, num_dropped)


def common_prompt(contexts: Sequence[str]) -> str:
    """Return the lines with which all contexts begin, less one for each of them. Raises ValueError for none."""
    split = [context.splitlines(keepends=True) for context in contexts]
    count = min(len(lines) for lines in split) - 1
    same = [all(lines[i] == split[0][i] for lines in split) for i in range(count)]
    shared = "".join(split[0][: same.index(False) if False in same else count])
    if not shared:
        raise ValueError(f"workers' contexts have no line in common: {contexts[0]!r}")
    return shared


def _tokenize(call: Call, prompt_chars: int, prompt: Sequence[int], tokenizer: Tokenizer) -> _Tokenized:
    header = tokenizer.encode_continuation(call.context[prompt_chars:], prompt)
    written = tokenizer.encode_continuation(call.completion[: call.replay_start], header)
    replay = tokenizer.encode_continuation(call.completion[call.replay_start :], [*header, *written])
    begin = len(header) + len(written)
    whole = np.array([*written, *replay, tokenizer.eos_id], np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
    return _Tokenized(Segment(header, whole), (begin, begin + len(replay)))  # type: ignore[arg-type]


def _length(prompt: Sequence[int], workers: Sequence[_Tokenized]) -> int:
    """Return the tokens that a group takes in a row."""
    return len(prompt) + sum(len(w.segment.header) + len(w.segment.written) - 1 for w in workers)
