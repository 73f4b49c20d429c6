"""Decode speed by lane count, with random weights.

    python launch/benchmark_decode.py
    python launch/benchmark_decode.py --config=configs/benchmark_decode.py:paper --lanes=1,16 --json=decode.json

Exit codes: 0 done, 1 failed, 2 bad arguments or config.
"""

import json
import pathlib

from absl import flags

from apr_jax import entry
from apr_jax.config import ConfigError

_CONFIG = entry.define_config("benchmark_decode.py")
_LANES = flags.DEFINE_list("lanes", ["1", "8", "16", "64", "128"], "Lane counts to measure.")
_JSON = flags.DEFINE_string("json", None, "Write the figures here as one JSON object.")


def _lane_counts() -> tuple[int, ...]:
    if not all(count.isdecimal() and int(count) for count in _LANES.value):
        raise ConfigError(f"--lanes={','.join(_LANES.value)} must be positive whole numbers")
    return tuple(int(count) for count in _LANES.value)


def main() -> None:
    config = _CONFIG.config()
    lanes = _lane_counts()
    from apr_jax.engine import benchmark

    figures = benchmark.benchmark_decode(config, lanes)
    print(benchmark.table(figures))
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    entry.run(main)
