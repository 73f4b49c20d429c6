"""Hosts that meet: they wait with words, differ with names, and notice who is lost. In threads, without JAX."""

import concurrent.futures
import contextlib
import socket
import threading
import time

import pytest

from apr_jax.config import ConfigError
from apr_jax.parallel import meeting
from apr_jax.parallel.meeting import Company, Place, differences, meet
from apr_jax.stopping import StoppedError


def _address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def _meet(records, count=None, seconds=10.0, places=None):
    """Returns the result or the error of `meet` on each host, which all come at once."""
    address = _address()
    places = places or [Place(host, count or len(records), address) for host in range(len(records))]

    def come(place, record):
        bind = place.address if place.host == 0 else None
        try:
            return meet(place, record, seconds, bind)
        except Exception as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(come, places, records))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_hosts_that_agree_meet(count):
    record = {"config": {"seed": 0, "task": {"numbers": (1, 2)}}, "jax": "0.10"}
    assert all(isinstance(company, Company) for company in _meet([record] * count))


@pytest.mark.parametrize(
    ("field", "records", "message"),
    [
        ("seed", [{"config": {"seed": 0}}, {"config": {"seed": 1}}], "config.seed is 0 on host 0 and 1 on host 1"),
        ("steps", [{"n": 10}, {"n": 12}, {"n": 10}], "n is 10 on host 0, 2 and 12 on host 1"),
        ("version", [{"jax": "0.10.2"}, {"jax": "0.10.1"}], 'jax is "0.10.2" on host 0 and "0.10.1" on host 1'),
        ("flag", [{}, {"--start": "/a"}], '--start is absent on host 0 and "/a" on host 1'),
        ("type", [{"a": 1}, {"a": True}], "a is 1 on host 0 and true on host 1"),
        ("many", [dict.fromkeys("abcdefg", 0), dict.fromkeys("abcdefg", 1)], "; and 2 more. Start all with the same"),
    ],
)
def test_hosts_that_differ_are_refused_everywhere_with_the_same_words(field, records, message):
    errors = _meet(records)
    assert all(isinstance(error, ConfigError) for error in errors), field
    assert len({str(error) for error in errors}) == 1
    assert message in str(errors[0])
    assert differences(dict(enumerate(records))) == str(errors[0])


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([(0, 2), (1, 3)], "APR_HOSTS=2 at .*, and another host with APR_HOSTS=3"),
        ([(0, 3), (1, 3), (1, 3)], "APR_HOST=1"),
    ],
)
def test_hosts_that_count_otherwise_are_refused(places, message):
    address = _address()
    errors = _meet([{}] * len(places), places=[Place(host, count, address) for host, count in places])
    for error in errors:
        assert isinstance(error, ConfigError)
        with pytest.raises(ConfigError, match=message):
            raise error


@pytest.mark.parametrize("present", [[0], [1], [0, 2]])
def test_a_missing_host_is_named_while_others_wait_and_at_the_end(present, capsys, monkeypatch):
    monkeypatch.setattr(meeting, "_SAY_SECONDS", 0.5)
    monkeypatch.setattr(meeting, "_RETRY_SECONDS", 0.1)
    address = _address()
    errors = _meet([{}] * len(present), seconds=1.5, places=[Place(host, 3, address) for host in present])
    missing = (
        "host 0 (Connection refused)" if 0 not in present else ", ".join(str(h) for h in (1, 2) if h not in present)
    )
    said = capsys.readouterr().err.splitlines()
    assert sum(f"host {present[0]} waits at {address} for" in line and missing in line for line in said) >= 2
    assert isinstance(errors[0], TimeoutError)
    assert missing in str(errors[0])
    assert address in str(errors[0])


def test_strangers_at_the_address_are_ignored(monkeypatch):
    monkeypatch.setattr(meeting, "_LINE_SECONDS", 0.3)
    address = _address()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(meet, Place(0, 2, address), {}, 10.0, address)
        for noise in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"",
            b"[]\n",
            b'{"host": "x"}\n',
            b"\xff\n",
            b"[" * 100_000 + b"\n",
            b"quiet",
        ):
            while True:
                with contextlib.suppress(ConnectionRefusedError):
                    stranger = socket.create_connection(Place(0, 2, address).endpoint)
                    break
            stranger.sendall(noise)
            if noise != b"quiet":
                stranger.close()
        second = pool.submit(meet, Place(1, 2, address), {}, 10.0, None)
        assert isinstance(first.result(), Company)
        assert isinstance(second.result(), Company)


