"""Reproduce the paper's claims on its own problems: train all policies, compare them, and write the table of claims.

    python launch/reproduce.py                       # everything, in the order of --list; tens of hours on two cores
    python launch/reproduce.py --list                # the parts: which are done, how long each has run, its command
    python launch/reproduce.py --only=facts,adaptive # these parts alone
    python launch/reproduce.py --words=gpu --workdir=runs/gpu  # the variants for an accelerator: a larger model
    python launch/reproduce.py --quick --workdir=/tmp/quick  # all of it, so small that it learns nothing

A part is a command line of another program of launch/ and can be stopped at any moment, by Ctrl-C or a kill: the same
command goes on from there. WORKDIR/claims.md is written after each part.

Exit codes: 0 done, 1 a part failed, 2 bad arguments or config, 75 stopped by a signal with everything saved.
"""

import dataclasses
import pathlib
import shlex
import signal
import subprocess
import sys
import time

from absl import flags

from apr_jax import entry
from apr_jax.config import ConfigError
from apr_jax.files import write
from apr_jax.lock import locked
from apr_jax.paths import path_of
from apr_jax.reproduce.claims import Claim, claims, table
from apr_jax.reproduce.parts import Part, Record, choose, make_parts

_ROOT = pathlib.Path(__file__).parents[1]
_WORKDIR = flags.DEFINE_string("workdir", "runs/reproduce", "Folder of everything that is made.")
_CONFIG = flags.DEFINE_string("config", "configs/countdown4.py", "File of settings, whose variants are the parts.")
_ONLY = flags.DEFINE_list("only", [], "Parts to run [all that are not done].")
_WORDS = flags.DEFINE_string("words", "", "Words that all variants take, with dots between: gpu.")
_LIST = flags.DEFINE_bool("list", False, "Show the parts and run none.")
_QUICK = flags.DEFINE_bool("quick", False, "Run everything in minutes, learning nothing.")
_JSON = entry.JsonFlag("the claims")


def main() -> int:
    workdir = path_of(_WORKDIR.value)
    parts = make_parts(workdir, _CONFIG.value, _WORDS.value, quick=_QUICK.value)
    chosen = choose(parts, _ONLY.value)
    record = Record(workdir)
    if _LIST.value:
        _show(parts, record)
        return 0
    with locked(workdir / "lock", "wait for it, or choose another --workdir"):
        return _make(workdir, parts, chosen, record)


def _make(workdir: pathlib.Path, parts: list[Part], chosen: list[Part], record: Record) -> int:
    named = {part.name: part for part in parts}
    found: list[Claim] | None = None
    for part in chosen:
        if record.is_done(part):
            continue
        if missing := record.missing(part, named):
            raise ConfigError(f"--only: {part.name} needs {', '.join(missing)}, not done yet; run them first")
        print(f"{part.name}: {part.what}\n  python {shlex.join(part.command)}", flush=True)
        code = _run(part, record)
        if code == entry.STOPPED:
            return entry.STOPPED
        if code:
            raise entry.FailedError(f"{part.name} ended with exit code {code}: what it said stands above")
        found = _write_claims(workdir)
    if found is None:
        found = _write_claims(workdir)
    print(table(found), end="", flush=True)
    _JSON.write({"claims": [dataclasses.asdict(claim) for claim in found]})
    return 0


def _run(part: Part, record: Record) -> int:
    """Run a part to its end, hand signals on to it, and return its exit code."""
    started = time.monotonic()
    command = [sys.executable, *map(_in_checkout, part.command)]
    process = subprocess.Popen(command, stdout=sys.stdout, process_group=0)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _: process.send_signal(number)) for number in numbers}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        record.add(part, time.monotonic() - started, done=process.returncode == 0)
    return code if code >= 0 else 128 - code


def _in_checkout(word: str) -> str:
    """Return a word of a command line with the whole paths of what lies in this checkout."""
    flag, equals, path = word.rpartition("=")
    return f"{flag}{equals}{_ROOT / path}" if path.startswith(("launch/", "configs/")) else word


def _write_claims(workdir: pathlib.Path) -> list[Claim]:
    found = claims(workdir)
    write(workdir / "claims.md", table(found).encode())
    return found


def _show(parts: list[Part], record: Record) -> None:
    for part in parts:
        state = "done" if record.is_done(part) else "    "
        print(f"{state}  {part.name:20} {record.seconds(part) / 3600:6.2f} h  {part.what}")
        print(f"      python {shlex.join(part.command)}")


if __name__ == "__main__":
    entry.run(main)
