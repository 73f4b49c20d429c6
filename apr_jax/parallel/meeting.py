"""The meeting of a job's hosts before JAX starts: all are here, and want the same. Later, who is lost ends the others.

Host 0 listens at the job's address. Each other host connects, and sends its number and a record of all that must be the
same. When everybody is here, host 0 compares the records and answers. The connections stay open, so that a host which
dies is noticed at once, and one that is silent (a message a second says "still here") after a while.

A message is a JSON object on a line: {"host", "hosts", "record"}, then {"waiting"}, {"refused"} or {"welcome"}, then {}
every second, {"done"} before a good end, and {"lost", "code"} before another.
"""

import contextlib
import dataclasses
import errno
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from apr_jax.config import ConfigError
from apr_jax.stopping import StoppedError

_SAY_SECONDS = 10.0
_RETRY_SECONDS = 0.5
_LINE_SECONDS = 5.0  # in which who connects must have said who it is
_LONGEST_LINE = 1 << 20
_LAST_WORDS_SECONDS = 1.0  # in which a host may say itself why it fails, before another's failure ends it
_NAMED_FIELDS = 5
_LOST = 1  # exit codes (`entry`)
_CODES = {ConfigError: 2, StoppedError: 75}


@dataclasses.dataclass(frozen=True)
class Place:
    """A host's place in its job."""

    host: int
    count: int
    address: str  # HOST:PORT, where host 0 listens

    @property
    def endpoint(self) -> tuple[str, int]:
        """The address for a socket."""
        name, _, port = self.address.rpartition(":")
        return name.strip("[]"), int(port)

    def bind_address(self) -> str:
        """Return the address that host 0 listens at: the job's own, unless it leads here through another machine."""
        try:
            with _listen(self.endpoint):
                return self.address
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise OSError(f"host 0 cannot listen at {self.address}: {error.strerror}") from error
            return f"[::]:{self.endpoint[1]}"


def differences(records: Mapping[int, Mapping[str, Any]]) -> str | None:
    """Name the fields in which hosts' records differ, with all values; None: they are the same."""
    flat = {host: _flat(record) for host, record in records.items()}
    names = sorted({name for record in flat.values() for name in record})
    differing = [name for name in names if len({record.get(name, "absent") for record in flat.values()}) > 1]
    if not differing:
        return None
    more = f"; and {len(differing) - _NAMED_FIELDS} more" if len(differing) > _NAMED_FIELDS else ""
    return (
        f"the hosts of this job differ: {'; '.join(_values(name, flat) for name in differing[:_NAMED_FIELDS])}{more}. "
        "Start all with the same command, files and versions"
    )


def meet(place: Place, record: Mapping[str, Any], seconds: float, bind: str | None) -> "Company":
    """Wait until all hosts of the job are here, saying now and then for whom, and compare their records.

    Args:
      seconds: wait no longer.
      bind: where host 0 listens (`Place.bind_address`); None on the others.
    Raises:
      ConfigError: the hosts differ; on all of them, with the same words.
      TimeoutError: a host is missing; names it.
      ConnectionError: host 0 left, or something else answers at its address.
    """
    meeting = _Meeting(place, json.loads(json.dumps(record)), seconds)
    return Company(place, meeting.join() if bind is None else meeting.gather(bind))


class _Peer:
    """A connection to another host: lines of JSON."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.heard = time.monotonic()
        self.is_done = False  # it has finished, and may go
        self._buffer = b""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, **message: Any) -> None:
        """Send a message, unless the peer is gone, which reading will show."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that are here, or wait for data. Raises OSError at the end and ValueError for noise."""
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionResetError("its connection ended")
        self.heard = time.monotonic()
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > _LONGEST_LINE:
            raise ValueError("not a host of a job")
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("not a host of a job")
        return messages

    def next(self) -> dict[str, Any]:
        """Wait for a message."""
        while not (messages := self.receive()):
            pass
        return messages[0]


