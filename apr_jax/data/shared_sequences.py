"""Training sequences of workers on a shared cache: the prompt, and every worker's segment, with what each token saw.

    prompt prompt prompt | header text text text .. | header text text ..
    workers 0 0 0        | 1 1 1 ..                 | 2 2 2 ..

The rules are the engine's (`engine/groups.py`): time 0 reads the last token of every header; at time t a worker sees of
the others what they have read at times up to t; earlier tokens see none of them.
"""

import array
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from apr_jax.data.tokenized import Arrays, LossWeights, Sequence1D, id_type, starts_of
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.tasks.base import Call, Demonstration


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


class SharedCalls:
    """Demonstrations of workers, each one training sequence (`data.tokenized.Calls`).

    A group's ids are its prompt, then each worker's header and text. Its parts are the prompt's length, and for each
    worker those of header and text, and where in the two together the replay begins and ends.
    """

    def __init__(self, arrays: Arrays) -> None:
        """Take `tokens`, `sizes` [N], `parts`, `num_parts` [N], and `dropped`, whose sum counts groups too long."""
        self._tokens, self._starts = arrays["tokens"], starts_of(arrays["sizes"])
        self._parts, self._part_starts = arrays["parts"], starts_of(arrays["num_parts"])
        self.num_dropped = int(arrays["dropped"].sum())
        self.lengths = arrays["sizes"] - (arrays["num_parts"].astype(np.int64) - 1) // 4

    def __len__(self) -> int:
        return len(self.lengths)

    def sequence(self, index: int, weights: LossWeights) -> Sequence1D:
        """Return one demonstration as `shared_sequence` does, and `weights` float32 on what the workers wrote."""
        ids = self._tokens[self._starts[index] : self._starts[index + 1]].tolist()
        begin, *rest = self._parts[self._part_starts[index] : self._part_starts[index + 1]].tolist()
        workers = [rest[place : place + 4] for place in range(0, len(rest), 4)]
        place, segments = begin, []
        for header, written, _, _ in workers:
            middle, end = place + header, place + header + written
            segments.append(Segment(ids[place:middle], ids[middle:end]))
            place = end
        arrays = shared_sequence(ids[:begin], segments)
        written_T = arrays.pop("written")
        weight = np.sign(arrays["workers"] if weights.loss_on_context else written_T).astype(np.float32)
        for header, written, first, last in workers:
            weight[begin + first - 1 : begin + last - 1] = weights.replay_weight
            begin += header + written - 1
        return {**arrays, "weights": weight}


def tokenize_shared(
    demonstrations: Iterable[Demonstration], tokenizer: Tokenizer, *, row_len: int, max_tokens: int | None = None
) -> Arrays:
    """Tokenise demonstrations whose calls are workers on one cache. Return what `SharedCalls` takes.

    Arguments and errors are those of `tokenize_calls`. What the calls' contexts have in common, up to the last line
    that is a worker's own, is the prompt.
    """
    tokens, sizes, parts, num_parts = (array.array("i") for _ in range(4))
    num_dropped = total = 0
    for demonstration in demonstrations:
        prompt_text = common_prompt([call.context for call in demonstration.calls])
        ids = list(tokenizer.encode_prompt(prompt_text))
        places = [len(ids)]
        for call in demonstration.calls:
            own, of_worker = _tokenize(call, len(prompt_text), ids[: places[0]], tokenizer)
            ids += own
            places += of_worker
        length = len(ids) - len(demonstration.calls)  # that a group takes in a row
        if length > row_len:
            num_dropped += 1
            continue
        tokens.extend(ids)
        sizes.append(len(ids))
        parts.extend(places)
        num_parts.append(len(places))
        total += length
        if max_tokens is not None and total >= max_tokens:
            break
    return {
        "tokens": np.array(tokens, dtype=id_type(tokenizer)),
        "sizes": np.array(sizes, np.int32),
        "parts": np.array(parts, np.int32),
        "num_parts": np.array(num_parts, np.int32),
        "dropped": np.array([num_dropped], np.int64),
    }


def common_prompt(contexts: Sequence[str]) -> str:
    """Return the lines with which all contexts begin, less one for each of them. Raises ValueError for none."""
    split = [context.splitlines(keepends=True) for context in contexts]
    count = min(len(lines) for lines in split) - 1
    same = [all(lines[i] == split[0][i] for lines in split) for i in range(count)]
    shared = "".join(split[0][: same.index(False) if False in same else count])
    if not shared:
        raise ValueError(f"workers' contexts have no line in common: {contexts[0]!r}")
    return shared


def _tokenize(
    call: Call, prompt_chars: int, prompt: Sequence[int], tokenizer: Tokenizer
) -> tuple[list[int], tuple[int, int, int, int]]:
    """Return a worker's header and text, their lengths, and where in both together the replay begins and ends."""
    header = tokenizer.encode_continuation(call.context[prompt_chars:], prompt)
    written = tokenizer.encode_continuation(call.completion[: call.replay_start], header)
    replay = tokenizer.encode_continuation(call.completion[call.replay_start :], [*header, *written])
    begin = len(header) + len(written)
    ids = [*header, *written, *replay, tokenizer.eos_id]
    return ids, (len(header), len(ids) - len(header), begin, begin + len(replay))
