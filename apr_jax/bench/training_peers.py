"""Other systems' training on our weights and batches, pass by pass, so that ours can run in between.

Each peer is a script of `launch/peers/` in an environment of its own (`make peers`), and stays up while it is
asked for passes; `launch/peers/train_protocol.py` is its side. A peer that cannot run is reported as such.
"""

import json
import os
import pathlib
import selectors
import subprocess
import tempfile
import time
from collections.abc import Mapping
from typing import Any, Self

from apr_jax.bench.peers import end_peer, last_lines, peer_environment, peer_python, why_not_installed

PEERS = {"hf": "peer_hf_train.py", "trl": "peer_trl.py"}  # a peer's environment has its name

_ROOT = pathlib.Path(__file__).parents[2]


class PeerError(Exception):
    """A peer cannot be measured. The message says why."""


class Peer:
    """A running peer. Use as a context manager.

    Raises PeerError where it is not installed or ends before it is asked for anything.
    """

    def __init__(
        self, name: str, workload: Mapping[str, Any], seconds_limit: float, root: pathlib.Path = _ROOT
    ) -> None:
        """Start the peer. `seconds_limit` holds for all passes together, loading and compiling included."""
        device = workload.get("device", "cpu")
        if reason := why_not_installed(name, root, device):
            raise PeerError(reason)
        self._folder = tempfile.TemporaryDirectory(prefix=f"peer-{name}-")
        folder = pathlib.Path(self._folder.name)
        (folder / "workload.json").write_text(json.dumps(dict(workload)))
        self._log = folder / "log.txt"
        self._left, self._name = seconds_limit, name
        command = [
            str(peer_python(name, root, device)),
            str(root / "launch" / "peers" / PEERS[name]),
            f"--workload={folder / 'workload.json'}",
        ]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=peer_environment(workload["threads"]),
                start_new_session=True,
            )
        try:
            about = self._answer()
        except PeerError:
            self.__exit__()
            raise
        self.version, self.method, self.modes = about["version"], about["method"], tuple(about["modes"])

    def run(self, mode: str) -> dict[str, Any]:
        """Run a pass: `seconds` and `losses` of its steps, `contention` (seconds without a core). Raises PeerError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{mode}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the answer says so
        answer = self._answer()
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        end_peer(self._process)
        self._folder.cleanup()

    def _answer(self) -> dict[str, Any]:
        """Return the next line that it writes."""
        assert self._process.stdout is not None
        start, line = time.perf_counter(), b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                left = self._left - (time.perf_counter() - start)
                if left <= 0 or not selector.select(left):
                    raise PeerError(f"{self._name} was stopped: its time was over")
                part = os.read(self._process.stdout.fileno(), 1 << 16)
                if not part:
                    lines = last_lines(self._log.read_text(errors="replace"))
                    raise PeerError(f"{self._name} ended: {lines}")
                line += part
        self._left -= time.perf_counter() - start
        return json.loads(line)