def test_a_host_that_left_may_come_back():
    address = _address()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(meet, Place(0, 3, address), {}, 10.0, address)
        place = Place(1, 3, address)
        gone = meeting._Meeting(place, {}, 10.0)._connect()
        gone.send(host=1, hosts=3, record={})
        time.sleep(0.2)
        gone.socket.close()
        time.sleep(0.2)
        others = [pool.submit(meet, Place(host, 3, address), {}, 10.0, None) for host in (1, 2)]
        assert all(isinstance(company.result(), Company) for company in (first, *others))


class _Ends:
    """Notes the exit code with which a host's process would end."""

    def __init__(self):
        self.code, self.happened = None, threading.Event()

    def __call__(self, code):
        self.code = code
        self.happened.set()


def _watching(count, silent_seconds=30.0):
    companies = _meet([{}] * count)
    ends = [_Ends() for _ in companies]
    for company, end in zip(companies, ends, strict=True):
        company.watch(silent_seconds, end)
    return companies, ends


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_host_ends_all_others_with_a_sentence(victim, capsys):
    companies, ends = _watching(3)
    for peer in list(companies[victim]._peers.values()):
        peer.socket.shutdown(socket.SHUT_RDWR)
    for host in {0, 1, 2} - {victim}:
        assert ends[host].happened.wait(5)
        assert ends[host].code == 1
    said = capsys.readouterr().err
    assert f"ends, because host {victim} was lost" in said


@pytest.mark.parametrize(("error", "code"), [(ConfigError("no"), 2), (OSError("no"), 1), (StoppedError("no"), 75)])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_host_that_fails_tells_the_others_why(victim, error, code, capsys):
    companies, ends = _watching(3)
    companies[victim].failed(error)
    for host in {0, 1, 2} - {victim}:
        assert ends[host].happened.wait(5)
        assert ends[host].code == code
    assert not ends[victim].happened.is_set()
    said = capsys.readouterr().err
    for host in {0, 1, 2} - {victim}:
        assert f"host {host} ends, because host {victim} failed: no. " in said


def test_hosts_that_fail_together_say_so_themselves(capsys):
    companies, ends = _watching(3)
    for company in companies:
        company.failed(ConfigError("no"))
    time.sleep(1.5)
    assert not any(end.happened.is_set() for end in ends)
    assert "ends, because" not in capsys.readouterr().err


def test_a_silent_host_is_lost_and_one_that_is_done_is_not(capsys):
    companies, ends = _watching(3, silent_seconds=2.0)
    companies[1].done()
    companies[1]._leaving.set()  # its process is gone
    companies[2]._leaving.set()  # it is stopped: its connection stays
    assert ends[0].happened.wait(8)
    assert "host 0 ends, because host 2 has been silent for 2 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "bind"), [("127.0.0.1:0", "127.0.0.1:0"), ("[::1]:0", "[::1]:0"), ("192.0.2.1:7", "[::]:7")]
)
def test_host_0_listens_at_the_address_that_was_given_and_at_all_only_where_it_cannot(address, bind):
    assert Place(0, 2, address).bind_address() == bind


def test_an_address_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(OSError, match=f"host 0 cannot listen at {address}: Address already in use"):
            Place(0, 2, address).bind_address()


def test_a_tunnel_carries_both_ways_and_outlives_its_far_end():
    with socket.create_server(("127.0.0.1", 0)) as server:
        name, _, port = meeting.tunnel(server.getsockname()).rpartition(":")
        near = socket.create_connection((name, int(port)), timeout=5)
        far, _ = server.accept()
        near.sendall(b"there")
        assert far.recv(5) == b"there"
        far.sendall(b"back")
        assert near.recv(4) == b"back"
        far.close()
    near.settimeout(0.5)
    with pytest.raises(TimeoutError):
        near.recv(1)
    near.close()
