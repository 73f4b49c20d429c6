"""Hogwild! inference: workers that decode at the same time on one cache and see each other's tokens as they come.

Rodionov et al. 2025, arXiv 2504.06261. Every worker sees the common prompt, then the others' text, then its own; keys
are stored once and queries rotated (section 3; `model/views/shared.py`). No framework tells workers how to collaborate:
what they do with what they see is the policy's. The first worker that ends with an answer has answered for all, and the
others are cut off.

Of the paper's layouts this is the contiguous one, token by token: what a worker reads in a step the others see in that
step, as in the paper's released code. What differs: headers do not see each other (they are prefilled one by one),
there is no shared history of finished paragraphs (the combined layout), and no prompt asks workers whether their work
is redundant.

Any policy runs so (zero-shot: each worker gets an adaptive thread's prompt and a line that names it). One that was
trained for it has learnt to share out the work, and to leave when another has the answer (Countdown's workers:
`tasks/countdown/hogwild.py`).
"""

from collections.abc import Generator, Sequence
from typing import Any

from apr_jax.engine.threads import Decode, Join, Open, Share
from apr_jax.reasoning.base import Method, Outcome, Settings, Tally, Transcript, read_end
from apr_jax.tasks.dialect import Ending, WorkerDialect


def hogwild(problem: Any, settings: Settings) -> Generator[Any, Any, Outcome]:
    """Run workers on a shared cache, to the first answer.

    Without an answer the outcome is that of the first worker that was cut off or malformed, else "no_solution".
    """
    dialect = settings.task.dialect("hogwild", WorkerDialect)
    text = dialect.prompt(problem)
    prompt = settings.tokenizer.encode_prompt(text)
    workers = [_worker(dialect, number, text, prompt, settings) for number in range(dialect.num_workers)]
    handle = yield Share(prompt, workers)
    returned: list[Ending | None] = yield Join(handle, _has_answered)
    endings = [ending for ending in returned if ending is not None]
    failures = [ending for ending in endings if ending.status in ("malformed", "truncated")]
    tally = Tally(child_reasons=[ending.reason for ending in failures])
    tally.child_paths = [ending.answer for ending in endings if ending.answer is not None]
    tally.spawned(len(workers))
    return tally.outcome(next((ending for ending in endings if ending.answer is not None), (failures or endings)[0]))


HOGWILD = Method(
    name="hogwild",
    program=hogwild,
    dialect="hogwild",
    kind=WorkerDialect,
    budget=None,
    shares_cache=True,
    root_writes=False,
)


def _worker(
    dialect: WorkerDialect, number: int, text: str, prompt: Sequence[int], settings: Settings
) -> Generator[Any, Any, Ending]:
    tokenizer = settings.tokenizer
    header = dialect.header(number)
    thread = yield Open(tokenizer.encode_continuation(header, prompt))
    page = Transcript(tokenizer, thread, text + header)
    stop = yield Decode(thread, tokenizer.eos_ids)
    return read_end(dialect, page, stop)


def _has_answered(ending: Ending) -> bool:
    return ending.answer is not None