class _Meeting:
    def __init__(self, place: Place, record: dict[str, Any], seconds: float) -> None:
        self._place, self._record, self._seconds = place, record, seconds
        self._began = time.monotonic()
        self._said = self._began - _SAY_SECONDS + 2 * _RETRY_SECONDS  # the first time after a moment

    def gather(self, bind: str) -> dict[int, _Peer]:
        """Let all others come, as host 0."""
        place, peers = self._place, dict[int, _Peer]()
        records = {0: self._record}
        name, _, port = bind.rpartition(":")
        with _listen((name.strip("[]"), int(port))) as listener, selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            while len(peers) < place.count - 1:
                for key, _ in selector.select(_RETRY_SECONDS):
                    if key.fileobj is listener:
                        self._admit(listener.accept()[0], peers, records, selector)
                    else:  # nobody has anything to say yet but good-bye
                        selector.unregister(key.fileobj)
                        del peers[key.data], records[key.data]
                if missing := [str(host) for host in range(1, place.count) if host not in peers]:
                    self._wait_on(f"host {', '.join(missing)}", peers)
        if (found := differences(records)) is not None:
            self._refuse(found, peers)
        for peer in peers.values():
            peer.send(welcome=True)
        return peers

    def _admit(
        self, connection: socket.socket, peers: dict[int, _Peer], records: dict[int, Any], selector: Any
    ) -> None:
        """Add the host that connected to those who are here. Forget what is no host."""
        connection.settimeout(_LINE_SECONDS)
        peer = _Peer(connection)
        try:
            hello = peer.next()
            host, count, record = int(hello["host"]), int(hello["hosts"]), dict(hello["record"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            connection.close()
            return
        if count != self._place.count or not 0 < host < count or host in peers:
            mine = f"host 0 was started with APR_HOSTS={self._place.count} at {self._place.address}"
            what = f"APR_HOSTS={count}" if count != self._place.count else f"APR_HOST={host}, which is here already"
            self._refuse(f"{mine}, and another host with {what}", {**peers, -1: peer})
        peers[host], records[host] = peer, record
        selector.register(connection, selectors.EVENT_READ, host)

    def join(self) -> dict[int, _Peer]:
        """Join host 0, and return the connection to it."""
        peer = self._connect()
        peer.send(host=self._place.host, hosts=self._place.count, record=self._record)
        peer.socket.settimeout(self._seconds + _SAY_SECONDS)
        try:
            while not (answer := peer.next()).get("welcome"):
                if "refused" in answer:
                    raise ConfigError(str(answer["refused"]))
                if "waiting" in answer:
                    self._say(str(answer["waiting"]))
        except ConfigError:
            raise
        except (OSError, ValueError) as error:
            raise ConnectionError(
                f"host {self._place.host}: host 0 at {self._place.address} left before the job began ({error}); "
                "its messages say why"
            ) from error
        return {0: peer}

    def _connect(self) -> _Peer:
        while True:
            try:
                return _Peer(socket.create_connection(self._place.endpoint, timeout=_LINE_SECONDS))
            except OSError as error:
                self._wait_on(f"host 0 ({error.strerror or error})", {})
            time.sleep(_RETRY_SECONDS)

    def _wait_on(self, missing: str, peers: Mapping[int, _Peer]) -> None:
        """Say for whom this host waits, if it is time to. Raises TimeoutError if it has waited for too long."""
        place, waited = self._place, time.monotonic() - self._began
        if waited > self._seconds:
            text = (
                f"host {place.host} waited {waited:.0f} s at {place.address} for {missing}, in vain. Start all "
                f"{place.count} hosts at about the same time, with the same address"
            )
            for peer in peers.values():
                peer.send(refused=text)
            raise TimeoutError(text)
        if time.monotonic() - self._said >= _SAY_SECONDS:
            text = f"host {place.host} waits at {place.address} for {missing} ({waited:.0f} of {self._seconds:.0f} s)"
            self._say(text)
            for peer in peers.values():
                peer.send(waiting=text)

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        print(text, file=sys.stderr, flush=True)

    def _refuse(self, text: str, peers: Mapping[int, _Peer]) -> NoReturn:
        for peer in peers.values():
            peer.send(refused=text)
        raise ConfigError(text)


class Company:
    """The connections to the other hosts, host 0's to all and theirs to it. A thread watches them from `watch` on."""

    def __init__(self, place: Place, peers: dict[int, _Peer]) -> None:
        self._place, self._peers = place, peers
        self._leaving = threading.Event()

    def watch(self, silent_seconds: float, end: Callable[[int], None] = os._exit) -> None:
        """End this process with a sentence when another host is lost, or silent for so long."""
        for peer in self._peers.values():
            peer.socket.settimeout(silent_seconds)
        threading.Thread(target=self._watch, args=(silent_seconds, end), daemon=True).start()

    def done(self) -> None:
        """Tell the others that this host has finished, and may go."""
        self._tell(done=True)

    def failed(self, error: BaseException) -> None:
        """Tell the others that this host ends because of an error, which it says itself."""
        self._leaving.set()
        code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), _LOST)
        text = str(error) or type(error).__name__
        self._tell(lost=f"host {self._place.host} failed: {text}", code=code)

    def _tell(self, **message: Any) -> None:
        for peer in list(self._peers.values()):
            peer.send(**message)

    def _watch(self, silent_seconds: float, end: Callable[[int], None]) -> None:
        told = 0.0
        with selectors.DefaultSelector() as selector:
            for host, peer in self._peers.items():
                selector.register(peer.socket, selectors.EVENT_READ, host)
            while self._peers and not self._leaving.is_set():
                lost = None
                for key, _ in selector.select(1.0):
                    lost = lost or self._read(key.data, selector)
                for host, peer in self._peers.items():
                    if time.monotonic() - peer.heard > silent_seconds and not peer.is_done:
                        lost = lost or (f"host {host} has been silent for {silent_seconds:.0f} s", _LOST)
                if lost is not None:
                    self._end(*lost, end)
                    return
                if time.monotonic() - told >= 1.0:
                    told = time.monotonic()
                    self._tell()

    def _read(self, host: int, selector: Any) -> tuple[str, int] | None:
        """Read a host's messages. Return a sentence and an exit code if it is lost."""
        peer = self._peers[host]
        try:
            messages = peer.receive()
        except (OSError, ValueError) as error:
            selector.unregister(peer.socket)
            del self._peers[host]
            return None if peer.is_done else (f"host {host} was lost ({error})", _LOST)
        for message in messages:
            if "lost" in message:
                return str(message["lost"]), int(message["code"])
            peer.is_done |= "done" in message
        return None

    def _end(self, text: str, code: int, end: Callable[[int], None]) -> None:
        self._tell(lost=text, code=code)
        if self._leaving.wait(_LAST_WORDS_SECONDS):
            return
        print(
            f"host {self._place.host} ends, because {text}. The same command goes on from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        end(code)


def tunnel(endpoint: tuple[str, int]) -> str:
    """Return a local address whose connections lead to `endpoint`, and do not end when that does.

    JAX's client aborts the process, with a stack of C++, as soon as its connection ends. `Company` says who is lost.
    """
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            near, _ = listener.accept()
            try:
                far = socket.create_connection(endpoint)
            except OSError:
                near.close()  # JAX tries again
                continue
            threading.Thread(target=_copy, args=(near, far, True), daemon=True).start()
            threading.Thread(target=_copy, args=(far, near, False), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def _copy(source: socket.socket, target: socket.socket, ends: bool) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    if ends:
        target.close()


def _listen(endpoint: tuple[str, int]) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(*endpoint, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family, dualstack_ipv6=endpoint[0] == "::")


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the record's leaves by their dotted names, as text."""
    leaves: dict[str, str] = {}
    for name, value in record.items():
        leaves |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: json.dumps(value)}
    return leaves


def _values(name: str, flat: Mapping[int, Mapping[str, str]]) -> str:
    hosts: dict[str, list[str]] = {}
    for host, record in sorted(flat.items()):
        hosts.setdefault(record.get(name, "absent"), []).append(str(host))
    return f"{name} is " + " and ".join(f"{value} on host {', '.join(on)}" for value, on in hosts.items())
