"""Text in, text out: a thread goes on with any prompt, and where it is told so, its spawns are run and joined."""

import dataclasses
from collections.abc import Generator
from typing import Any

from apr_jax.engine.threads import Decode, Open, StopReason
from apr_jax.reasoning.adaptive import adaptive_text
from apr_jax.reasoning.base import Settings, Transcript, truncated_reason
from apr_jax.tasks.dialect import SpawnDialect


@dataclasses.dataclass(frozen=True)
class Written:
    """The text that stands after a prompt in the end. With spawns, joins are in it in place of the spawns."""

    text: str
    reason: str  # why it did not end by itself, in one snake_case word; "": it did


def write(prompt: str, settings: Settings, dialect: SpawnDialect | None = None) -> Generator[Any, Any, Written]:
    """Go on with a prompt to EOS or a limit.

    Args:
      dialect: tells what a spawn looks like; None: all is text.
    """
    if dialect is not None:
        text, reason = yield from adaptive_text(dialect, prompt, settings)
        return Written(text[len(prompt) :], reason)
    thread = yield Open(settings.tokenizer.encode_prompt(prompt))
    page = Transcript(settings.tokenizer, thread, prompt)
    stop = yield Decode(thread, settings.tokenizer.eos_ids)
    reason = "" if stop.reason is StopReason.TOKEN else truncated_reason(stop)
    return Written(page.text()[len(prompt) :], reason)
