"""The runner of peers, with a fake peer: a script that speaks through the real launch/peers/protocol.py."""

import dataclasses
import json
import math
import pathlib
import sys
import time
from collections.abc import Sequence

import pytest

from apr_jax.bench import peers
from apr_jax.bench.peers import Workload, run_peers
from apr_jax.config import ConfigError

PEERS_FOLDER = pathlib.Path(__file__).parents[2] / "launch" / "peers"
PROMPTS = [[3, 5], [7, 1], [2, 2]]
WORKLOAD = Workload(
    model="folder", prompts=PROMPTS, lanes=(1, 3), new_tokens=4, precision="float32", threads=1, seconds_limit=60.0
)
EXPECTED = [8, 9, 10, 11]  # what FAKE writes for [3, 5]

# Lane l's tokens follow the sum of its prompt; a step takes 2 ms "slow" and 1 ms "fast", whatever the lane count.
FAKE = """
import protocol

def decoder(seconds):
    def decode(prompts):
        tokens = [[sum(prompt) + step for step in range({new_tokens})] for prompt in prompts]
        return protocol.Pass(prefill_seconds=0.25, decode_seconds=3 * seconds, steps=3, tokens=tokens)
    return decode

def modes(workload):
    return {{"slow": lambda: decoder(0.002), "fast": lambda: decoder(0.001)}}

if __name__ == "__main__":
    {before}
    protocol.main("hf", "fake 1", "it is told", modes)
    {after}
"""


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    """A repository with one installed peer, hf; `write` gives it its script."""
    binaries = tmp_path / ".venv-peers" / "hf" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").symlink_to(sys.executable)
    (binaries.parent / ".installed").write_text("")
    (tmp_path / "launch" / "peers").mkdir(parents=True)
    (tmp_path / "launch" / "peers" / "protocol.py").symlink_to(PEERS_FOLDER / "protocol.py")
    write(tmp_path)
    return tmp_path


def regret(tokens: Sequence[int]) -> float:
    """As if our model were sure of EXPECTED."""
    return float(sum(token != wanted for token, wanted in zip(tokens, EXPECTED, strict=True)))


def write(root: pathlib.Path, *, before: str = "pass", after: str = "pass", new_tokens: int = 4) -> None:
    script = FAKE.format(before=before, after=after, new_tokens=new_tokens)
    (root / "launch" / "peers" / "peer_hf.py").write_text(script)


def test_report_of_a_peer(root: pathlib.Path):
    report = run_peers(["hf"], WORKLOAD, regret, root)["hf"]
    assert "error" not in report
    assert (report["name"], report["version"], report["method"]) == ("hf", "fake 1", "it is told")
    assert report["greedy_tokens"] == {"slow": EXPECTED, "fast": EXPECTED}
    assert (report["regret"], report["same_model"]) == ({"slow": 0.0, "fast": 0.0}, True)
    for lanes in (1, 3):
        row = report["lanes"][str(lanes)]
        assert row["mode"] == "fast"
        assert row["tokens_per_second"] == pytest.approx(lanes * 1000)
        assert row["ms_per_step"] == pytest.approx(1.0)
        assert row["prefill_seconds"] == 0.25
        assert row["contention"] >= 0.0
    assert peers.summary("hf", report) == "hf: 1,000.0 at 1, 3,000.0 at 3 lanes"


