"""launch/export.py as a user runs it."""

import functools
import json

import pytest

from tests.launch.test_evaluate import evaluate, launched, make_home

pytestmark = pytest.mark.heavy

export = functools.partial(launched, "export.py")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    make_home(home)
    return home


@pytest.mark.parametrize(("out", "flags"), [("exported", []), ("exported.gguf", ["--format=gguf"])])
def test_a_run_is_exported_and_evaluates_alike(home, out, flags):
    if flags:
        pytest.importorskip("gguf")
    done, first = export(home, "--out=exported", *flags), {}
    assert done.stdout == f"{out}\n"
    for name in ("runs/tiny", out):
        evaluate(home, f"--checkpoint={name}", "--num_problems=4", f"--json={home / 'figures'}")
        figures = json.loads((home / "figures").read_text())
        assert figures["num_problems"] == 4
        assert figures["total_tokens"] == first.setdefault("tokens", figures["total_tokens"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out: name a folder to write"),
        (["--out=x", "--checkpoint=missing"], "no such folder"),
        (["--out=runs"], "there is something already"),
        (["--out=x.gguf", "--type=Q3"], "choose one of F32"),
        (["--out=x.gguf", "--format=hf"], "--format=hf writes a folder"),
        (["--out=x", "--type=F16"], "a Hugging Face folder holds F32"),
        (["--out=x.gguf", "--adapter"], "adapters go to a folder"),
        (["--out=x", "--adapter"], "there are no adapters"),
    ],
)
def test_what_is_wrong_is_one_sentence(home, arguments, message):
    done = export(home, *arguments, check=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
