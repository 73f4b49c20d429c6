"""Sample problems of a task, demonstrate each by its solvers, and report how fast and how well.

    python launch/generate_data.py
    python launch/generate_data.py --config=configs/sft.py:paper --num_problems=10000 --json=rate.json
    python launch/generate_data.py --tokens --config.task.parent_beams="(3,)" --config.task.retry_probability=1.0
    python launch/generate_data.py --config=configs/countdown4.py --tokens --methods=adaptive,serial,hogwild
    python launch/generate_data.py --num_problems=100 --output=demonstrations.jsonl

A task is demonstrated by --methods, else by serial and by adaptive search where it has both. The paper's variant is the
reference's own setting: four numbers of 1..99. Training builds its own data set.
Exit codes: 0 done, 1 failed, 2 bad arguments or config, 75 stopped by a signal.
"""

import contextlib
import dataclasses
import json
from collections.abc import Sequence

from absl import flags

from apr_jax import entry
from apr_jax.config import Config, ConfigError
from apr_jax.data.tokenizer import token_counter
from apr_jax.files import writing
from apr_jax.lock import locked
from apr_jax.paths import path_of
from apr_jax.progress import progress
from apr_jax.tasks import generation, task_of
from apr_jax.tasks.base import Demonstration
from apr_jax.tasks.dialect import Lengths, demonstrated_tokens

_NAMES = {"serial": "serial", "adaptive": "parallel"}  # methods that are demonstrated, and their names in the figures
_CONFIG = entry.define_config("sft.py")
_NUM_PROBLEMS = entry.define_number("num_problems", 2_000, "Problems to sample and demonstrate.", low=1)
_METHODS = flags.DEFINE_list("methods", [], "Ways of reasoning [serial and adaptive, or data.method].")
_OUTPUT = entry.define_output("output", "Write the demonstrations here, one JSON object a problem.")
_TOKENS = flags.DEFINE_bool("tokens", False, "Also count what the searches write and hold, by the config's tokenizer.")
_JSON = entry.JsonFlag("the figures")


def main() -> None:
    _measure(_CONFIG.config())


def _measure(config: Config) -> None:
    dialects = task_of(config).dialects
    unknown = [name for name in _METHODS.value if name not in dialects]
    if unknown:
        known = ", ".join(sorted(dialects))
        raise ConfigError(f"--methods={','.join(_METHODS.value)}: {config.task.name} has {known}, no {unknown[0]}")
    methods = _METHODS.value or [name for name in _NAMES if name in dialects] or [config.data.method]
    count_tokens = token_counter(config)
    lengths: dict[str, list[tuple[Lengths, bool]]] = {name: [] for name in methods if _TOKENS.value}
    with contextlib.ExitStack() as stack:
        output = None
        if _OUTPUT.value:
            lock = path_of(f"{_OUTPUT.value}.lock")
            stack.enter_context(locked(lock, "choose another --output"))
            output = stack.enter_context(writing(path_of(_OUTPUT.value)))
        bar = stack.enter_context(progress(_NUM_PROBLEMS.value, "Searched", "problems"))

        def on_problem(searches: Sequence[Demonstration]) -> None:
            if output is not None:
                written = {search.method: dataclasses.asdict(search) for search in searches}
                output.write((json.dumps(written) + "\n").encode())
            for search in searches if _TOKENS.value else ():
                counted = demonstrated_tokens(dialects[search.method], search, count_tokens)
                lengths[search.method].append((counted, search.correct))
            bar.update()

        figures = generation.measure(config, _NUM_PROBLEMS.value, methods, count_tokens, on_problem)
    print(
        f"{figures.problems:,} problems in {figures.seconds:.1f} s, "
        f"{figures.problems_per_second_per_core:,.0f} a second and core\n"
        "solved: " + ", ".join(f"{_NAMES.get(name, name)} {share:.1%}" for name, share in figures.accuracy.items())
    )
    written = dataclasses.asdict(figures)
    written |= {f"{_NAMES.get(name, name)}_accuracy": share for name, share in written.pop("accuracy").items()}
    window = config.model.max_seq_len
    for name, of_method in lengths.items():
        label = _NAMES.get(name, name)
        figures_of = _token_figures(of_method, window)
        chain = ""
        if "sequential_tokens" in figures_of:
            chain = "{sequential_tokens:.1f} tokens one after the other (p50 {p50:,}, p95 {p95:,}), ".format(
                **figures_of
            )
        print(
            f"{label}: {chain}{figures_of['total_tokens']:.1f} in all threads; "
            f"{figures_of['solved_within_context']:.1%} solved within {window:,} tokens a thread"
        )
        prefix = "" if name == methods[-1] else f"{label}_"
        written |= {f"{prefix}{key}": value for key, value in figures_of.items() if key not in ("p50", "p95")}
    _JSON.write(written)


def _token_figures(counted: Sequence[tuple[Lengths, bool]], window: int) -> dict[str, float]:
    """Return means over demonstrations, each with whether it was solved, and quantiles of the longest chain."""
    held = sum(solved and lengths.peak_context <= window for lengths, solved in counted)
    figures = {
        "total_tokens": sum(lengths.total for lengths, _ in counted) / len(counted),
        "solved_within_context": held / len(counted),
    }
    chains = sorted(lengths.sequential for lengths, _ in counted if lengths.sequential is not None)
    if chains:
        figures["sequential_tokens"] = sum(chains) / len(chains)
        figures |= {"p50": chains[len(chains) // 2], "p95": chains[len(chains) * 95 // 100]}
    return figures


if __name__ == "__main__":
    entry.run(main)