def test_a_peer_sees_neither_our_modules_nor_our_flags(root: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    monkeypatch.setenv("PYTHONPATH", str(root))
    write(root, before="import os; assert not {'XLA_FLAGS', 'PYTHONPATH'} & set(os.environ)")
    assert "error" not in run_peers(["hf"], WORKLOAD, regret, root)["hf"]


def test_unknown_peers_are_refused_before_anything_runs(root: pathlib.Path):
    with pytest.raises(ConfigError, match="no peer 'sglang'; choose of hf, tunix, vllm, llama_cpp"):
        run_peers(["hf", "sglang"], WORKLOAD, regret, root)


def test_peers_that_are_not_installed_say_why(root: pathlib.Path):
    (root / ".venv-peers" / "vllm.failed").write_text("Collecting torch\n\nERROR: No matching distribution\n")
    (root / ".venv-peers" / "llama_cpp" / "bin").mkdir(parents=True)  # an installation that was interrupted
    reports = run_peers(["vllm", "tunix", "llama_cpp", "hf"], WORKLOAD, regret, root)
    assert list(reports) == ["vllm", "tunix", "llama_cpp", "hf"]
    assert reports["vllm"] == {"error": "not installed: Collecting torch | ERROR: No matching distribution"}
    assert reports["tunix"] == reports["llama_cpp"] == {"error": "not installed: run `make peers`"}
    assert reports["hf"]["same_model"]
    assert peers.summary("tunix", reports["tunix"]) == "tunix: not installed: run `make peers`"


def test_a_crash_is_reported_with_its_last_lines(root: pathlib.Path):
    write(root, before="raise RuntimeError('no such weights')")
    report = run_peers(["hf"], WORKLOAD, regret, root)["hf"]
    assert report["error"].startswith("exit code 1: ")
    assert report["error"].endswith("RuntimeError: no such weights")
    assert "lanes" not in report


def test_a_crash_at_the_end_keeps_what_was_measured(root: pathlib.Path):
    write(root, after="raise RuntimeError('late')")
    report = run_peers(["hf"], WORKLOAD, regret, root)["hf"]
    assert report["error"].startswith("exit code 1: ")
    assert report["lanes"]["3"]["tokens_per_second"] == pytest.approx(3000)
    assert report["same_model"]


def test_a_peer_over_its_time_is_ended_with_its_children(root: pathlib.Path):
    child = root / "child"
    spawn = f"import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, file=open({str(child)!r}, 'w'))"
    write(root, after=f"{spawn}; time.sleep(600)")
    report = run_peers(["hf"], dataclasses.replace(WORKLOAD, seconds_limit=3.0), regret, root)["hf"]
    assert report["error"].startswith("stopped after 3 s")
    assert set(report["lanes"]) == {"1", "3"}  # it had measured, then hung
    state = pathlib.Path(f"/proc/{child.read_text().strip()}/status")
    for _ in range(300):  # the signal is sent; on a busy machine its effect may take a while
        if not state.exists() or "Z (zombie)" in state.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"a child of the peer lives on:\n{state.read_text()}")


def test_another_model_is_called_so(root: pathlib.Path):
    report = run_peers(["hf"], WORKLOAD, lambda tokens: 2.5, root)["hf"]
    assert (report["regret"], report["same_model"]) == ({"slow": 2.5, "fast": 2.5}, False)
    assert "another model: its tokens are less likely than the best of ours by (nats) slow 2.5" in peers.summary(
        "hf", report
    )


@pytest.mark.parametrize(("values", "same"), [((0.0, 0.04), True), ((0.0, 0.06), False), ((math.nan, 0.0), False)])
def test_every_mode_is_judged(values: tuple[float, float], same: bool):
    judged = peers.judge({"a": [0], "b": [1]}, lambda tokens: values[tokens[0]])
    assert judged["same_model"] is same


def test_a_peer_that_writes_too_few_tokens_is_not_timed(root: pathlib.Path):
    write(root, new_tokens=3)
    report = run_peers(["hf"], WORKLOAD, regret, root)["hf"]
    assert report["error"] == "exit code 1: lanes wrote [3] tokens instead of 4"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "float16"}, "precision 'float16': the peers are run in float32 or bfloat16"),
        ({"new_tokens": 1}, "two new tokens"),
        ({"lanes": (4,)}, "prompt for every lane"),
    ],
)
def test_a_workload_that_cannot_be_run_is_refused(root: pathlib.Path, change: dict[str, object], message: str):
    report = run_peers(["hf"], dataclasses.replace(WORKLOAD, **change), regret, root)["hf"]
    assert report["error"].startswith("exit code 1: ")
    assert message in report["error"]


def test_no_report_and_a_broken_one_are_failures(root: pathlib.Path):
    script = root / "launch" / "peers" / "peer_hf.py"
    script.write_text("")
    assert run_peers(["hf"], WORKLOAD, regret, root)["hf"] == {"error": "it wrote no report"}
    script.write_text("import sys; open(sys.argv[2].removeprefix('--out='), 'w').write('{')")
    assert "its report is no JSON" in run_peers(["hf"], WORKLOAD, regret, root)["hf"]["error"]


@pytest.mark.parametrize("name", peers.PEERS)
def test_every_peer_has_its_script_and_pins(name: str):
    assert "protocol.main(" in (PEERS_FOLDER / f"peer_{name}.py").read_text()
    lines = (PEERS_FOLDER / f"requirements-{name}.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins
    assert all("==" in pin for pin in pins)


def test_workload_is_what_the_scripts_read():
    """The two definitions, on either side of the JSON, name the same fields."""
    text = (PEERS_FOLDER / "protocol.py").read_text()
    body = text.split("class Workload")[1].split("@dataclasses")[0]
    for field in dataclasses.fields(Workload):
        assert f"    {field.name}: " in body
    assert json.loads(json.dumps(dataclasses.asdict(WORKLOAD)))["prompts"] == PROMPTS
