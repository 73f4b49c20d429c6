"""Other systems' decoding on our weights. Each peer is a script in an environment of its own, with JSON in and out.

`make peers` makes the environments (`launch/peers/install.py`); the scripts are `launch/peers/peer_NAME.py`. A peer
that cannot run is reported with the reason, and never left out.
"""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from apr_jax.config import ConfigError

PEERS = ("hf", "tunix", "vllm", "llama_cpp")
MAX_REGRET = 0.05  # nats; see `judge`
Regret = Callable[[Sequence[int]], float]  # of tokens written after the first prompt

_ROOT = pathlib.Path(__file__).parents[2]
_REASON_LINES = 3
_GPU_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_PEERS_GPU_SHARE = "0.5"  # peer_vllm.py asks for as much
# What steers our own process must not steer a peer's: two CPU "devices", say, or our modules on its path.
_OURS = ("PYTHONPATH", "PYTHONHOME", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_PLATFORMS", "VIRTUAL_ENV")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """The work that every peer is given. The first L prompts are the batch of L lanes, decoded greedily.

    `model` is a folder written by `apr_jax.model.weights.hf.save_hf`. Each lane writes `new_tokens` tokens
    (at least 2: the first belongs to the prefill and is not timed). `seconds_limit` holds for one peer as a whole. A
    `quick` one has one pass at each lane count, in the peer's first mode alone.
    """

    model: str
    prompts: Sequence[Sequence[int]]
    lanes: Sequence[int]
    new_tokens: int
    precision: str
    threads: int
    seconds_limit: float
    quick: bool = False
    device: str = "cpu"  # or "gpu"


def leave_memory_to_peers() -> None:
    """Let this process take less than half of a GPU's memory, because peers need the rest while its weights are there.

    Call it before JAX starts; it does nothing to a CPU. A limit that the environment sets stays.
    """
    os.environ.setdefault(_GPU_SHARE, "0.4")


def run_peers(
    names: Sequence[str], workload: Workload, regret: Regret, root: pathlib.Path = _ROOT
) -> dict[str, dict[str, Any]]:
    """Run the named peers one after the other, and return what each reported by name.

    A report holds `name`, `version`, `method` (how decode was told from prefill) and, by lane count, `lanes[L]`:
    `tokens_per_second`, `ms_per_step`, `prefill_seconds`, `warm_up_seconds`, `mode` (the fastest one in `modes`) and
    `contention`: seconds of waiting for a core per second, 0 on a machine of its own. `greedy_tokens` is what each mode
    wrote for the first prompt, `regret` and `same_model` what `judge` says of it, and `error` the reason why it failed
    or was stopped; the lanes that it had measured before that stay.

    Raises:
        ConfigError: a name that is not a peer's.
    """
    for name in names:
        if name not in PEERS:
            raise ConfigError(f"--peers: there is no peer {name!r}; choose of {', '.join(PEERS)}")
    reports = {}
    for name in names:
        reason = why_not_installed(name, root, workload.device)
        report: dict[str, Any] = {"error": reason} if reason else _run(name, workload, root)
        if report.get("greedy_tokens"):
            report |= judge(report["greedy_tokens"], regret)
        reports[name] = report
    return reports


def judge(greedy_tokens: Mapping[str, Sequence[int]], regret: Regret) -> dict[str, Any]:
    """Return True where all modes of a peer compute our model, by what each wrote greedily after the first prompt.

    Two correct implementations part ways at the first near-tie of two logits, so equal texts cannot be asked for. The
    measure is the regret: how much less likely than the best tokens a peer's are, on average, by our float32 forward
    pass over the peer's own text. For `:laptop` it is 0 in float32, up to 0.002 in bfloat16, 2.1 with a wrong base of
    RoPE, and 3.7 for random tokens.

    Weights straight from `init_params` would prove little, because their text repeats its last token whatever attention
    does.
    """
    regrets = {mode: regret(tokens) for mode, tokens in greedy_tokens.items()}
    return {"regret": regrets, "same_model": all(0 <= value <= MAX_REGRET for value in regrets.values())}


def doubt(report: Mapping[str, Any]) -> str:
    """Describe what casts doubt on a peer's figures, or why there are none; empty where nothing does."""
    parts = []
    if report.get("same_model") is False:
        regrets = ", ".join(f"{mode} {value:.2g}" for mode, value in report["regret"].items())
        parts.append(f"another model: its tokens are less likely than the best of ours by (nats) {regrets}")
    if "error" in report:
        parts.append(str(report["error"]))
    return "; ".join(parts)


def summary(name: str, report: Mapping[str, Any]) -> str:
    """Write a line for people: tokens per second by lane count, and whatever casts doubt on them."""
    rates = [f"{row['tokens_per_second']:,.1f} at {lanes}" for lanes, row in report.get("lanes", {}).items()]
    parts = [f"{', '.join(rates)} lanes"] if rates else []
    return f"{name}: {'; '.join(filter(None, [*parts, doubt(report)]))}"


def peer_environment(threads: int) -> dict[str, str]:
    """Return the environment variables of a peer's process: ours, less what steers our own process."""
    environment = {key: value for key, value in os.environ.items() if key not in _OURS}
    steering = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return environment | steering | {_GPU_SHARE: _PEERS_GPU_SHARE}


def peer_python(name: str, root: pathlib.Path, device: str = "cpu") -> pathlib.Path:
    """Return the interpreter of a peer's own environment for a kind of device."""
    return root / ".venv-peers" / _environment(name, device) / "bin" / "python"


def why_not_installed(name: str, root: pathlib.Path, device: str = "cpu") -> str | None:
    """Report why a peer has no environment for a kind of device; None where it has one."""
    environment = _environment(name, device)
    failed = root / ".venv-peers" / f"{environment}.failed"
    if failed.exists():
        return f"not installed: {last_lines(failed.read_text(errors='replace'))}"
    if not (root / ".venv-peers" / environment / ".installed").exists():
        return f"not installed: run `make peers{' PLATFORM=cuda12' if device == 'gpu' else ''}`"
    return None


def _environment(name: str, device: str) -> str:
    """Return the name of the folder that `launch/peers/install.py` makes."""
    return name if device == "cpu" else f"{name}-{device}"


def _run(name: str, workload: Workload, root: pathlib.Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix=f"peer-{name}-") as folder:
        given, out, log = (pathlib.Path(folder) / part for part in ("workload.json", "report.json", "log.txt"))
        given.write_text(json.dumps(dataclasses.asdict(workload)))
        script = root / "launch" / "peers" / f"peer_{name}.py"
        python = peer_python(name, root, workload.device)
        command = [str(python), str(script), f"--workload={given}", f"--out={out}"]
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
    """Run a peer to its end, or end it and its children when its time is over. Returns what went wrong, or ""."""
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
    """End whatever is left of a peer, which leads a process group of its own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def last_lines(text: str) -> str:
    """Return the end of a peer's output, in one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-_REASON_LINES:])
