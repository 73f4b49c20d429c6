"""Draw a comparison as one self-contained page: figures, tables, the changes under RL, and the threads behind them.

    python launch/report.py                                                # of runs/comparison
    python launch/report.py --comparison=runs/mine --run=runs/laptop       # with a training run's behaviour under RL
    python launch/report.py --comparison=runs/mine --screenshots=docs/pictures  # and pictures of it (needs a Chromium)
    python launch/report.py --run=runs/laptop                              # a training run's own page, once more

The page works offline and loads nothing. docs/comparing.md says what its figures mean.
Exit codes: 0 done, 1 failed, 2 bad arguments.
"""

import pathlib
import shlex
import sys

from absl import flags

from apr_jax import entry
from apr_jax.config import ConfigError
from apr_jax.paths import path_of
from apr_jax.progress import busy

_COMPARISON = flags.DEFINE_string("comparison", None, "Folder of launch/compare.py [runs/comparison without --run].")
_RUN = flags.DEFINE_string(
    "run", None, "Folder of a training run, for its change under RL and the rollouts it learnt from."
)
_OUT = entry.define_output(
    "out", "Write the page here [report.html in the comparison's folder, or the run's].", (".html",)
)
_SCREENSHOTS = entry.define_folder("screenshots", "Folder for pictures of the page (make screenshots).")


def main() -> None:
    run = path_of(_RUN.value) if _RUN.value else None
    if run is not None and not run.is_dir():
        raise ConfigError(f"--run={run}: no such folder")
    from apr_jax.bench.browser import NoBrowserError, chromium, take_pictures
    from apr_jax.evaluation.report.comparison_report import write_comparison
    from apr_jax.evaluation.report.run_report import write_report

    try:
        with busy("Drawing the report"):
            if run is not None and _COMPARISON.value is None:
                out = write_report(run, _OUT.value)
            else:
                comparison = path_of(_COMPARISON.value or "runs/comparison")
                out = path_of(_OUT.value) if _OUT.value else comparison / "report.html"
                command = shlex.join(["python", "launch/report.py", *sys.argv[1:]])
                write_comparison(comparison, out, command=command, run=run)
        print(out)
        if _SCREENSHOTS.value:
            with chromium() as browser:
                for picture in take_pictures(browser, out, pathlib.Path(_SCREENSHOTS.value)):
                    print(picture)
    except NoBrowserError as error:
        raise entry.FailedError(str(error)) from error


if __name__ == "__main__":
    entry.run(main)
