"""Text as a thread writes it, while the engine runs."""

import codecs
from collections.abc import Callable

from apr_jax.data.tokenizer import Tokenizer
from apr_jax.engine.threads import Happening, RolloutKey, Thread


class StreamedText:
    """An `observer` for Engine.run that hands on the text of one thread piece by piece, whole characters only."""

    def __init__(self, tokenizer: Tokenizer, prompt_length: int, show: Callable[[str], None]) -> None:
        """Hand on what stands after the thread's first `prompt_length` tokens."""
        self._tokenizer, self._done, self._show = tokenizer, prompt_length, show
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, key: RolloutKey, thread: Thread, happening: Happening) -> None:
        tokens, self._done = thread.tokens[self._done :], len(thread.tokens)
        pieces = self._tokenizer.token_bytes(tokens, thread.tokens[: self._done - len(tokens)])
        text = self._decoder.decode(b"".join(pieces), final=happening is Happening.ENDED)
        if text:
            self._show(text)
