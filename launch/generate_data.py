"""Samples Countdown problems, searches each with both solvers, and reports how fast and how well.

    python launch/generate_data.py
    python launch/generate_data.py --config=configs/sft.py:paper --num_problems=10000 --json=rate.json
    python launch/generate_data.py --tokens --config.task.parent_beams="(3,)" --config.task.retry_probability=1.0
    python launch/generate_data.py --num_problems=100 --output=demonstrations.jsonl

The paper's variant is the reference's own setting: four numbers of 1..99. Training builds its own data set.
Exit codes: 0 done, 1 failed, 2 bad arguments or config.
"""

import contextlib
import dataclasses
import json

from absl import flags

from apr_jax import entry
from apr_jax.config import Config
from apr_jax.data.tokenizer import load_tokenizer
from apr_jax.progress import progress
from apr_jax.tasks.countdown import generation
from apr_jax.tasks.countdown.trace import Demonstration, demonstrated_tokens

_CONFIG = entry.define_config("sft.py")
_NUM_PROBLEMS = flags.DEFINE_integer("num_problems", 2_000, "Problems to sample and search.", lower_bound=1)
_OUTPUT = entry.define_output("output", "Write both searches here, one JSON object a problem.")
_TOKENS = flags.DEFINE_bool("tokens", False, "Also count what the parallel searches write, by the config's tokenizer.")
_JSON = entry.JsonFlag("the figures")


def main() -> None:
    config = _CONFIG.config()
    try:
        _measure(config)
    except OSError as error:
        raise entry.FailedError(str(error)) from error


def _measure(config: Config) -> None:
    tokenizer = load_tokenizer(config.data.tokenizer) if _TOKENS.value else None
    lengths: list[tuple[int, int]] = []
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(open(_OUTPUT.value, "w", encoding="utf-8")) if _OUTPUT.value else None
        bar = stack.enter_context(progress(_NUM_PROBLEMS.value, "Searched", "problems"))

        def on_problem(serial: Demonstration, adaptive: Demonstration) -> None:
            if output is not None:
                searches = {search.method: dataclasses.asdict(search) for search in (serial, adaptive)}
                output.write(json.dumps(searches) + "\n")
            if tokenizer is not None:
                lengths.append(demonstrated_tokens(adaptive, lambda text: len(tokenizer.encode(text))))
            bar.update()

        figures = generation.measure(config.task, config.seed, _NUM_PROBLEMS.value, config.data.num_workers, on_problem)
    print(
        f"{figures.problems:,} problems in {figures.seconds:.1f} s, "
        f"{figures.problems_per_second_per_core:,.0f} a second and core\n"
        f"solved: serial {figures.serial_accuracy:.1%}, parallel {figures.parallel_accuracy:.1%}"
    )
    written = dataclasses.asdict(figures)
    if lengths:
        sequential, total = (sum(column) / len(lengths) for column in zip(*lengths, strict=True))
        print(f"parallel: {sequential:.1f} tokens one after the other, {total:.1f} in all threads")
        written |= {"sequential_tokens": sequential, "total_tokens": total}
    _JSON.write(written)


if __name__ == "__main__":
    entry.run(main)
