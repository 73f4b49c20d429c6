"""SoS+: the same kind of search in one thread, as a stream of text (the paper's serial baseline, section 4.1)."""

from collections.abc import Generator
from typing import Any

from apr_jax.engine.threads import Decode, Open
from apr_jax.reasoning.base import Method, Outcome, Settings, Tally, Transcript, read_end
from apr_jax.tasks.dialect import ThreadDialect


def serial(problem: Any, settings: Settings) -> Generator[Any, Any, Outcome]:
    """Run one thread to EOS. A thread that is cut off ends as "truncated", with the reason."""
    return (yield from one_thread(settings.task.dialect("serial", ThreadDialect), problem, settings, settings.budget))


def one_thread(
    dialect: ThreadDialect, problem: Any, settings: Settings, budget: int | None = None
) -> Generator[Any, Any, Outcome]:
    """Run one thread to EOS and read its answer by a dialect."""
    tokenizer = settings.tokenizer
    prompt = dialect.prompt(problem, budget)
    thread = yield Open(tokenizer.encode_prompt(prompt))
    page = Transcript(tokenizer, thread, prompt)
    stop = yield Decode(thread, tokenizer.eos_ids)
    return Tally().outcome(read_end(dialect, page, stop))


SERIAL = Method(name="serial", program=serial, dialect="serial", kind=ThreadDialect, budget="tokens")
