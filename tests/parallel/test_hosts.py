"""Jobs of several hosts: what they share, who stops with whom, and what happens to the others when one dies."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from apr_jax.config import ConfigError, MeshConfig
from apr_jax.parallel import hosts
from apr_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.heavy

ROOT = pathlib.Path(__file__).parents[2]


def _start_job(*what, hosts=(0, 1), **more):
    """The processes of a job of two, as a cluster starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    shared = {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    place = {"APR_HOSTS": "2", "APR_COORDINATOR": coordinator, **more}
    return [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "parallel" / "job.py"), *what],
            env={**os.environ, **shared, **place, "APR_HOST": str(host)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in hosts
    ]


def test_two_hosts_share_values_weights_and_the_wish_to_stop():
    for process in _start_job("all"):
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert "fine on 2" in output


@pytest.mark.parametrize(
    ("victim", "number", "why"),
    [(1, "SIGKILL", "was lost (its connection ended)"), (0, "SIGKILL", "was lost"), (1, "SIGSTOP", "has been silent")],
)
def test_a_host_that_dies_ends_the_other_and_is_named(victim, number, why):
    job = _start_job("dying", str(victim), number, APR_HEARTBEAT_SECONDS="3")
    survivor = job[1 - victim]
    _, errors = survivor.communicate(timeout=60)
    job[victim].kill()
    job[victim].communicate(timeout=60)
    assert survivor.returncode == 1, errors
    assert f"host {1 - victim} ends, because host {victim} {why}" in errors
    assert "Check failure stack trace" not in errors
    assert "Traceback" not in errors


def test_a_host_that_fails_ends_the_other_with_its_words_and_code():
    survivor, victim = _start_job("failing")
    _, errors = survivor.communicate(timeout=60)
    victim.kill()  # without `entry` it waits for the other at its exit
    victim.communicate(timeout=60)
    assert survivor.returncode == 2, errors
    assert "host 0 ends, because host 1 failed: this cannot work." in errors


def test_one_host_on_its_own_shares_with_nobody():
    assert hosts.gather("mine") == ["mine"]
    assert hosts.from_first(lambda: "mine") == "mine"
    assert hosts.own_part("abc") == "abc"
    assert hosts.is_first()
    assert hosts.messages() is sys.stderr


@pytest.mark.parametrize("shape", [(4, 1, 1), (2, 2, 1), (2, 2, 2), (1, 8, 1)])
def test_an_engine_has_as_data_what_the_trainer_has_as_fsdp(shape):
    mesh = make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]))
    own = hosts.rollout_mesh(mesh)
    assert dict(own.shape) == {"data": shape[0] * shape[1], "fsdp": 1, "tensor": shape[2]}
    assert list(own.devices.flat) == list(mesh.devices.flat)


def test_placing_and_reading_back():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    values = np.arange(32, dtype=np.float32).reshape(8, 4)
    placed = hosts.place({"x": values}, jax.sharding.NamedSharding(mesh, jax.P("data", "tensor")))
    np.testing.assert_array_equal(hosts.whole_array(placed["x"]), values)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"APR_HOSTS": "2"}, "APR_HOST is not"),
        ({"APR_HOSTS": "2", "APR_HOST": "0"}, "APR_COORDINATOR is not"),
        ({"APR_HOSTS": "two", "APR_HOST": "0", "APR_COORDINATOR": "a:1"}, "APR_HOSTS=two must be a positive"),
        ({"APR_HOSTS": "2", "APR_HOST": "2", "APR_COORDINATOR": "a:1"}, "must lie in 0..1"),
        ({"APR_HOSTS": "2", "APR_HOST": "0", "APR_COORDINATOR": "a"}, "must be HOST:PORT"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message), hosts.joined(dict):
        pass
