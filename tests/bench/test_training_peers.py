"""Peers in turns with ours: the protocol's two sides, and what a peer that fails leaves."""

import pathlib
import shutil
import sys

import pytest

from apr_jax.bench.training import compare, take_turns
from apr_jax.bench.training_peers import Peer, PeerError

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = """
import train_protocol

def modes(workload):
    def failing():
        raise MemoryError("no room")
    def ended():
        raise SystemExit(3)
    print("noise on stdout")
    return {"good": lambda: lambda: ([0.5, 1.5], workload["losses"]), "bad": failing, "ended": lambda: ended}

train_protocol.main("fake 1", "a step", modes)
"""


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    """A checkout whose peer "hf" is the script above."""
    (tmp_path / ".venv-peers" / "hf" / "bin").mkdir(parents=True)
    (tmp_path / ".venv-peers" / "hf" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / ".venv-peers" / "hf" / ".installed").touch()
    (tmp_path / "launch" / "peers").mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "peers" / "train_protocol.py", tmp_path / "launch" / "peers")
    (tmp_path / "launch" / "peers" / "peer_hf_train.py").write_text(SCRIPT)
    return tmp_path


WORKLOAD = {"threads": 1, "losses": [2.0, 1.0]}


def test_passes_are_run_one_by_one_and_a_failing_mode_leaves_the_others(root: pathlib.Path):
    with Peer("hf", WORKLOAD, 30, root) as peer:
        assert (peer.version, peer.method, peer.modes) == ("fake 1", "a step", ("good", "bad", "ended"))
        assert peer.run("good")["losses"] == [2.0, 1.0]
        with pytest.raises(PeerError, match="MemoryError: no room"):
            peer.run("bad")
        assert peer.run("good")["seconds"] == [0.5, 1.5]
        with pytest.raises(PeerError, match="hf ended"):
            peer.run("ended")
        with pytest.raises(PeerError, match="hf ended"):
            peer.run("good")


def test_a_peer_has_its_time(root: pathlib.Path):
    with pytest.raises(PeerError, match="its time was over"):
        Peer("hf", WORKLOAD, 0.0, root)


def test_a_peer_that_is_not_installed_says_so(tmp_path: pathlib.Path):
    with pytest.raises(PeerError, match="not installed: run `make peers`"):
        Peer("trl", WORKLOAD, 30, tmp_path)


def test_turns_are_compared_by_ratio_and_the_first_is_not_counted():
    ours, theirs = iter([9.0, 1.0, 2.0, 4.0]), iter([9.0, 3.0, 4.0, 16.0])

    def failing():
        raise PeerError("out of memory")

    contestants = {
        "ours": lambda: {"seconds": [next(ours)]},
        "theirs": lambda: {"seconds": [next(theirs)]},
        "failing": failing,
    }
    rows = compare(take_turns(contestants, 3, lambda text: None), ["ours"], tokens=10.0)
    assert rows["ours"]["seconds"] == [1.0, 2.0, 4.0]
    assert rows["ours"]["tokens_per_second"] == 5.0
    assert rows["theirs"]["over"] == {"ours": [3.0, 2.0, 4.0]}
    assert rows["failing"] == {"seconds": [], "error": "out of memory"}
