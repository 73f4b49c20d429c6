"""Runs every drill for some minutes, under faults at random moments, and says what held.

    python -m tests.soak --minutes=15 --seed=0 --only=readers,cache,runs,hosts

The counts that docs/reliability.md names belong to 15 minutes; fewer minutes do a share of them. The seed is printed:
the drills `readers` and `cache` repeat with it exactly, and `runs` and `hosts` draw the same faults at the same times.
"""

import argparse
import pathlib
import sys
import tempfile
import time
import traceback

from tests.soak import cache, hosts, readers, runs

DRILLS = {"readers": readers.drill, "cache": cache.drill, "runs": runs.drill, "hosts": hosts.drill}
FULL_MINUTES = 15.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Drills under faults.")
    parser.add_argument("--minutes", type=float, default=FULL_MINUTES)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", default=",".join(DRILLS), help="drills, separated by commas")
    arguments = parser.parse_args()
    names = [name for name in arguments.only.split(",") if name]
    if unknown := set(names) - set(DRILLS):
        parser.error(f"no drill {', '.join(sorted(unknown))}; there are {', '.join(DRILLS)}")
    if not 0 < arguments.minutes <= 24 * 60:
        parser.error(f"--minutes={arguments.minutes} must be above 0 and at most a day")
    print(f"soak: {', '.join(names)} for about {arguments.minutes:g} minutes, --seed={arguments.seed}", flush=True)
    failed = []
    for name in names:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"soak-{name}-", ignore_cleanup_errors=True) as folder:
            try:
                result = DRILLS[name](pathlib.Path(folder), arguments.minutes / FULL_MINUTES, arguments.seed)
            except Exception:
                traceback.print_exc()
                failed.append(name)
                result = "FAILED"
        print(f"soak: {name}: {result} ({time.monotonic() - started:.0f} s)", flush=True)
    print(f"soak: {', '.join(failed)} failed, --seed={arguments.seed}" if failed else "soak: all held", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
