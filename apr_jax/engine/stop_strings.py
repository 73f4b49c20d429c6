"""Stop strings: a Decode may end with a text instead of a token, however tokens cut that text. No JAX.

The device goes on to the end of its visit. Then the host looks for the first string that is complete in what the thread
has written since its Decode began. The token that completes it is the Decode's last. Tokens drawn after it are trimmed
as if they had never been drawn: their places, log-probabilities and random numbers are those of the tokens that come
next. So a rollout does not depend on how many steps a visit has.

Text is compared as UTF-8, so a string is found wherever it lies, across tokens that cut its characters too.
"""

import dataclasses
from collections.abc import Callable, Sequence

TokenBytes = Callable[[Sequence[int], Sequence[int]], list[bytes]]


@dataclasses.dataclass(frozen=True)
class StopStrings:
    """The texts that end a Decode, none of them empty.

    `token_bytes(ids, before)` gives the UTF-8 of each of `ids`, where they follow the tokens `before` in their thread.
    """

    strings: tuple[str, ...]
    token_bytes: TokenBytes

    def __post_init__(self) -> None:
        if not all(self.strings):
            raise ValueError(f"stop strings {self.strings!r}: an empty one is complete before anything is written")


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """A stop string in what a thread wrote."""

    count: int  # tokens of this visit up to the one that completes the string, which is included
    string: str
    excess: int  # bytes of that token after the string


class StringWatch:
    """The search of one Decode for its stop strings, visit after visit."""

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._longest = max((len(string.encode()) for string in stops.strings), default=0)
        self._tail = b""  # the end of what was written, too short for any string that was not found in it

    def take(self, before: Sequence[int], tokens: Sequence[int]) -> Found | None:
        """Look at tokens that were written after `before`, the whole thread; return the first string completed.

        Of strings that are complete at the same byte the longest is found.
        """
        pieces = self._stops.token_bytes(tokens, before)
        text = self._tail + b"".join(pieces)
        starts = [(text.find(string.encode()), string) for string in self._stops.strings]
        ends = [(start + len(string.encode()), start, string) for start, string in starts if start >= 0]
        found = min(ends, default=None)
        if found is None:
            self._tail = text[max(0, len(text) - self._longest + 1) :]
            return None
        end, _, string = found
        done = len(self._tail)
        for count, piece in enumerate(pieces, start=1):
            done += len(piece)
            if done >= end:
                return Found(count, string, done - end)
        raise AssertionError("the string ends in what was written")
