"""A run that is killed, stopped, starved of disk and damaged at random moments ends as one that nobody touched.

Where a start is refused, its message must name a path in the run's folders. That file or folder is then moved away, as
messages advise, and the run is started again: nothing that is finished may be lost by it.
"""

import collections
import contextlib
import functools
import os
import pathlib
import random
import re
import shutil
import signal
import time

from tests.launch.processes import ROOT, assert_same_run
from tests.soak.processes import Run, assert_no_orphans, kill_all, marked

SECONDS = 480.0  # of 15 minutes
STARTS = 40  # of one run, at most
SMALL = """
from tests.train.small import small_config_dict
def get_config():
    config = small_config_dict({directory!r})
    config.data.update(num_train=256, num_workers=2)
    config.sft.checkpoint_every = config.grpo.checkpoint_every = 1
    return config
"""
# Python says this of a worker whose parent is killed before it has told the worker what to import.
UNBORN = re.compile(
    r'Traceback \(most recent call last\):\n  File "<string>", line 1, in <module>\n'
    r"(?:  .*\n)+?  .*reduction\.pickle\.load\(from_parent\)\n(?:  .*\n)*EOFError: Ran out of input\n"
)
DISTURBANCES = ("kill", "kill", "kill", "kill a worker", "terminate", "interrupt", "hang up", "pause", "disk full")


def drill(folder: pathlib.Path, share: float, seed: int) -> str:
    """Disturbs runs until the time is over, the last one to its end. Raises AssertionError where one ends otherwise."""
    rng, deadline = random.Random(seed), time.monotonic() + SECONDS * share
    whole, _ = _start(folder, "whole")
    started = time.monotonic()
    assert whole.wait() == 0, whole.text
    seconds = time.monotonic() - started
    counts: collections.Counter[str] = collections.Counter()
    while not counts["runs"] or time.monotonic() < deadline:
        name = f"run{counts['runs']}"
        seconds = min(seconds, _disturbed(folder, name, seconds, deadline, rng, counts))
        _assert_same(folder / "whole", folder / name)
        shutil.rmtree(folder / name)
        counts["runs"] += 1
    return ", ".join(f"{number} {name}" for name, number in counts.items())


def _start(folder: pathlib.Path, name: str, max_file_bytes: int | None = None) -> tuple[Run, pathlib.Path]:
    workdir, config = folder / name, folder / f"{name}.py"
    config.write_text(SMALL.format(directory=str(workdir / "data")))
    command = [str(ROOT / "launch" / "train.py"), f"--config={config}", f"--workdir={workdir}"]
    return Run(command, folder, f"{folder.name}-{name}", max_file_bytes), workdir


def _disturbed(
    folder: pathlib.Path,
    name: str,
    seconds: float,
    deadline: float,
    rng: random.Random,
    counts: collections.Counter[str],
) -> float:
    """Starts a run again and again, disturbed until the time is over, until its end. Returns the last start's seconds.

    Disturbances come within `seconds` of a start.
    """
    kept: dict[str, bytes] = {}
    for attempt in range(STARTS):
        started = time.monotonic()
        calm = time.monotonic() > deadline or attempt > STARTS // 2
        disturbance = None if calm else rng.choice(DISTURBANCES)
        limit = int(2 ** rng.uniform(11, 18)) if disturbance == "disk full" else None
        run, workdir = _start(folder, name, limit)
        if disturbance is None or limit is not None:
            code: int | None = run.wait()
        else:
            code = run.end_within(rng.uniform(0.0, seconds), functools.partial(_disturb, run, disturbance, rng))
            code = run.wait(120.0 if disturbance != "pause" else 600.0) if code is None else code
        assert_no_orphans(run.mark)
        counts[disturbance or "calm starts"] += 1
        print(f"soak: runs: {name}: {disturbance or 'undisturbed'}, exit {code}", flush=True)
        text = run.text if code != -signal.SIGKILL else UNBORN.sub("", run.text)
        assert "Traceback" not in text, text
        if code == 0:
            return max(5.0, time.monotonic() - started)
        if disturbance is None or code in (1, 2):
            _follow_advice(run, code, workdir, limit is not None, kept)
            counts["refusals"] += limit is None
        assert code in (1, 2, 75, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP), (code, text)
        if not calm and rng.random() < 0.7:
            kept = _damage(workdir, rng, counts)
    raise AssertionError(f"{name} did not come to its end in {STARTS} starts")


def _disturb(run: Run, disturbance: str, rng: random.Random) -> None:
    match disturbance:
        case "kill":
            run.process.kill()
        case "kill a worker":
            others = [pid for pid in marked(run.mark) if pid != run.process.pid]
            _send(rng.choice(others) if others else run.process.pid, signal.SIGKILL)
        case "pause":
            run.process.send_signal(signal.SIGSTOP)
            time.sleep(rng.uniform(0.1, 2.0))
            run.process.send_signal(signal.SIGCONT)
        case _:
            names = {"terminate": signal.SIGTERM, "interrupt": signal.SIGINT, "hang up": signal.SIGHUP}
            run.process.send_signal(names[disturbance])


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _damage(workdir: pathlib.Path, rng: random.Random, counts: collections.Counter[str]) -> dict[str, bytes]:
    """Flips a bit of a random file of the run, or cuts it, or empties it. Returns what the file was, by its path."""
    files = sorted(path for path in workdir.rglob("*") if path.is_file() and path.stat().st_size)
    if not files:
        return {}
    path = rng.choice(files)
    content = path.read_bytes()
    match rng.randrange(3):
        case 0:
            at = rng.randrange(len(content))
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :])
        case 1:
            path.write_bytes(content[: rng.randrange(len(content))])
        case 2:
            path.write_bytes(b"")
    counts["damaged files"] += 1
    print(f"soak: runs: damaged {path.relative_to(workdir)}", flush=True)
    return {str(path): content}


def _follow_advice(run: Run, code: int | None, workdir: pathlib.Path, full: bool, kept: dict[str, bytes]) -> None:
    """Moves away what the last line of a failed run names, or puts back a file that only its owner can mend."""
    last = run.text.strip().splitlines()[-1]
    assert code in (1, 2), f"exit {code}: {run.text}"
    told = str(workdir) in last or "same command" in last or (full and "start again" in last)
    assert told, f"the message says not what to do: {last}"
    if full or "same command" in last:
        return
    named = [
        pathlib.Path(match.rstrip(".,:;'\")")) for match in re.findall(rf"{re.escape(str(workdir))}[^\s,;'\"]*", last)
    ]
    existing = [path for path in named if path.exists() and path != workdir]
    assert existing, f"the message names nothing that is there: {last}"
    kill_all(run.mark)
    for path in existing:
        if str(path) in kept and "config.json" in path.name:
            path.write_bytes(kept[str(path)])
        else:
            path.rename(workdir.parent / f"away-{time.monotonic_ns()}")
    print(f"soak: runs: {last}", flush=True)


def _assert_same(whole: pathlib.Path, ours: pathlib.Path) -> None:
    assert_same_run(ours, whole)
    leftovers = [path for path in ours.rglob("*incomplete*")] + [path for path in ours.rglob("*.tmp*")]
    assert not leftovers, f"left over: {leftovers}"
