"""Two hosts, one of which stops answering and is gone: all end, and the run goes on to the same metrics."""

import contextlib
import json
import os
import pathlib
import random
import re
import signal
import sys
import time

from tests.launch.processes import ROOT
from tests.soak.processes import LONGEST, Run, assert_no_orphans, kill_all, marked

TIMES = 4  # in 15 minutes, at least once
STEPS = 12  # of SFT and GRPO
ENDS_WITHIN = 180.0  # seconds after a host is gone
SMALL = """
from tests.train.small import small_config_dict
def get_config():
    config = small_config_dict({directory!r})
    config.mesh.data = 2
    config.rollout.update(max_steps=64, temperature=1.0)
    config.grpo.update(num_steps=6, checkpoint_every=1)
    config.grpo.reward.update(token_price=0.01, failures_pay=True)
    config.evaluation.update(num_problems=2)
    return config
"""


def drill(folder: pathlib.Path, share: float, seed: int) -> str:
    """Loses a host at a random moment, some times over. Raises AssertionError where a run hangs or ends otherwise."""
    rng, times = random.Random(seed), max(1, round(TIMES * share))
    whole = _start(folder, "whole")
    assert whole.wait() == 0, whole.text
    print("soak: hosts: an undisturbed job is done", flush=True)
    lost = 0
    for turn in range(times):
        name = f"job{turn}"
        for step in sorted(rng.sample(range(1, STEPS), 2)):
            lost += _lose_one(_start(folder, name), folder / name / "metrics.jsonl", step, rng)
        last = _start(folder, name)
        assert last.wait() == 0, last.text
        assert_no_orphans(last.mark)
        _assert_same(folder / "whole", folder / name)
    assert lost > 0, "every job ended before a host was lost"
    return f"{times} jobs of two hosts, {lost} hosts stopped and gone, the same metrics"


def _start(folder: pathlib.Path, name: str) -> Run:
    config = folder / "small.py"
    config.write_text(SMALL.format(directory=str(folder / "data")))
    train = [str(ROOT / "launch" / "train.py"), f"--config={config}", f"--workdir={folder / name}"]
    launcher = [str(ROOT / "launch" / "local_hosts.py"), "--hosts=2", "--devices-per-host=1", "--", sys.executable]
    return Run([*launcher, *train], folder, f"{folder.name}-{name}")


def _lose_one(run: Run, metrics: pathlib.Path, step: int, rng: random.Random) -> int:
    """Stops a host once the job has written so many steps, for a while, then kills it. Returns 1 if it was there."""
    deadline = time.monotonic() + LONGEST
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < step:
        assert run.process.poll() is None, run.text
        assert time.monotonic() < deadline, f"no step {step}:\n{run.text}"
        time.sleep(0.01)
    time.sleep(rng.uniform(0.0, 0.5))
    host = rng.randrange(2)
    pids = [pid for pid in marked(run.mark) if _is_host(pid, host)]
    for number, pause in ((signal.SIGSTOP, rng.uniform(1.0, 5.0)), (signal.SIGKILL, 0.0)):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(pause)
    print(f"soak: hosts: host {host} is gone after {step} steps", flush=True)
    code, text = run.wait(ENDS_WITHIN), run.text
    if code == 0:  # the job was done at that moment
        return 0
    assert re.search(r"host \d was killed by SIGKILL", text), text
    assert not re.search(r"\*\*\* Check failure|Fatal Python error|@ +0x", text), f"a stack of C++ frames:\n{text}"
    assert_no_orphans(run.mark)
    kill_all(run.mark)
    return 1


def _is_host(pid: int, host: int) -> bool:
    try:
        environment = pathlib.Path(f"/proc/{pid}/environ").read_bytes()
        return f"APR_HOST={host}\0".encode() in environment
    except OSError:
        return False


def _assert_same(whole: pathlib.Path, ours: pathlib.Path) -> None:
    records = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (whole, ours)]
    assert [(r["phase"], r["step"]) for r in records[0]] == [(r["phase"], r["step"]) for r in records[1]]
    for one, other in zip(*records, strict=True):
        for field, value in one.items():
            same = abs(value - other[field]) <= 1e-5 * max(1.0, abs(value)) if isinstance(value, float) else None
            assert same if same is not None else value == other[field], f"{one['phase']} {one['step']}: {field}"
