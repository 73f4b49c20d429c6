"""Measure training speed: SFT and GRPO steps against the machine's limit, and beside other systems.

    python launch/benchmark_train.py                                             # the main job's model
    python launch/benchmark_train.py --peers=hf,trl --json=train.json --plot=train.svg

Weights are random, because speed depends on shapes only. `make peers PEERS="hf trl"` makes the peers' environments
first. Exit codes: 0 done, 1 failed, 2 bad arguments or config.
"""

import sys

from absl import flags

from apr_jax import entry
from apr_jax.config import ConfigError

_CONFIG = entry.define_config("benchmark_train.py")
_PEERS = flags.DEFINE_list("peers", [], "Other systems to measure: hf (SFT), trl (GRPO).")
_TURNS = entry.define_number("turns", 5, "Passes of each contestant that count.", low=1)
_PHASES = flags.DEFINE_list("phases", ["sft", "grpo"], "Phases to measure: sft, grpo.")
_PEER_SECONDS = entry.define_number("peer_seconds", 900.0, "Time limit of one peer.", low=1.0)
_JSON = entry.JsonFlag("the figures")
_PLOT = entry.define_output("plot", "Draw tokens/s here.", (".svg", ".png"))


def main() -> None:
    config = _CONFIG.config()
    from apr_jax.bench import training_report
    from apr_jax.bench.training import Session
    from apr_jax.bench.training_peers import PEERS

    for flag, given, known in (("peers", _PEERS.value, tuple(PEERS)), ("phases", _PHASES.value, ("sft", "grpo"))):
        if unknown := [name for name in given if name not in known]:
            raise ConfigError(f"--{flag}: there is no {unknown[0]!r}; choose of {', '.join(known)}")
    session = Session(
        peers=_PEERS.value,
        turns=_TURNS.value,
        seconds_limit=_PEER_SECONDS.value,
        say=lambda text: print(text, file=sys.stderr),
    )
    figures = training_report.measure(config, _PHASES.value, session)
    print(training_report.table(figures))
    if _PLOT.value:
        training_report.write_plot(_PLOT.value, figures)
    _JSON.write(figures)


if __name__ == "__main__":
    entry.run(main)
