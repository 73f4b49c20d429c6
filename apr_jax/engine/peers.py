"""Runs other systems' decoding on our weights: each peer is a script in an environment of its own, JSON in and out.

`make peers` makes the environments (`launch/peers/install.py`); the scripts are `launch/peers/peer_NAME.py`. A peer
that cannot run is reported as such, with the reason; it is never left out.
"""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from apr_jax.config import ConfigError

PEERS = ("hf", "tunix", "vllm", "llama_cpp")
MIN_EQUAL_TOKENS = 8  # see `compare`

_ROOT = pathlib.Path(__file__).parents[2]
_REASON_LINES = 3
# What steers our own process must not steer a peer's: two CPU "devices", say, or our modules on its path.
_OURS = ("PYTHONPATH", "PYTHONHOME", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_PLATFORMS", "VIRTUAL_ENV")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What every peer is given. The first L prompts are the batch of L lanes, decoded greedily.

    `model` is a folder written by `apr_jax.model.hf.save_hf`. Each lane writes `new_tokens` tokens (at least 2: the
    first belongs to the prefill and is not timed). `seconds_limit` holds for one peer as a whole.
    """

    model: str
    prompts: Sequence[Sequence[int]]
    lanes: Sequence[int]
    new_tokens: int
    precision: str
    threads: int
    seconds_limit: float


def run_peers(
    names: Sequence[str], workload: Workload, expected_tokens: Sequence[int], root: pathlib.Path = _ROOT
) -> dict[str, dict[str, Any]]:
    """Runs each named peer, one after the other; what each reported, by name, in the order given.

    A report holds `name`, `version`, `method` (how decode was told from prefill) and, by lane count, `lanes[L]`:
    `tokens_per_second`, `ms_per_step`, `prefill_seconds`, `warm_up_seconds`, `mode` (the fastest one in `modes`) and
    `contention`: seconds of waiting for a core per second, 0 on a machine of its own. `greedy_tokens` is what it wrote
    for the first prompt, `equal_tokens` and `same_model` its comparison with `expected_tokens`, ours (`compare`), and
    `error` the reason why it failed or was stopped; the lanes that it had measured before that stay.

    Raises:
        ConfigError: a name that is not a peer's.
    """
    for name in names:
        if name not in PEERS:
            raise ConfigError(f"--peers: there is no peer {name!r}; choose of {', '.join(PEERS)}")
    reports = {}
    for name in names:
        reason = why_not_installed(name, root)
        report: dict[str, Any] = {"error": reason} if reason else _run(name, workload, root)
        if report.get("greedy_tokens") is not None:
            report |= compare(report["greedy_tokens"], expected_tokens)
        reports[name] = report
    return reports


def compare(tokens: Sequence[int], expected: Sequence[int]) -> dict[str, Any]:
    """How far a peer's greedy tokens are ours, and whether that is far enough to call it the same model.

    Two correct implementations part ways at the first near-tie of two logits, and never meet again after it, so that
    equality cannot be asked for all the way. Equal first MIN_EQUAL_TOKENS tokens (or all, if there are fewer) are:
    a tie within float32's error comes about once in thousands of tokens.

    Weights straight from `init_params` prove little: the text repeats its last token, whatever attention does. With the
    matrices of the blocks times 4 every token differs, and a wrong base of RoPE shows at the first one.
    """
    equal = 0
    for token, wanted in zip(tokens, expected, strict=False):
        if token != wanted:
            break
        equal += 1
    wanted_equal = min(MIN_EQUAL_TOKENS, len(expected))
    return {"equal_tokens": equal, "same_model": wanted_equal > 0 and equal >= wanted_equal}


def summary(name: str, report: Mapping[str, Any]) -> str:
    """One line for people: tokens per second by lane count, and whatever casts doubt on them."""
    rates = [f"{row['tokens_per_second']:,.1f} at {lanes}" for lanes, row in report.get("lanes", {}).items()]
    parts = [f"{', '.join(rates)} lanes"] if rates else []
    if report.get("same_model") is False:
        parts.append(f"ANOTHER MODEL: only the first {report['equal_tokens']} greedy tokens are ours")
    if "error" in report:
        parts.append(report["error"])
    return f"{name}: {'; '.join(parts)}"


def peer_environment(threads: int) -> dict[str, str]:
    """The environment variables of a peer's process: ours, less what steers our own process."""
    environment = {key: value for key, value in os.environ.items() if key not in _OURS}
    return environment | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def peer_python(name: str, root: pathlib.Path) -> pathlib.Path:
    """The interpreter of a peer's own environment."""
    return root / ".venv-peers" / name / "bin" / "python"


def why_not_installed(name: str, root: pathlib.Path) -> str | None:
    """Why a peer has no environment, or None where it has one."""
    failed = root / ".venv-peers" / f"{name}.failed"
    if failed.exists():
        return f"not installed: {last_lines(failed.read_text(errors='replace'))}"
    if not (root / ".venv-peers" / name / ".installed").exists():
        return "not installed: run `make peers`"
    return None


def _run(name: str, workload: Workload, root: pathlib.Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix=f"peer-{name}-") as folder:
        given, out, log = (pathlib.Path(folder) / part for part in ("workload.json", "report.json", "log.txt"))
        given.write_text(json.dumps(dataclasses.asdict(workload)))
        script = root / "launch" / "peers" / f"peer_{name}.py"
        command = [str(peer_python(name, root)), str(script), f"--workload={given}", f"--out={out}"]
        with log.open("w") as stream:
            reason = _call(command, stream, workload)
        if reason == "" and not out.exists():
            reason = "it wrote no report"
        try:
            report = json.loads(out.read_text()) if out.exists() else {}
        except ValueError as error:
            report, reason = {}, f"its report is no JSON: {error}"
        if reason:
            lines = last_lines(log.read_text(errors="replace"))
            report["error"] = f"{reason}: {lines}" if lines else reason
        return report


def _call(command: Sequence[str], stream: Any, workload: Workload) -> str:
    """Runs a peer to its end, or ends it and its children when its time is over. Returns what went wrong, or ""."""
    environment = peer_environment(workload.threads)
    process = subprocess.Popen(
        command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    try:
        code = process.wait(timeout=workload.seconds_limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {workload.seconds_limit:g} s"
    finally:
        end_peer(process)
    return "" if code == 0 else f"exit code {code}"


def end_peer(process: subprocess.Popen[bytes]) -> None:
    """Ends whatever is left of a peer: it leads a process group of its own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def last_lines(text: str) -> str:
    """The end of a peer's output, in one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-_REASON_LINES:])
