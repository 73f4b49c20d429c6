"""launch/peers/install.py with pip and venv replaced: what is made, recorded and left alone."""

import importlib.util
import pathlib
from typing import Any

import pytest

SOURCE = pathlib.Path(__file__).parents[2] / "launch" / "peers" / "install.py"


@pytest.fixture
def installer(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, over two peers of which `bad` cannot be installed; `installer.calls` lists pip's arguments."""
    spec = importlib.util.spec_from_file_location("install_peers", SOURCE)
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    here = tmp_path / "launch" / "peers"
    here.mkdir(parents=True)
    (here / "requirements-bad.txt").write_text("nothing==1\n")
    (here / "requirements-good.txt").write_text("torch==2.13.0+cpu\nother==1\n")
    module.calls = []

    def pip(folder: pathlib.Path, *arguments: str) -> str:
        module.calls.append((folder.name, *arguments))
        return "Collecting\nERROR: no such thing\n" if folder.name == "bad" else ""

    monkeypatch.setattr(module, "HERE", here)
    monkeypatch.setattr(module, "ENVIRONMENTS", tmp_path / ".venv-peers")
    monkeypatch.setattr(module, "_pip", pip)
    monkeypatch.setattr(module.venv, "create", lambda folder, **_: folder.mkdir(parents=True, exist_ok=True))
    return module


def test_a_failure_is_recorded_and_the_next_peer_is_tried(installer: Any, capsys: pytest.CaptureFixture[str]):
    installer.main([])
    environments = installer.ENVIRONMENTS
    assert (environments / "bad.failed").read_text() == "Collecting\nERROR: no such thing\n"
    assert not (environments / "bad" / ".installed").exists()
    assert (environments / "good" / ".installed").exists()
    assert not (environments / "good.failed").exists()
    assert "bad: not installed: ERROR: no such thing" in capsys.readouterr().out


def test_what_is_up_to_date_stays_and_what_changed_is_made_anew(installer: Any):
    installer.main(["good"])
    count = len(installer.calls)
    installer.main(["good"])
    assert len(installer.calls) == count
    (installer.HERE / "requirements-good.txt").write_text("other==2\n")
    installer.main(["good"])
    assert len(installer.calls) > count


def test_a_failure_is_forgotten_once_it_installs(installer: Any, monkeypatch: pytest.MonkeyPatch):
    installer.main(["bad"])
    monkeypatch.setattr(installer, "_pip", lambda *_: "")
    installer.main(["bad"])
    assert not (installer.ENVIRONMENTS / "bad.failed").exists()
    assert (installer.ENVIRONMENTS / "bad" / ".installed").exists()


def test_torch_comes_first_and_without_cuda(installer: Any, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def pip(folder: pathlib.Path, *arguments: str) -> str:
        asked.append(arguments)
        return "" if {"--index-url", "--requirement"} & set(arguments) else "ERROR: no build without CUDA here"

    monkeypatch.setattr(installer, "_pip", pip)
    assert installer.install("good") == ""
    assert [arguments[-1] for arguments in asked[:2]] == ["torch==2.13.0+cpu"] * 2
    assert "--requirement" in asked[2]


def test_unknown_names_are_refused(installer: Any):
    with pytest.raises(SystemExit, match="no peer 'sglang'; choose of bad, good"):
        installer.main(["sglang"])
    with pytest.raises(SystemExit, match="--platform=tpu: peers are built for CPUs"):
        installer.main(["--platform=tpu", "good"])


def test_builds_for_gpus_are_resolved_and_lie_beside_those_for_cpus(installer: Any):
    installer.main(["good"])
    installer.main(["--platform=cuda12", "good"])
    environments = installer.ENVIRONMENTS
    assert (environments / "good" / ".installed").exists()
    assert (environments / "good-gpu" / ".installed").exists()
    assert ("good-gpu", "torch==2.13.0") in installer.calls
    assert (environments / "good-gpu" / "requirements.txt").read_text() == "other==1\n"
    lines = {
        name: [line for line in (SOURCE.parent / f"requirements-{name}.txt").read_text().splitlines() if "==" in line]
        for name in ("hf", "tunix", "vllm", "llama_cpp", "trl")
    }
    builds = {name: installer.gpu_builds(each, "cuda13") for name, each in lines.items()}
    assert builds["hf"][0] == builds["trl"][0] == ["torch==2.13.0"]
    assert builds["tunix"][0] == ["jax[cuda13]==0.10.2"]
    assert builds["vllm"] == (["vllm==0.32.0"], [])
    assert any("-DGGML_CUDA=on;-DLLAVA_BUILD=OFF" in line for line in builds["llama_cpp"][1])
    assert not any("+cpu" in line for _, rest in builds.values() for line in rest)
