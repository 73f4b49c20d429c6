"""What tests/parallel/test_hosts.py runs as a job of several hosts: python job.py WHAT. Prints what each host saw."""

import os
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.config import ConfigError, MeshConfig
from apr_jax.model.held_weights import HeldWeights
from apr_jax.model.ops import XLA
from apr_jax.model.params import abstract_params, init_params, logical_axes
from apr_jax.parallel import hosts
from apr_jax.parallel.mesh import make_mesh, param_shardings
from apr_jax.stopping import StoppedError
from apr_jax.train.signals import stop_signal
from tests.train.small import small_config

MESHES = [(4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)]


def shared():
    host = jax.process_index()
    assert hosts.gather({"host": host, "long": "x" * 5_000 * host}) == [
        {"host": i, "long": "x" * 5_000 * i} for i in range(2)
    ]
    assert hosts.from_first(lambda: ("only", jax.process_index())) == ("only", 0)
    assert [list(part) for part in hosts.gather(list(hosts.own_part(range(5))))] == [[0, 1], [2, 3, 4]]
    assert (hosts.messages() is sys.stderr) == hosts.is_first()
    with pytest.raises(ConfigError, match="needs 2 devices, but the job's 2 hosts have 4; use all of them"):
        make_mesh(MeshConfig(data=2, fsdp=1, tensor=1))


def weights(shape):
    """Weights go to the job's mesh whole, and to each host's own devices unchanged."""
    config = small_config(**{"model.num_kv_heads": 4, "model.num_heads": 4, "model.head_dim": 8})
    mesh = make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]))
    own = hosts.rollout_mesh(mesh)
    assert {device.process_index for device in own.devices.flat} == {jax.process_index()}
    assert dict(own.shape) == {"data": 2 // min(shape[2], 2), "fsdp": 1, "tensor": min(shape[2], 2)}
    params, shapes = init_params(config.model, 3), abstract_params(config.model)
    placed = hosts.place(params, param_shardings(mesh, shapes, logical_axes(shapes)))
    weights = HeldWeights.of(config.model, XLA, own_head=False)
    home = weights.take(placed, own)
    home = weights.take(placed, own, home)  # in the place of the first
    for expected, there, here in zip(*map(jax.tree.leaves, (params, placed, home)), strict=True):
        assert set(here.devices()) == set(own.devices.flat)
        np.testing.assert_array_equal(hosts.whole_array(there), np.asarray(expected))
        np.testing.assert_array_equal(hosts.whole_array(here), np.asarray(expected))


def stopping():
    """Host 1 alone is asked to stop. Both know it a round later, and in long work of their own soon."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=1))
    with stop_signal(mesh).listening() as stop:
        assert not stop.agreed()
        assert stop.together(lambda: jax.process_index()) == [0, 1]

        def long_work():
            if not hosts.is_first():
                signal.raise_signal(signal.SIGTERM)
            while True:
                time.sleep(0.05)
                stop.listen()

        try:
            stop.together(long_work)
        except StoppedError:
            assert stop.requested
            assert [stop.agreed(), stop.agreed()] == [False, True]
            return
    raise AssertionError("nobody stopped")


def dying(victim, number):
    """A host is killed, or stopped, while the other waits for it."""
    if jax.process_index() == victim:
        os.kill(os.getpid(), number)
    hosts.whole_array(jax.jit(jnp.sum)(hosts.place(np.ones(4), jax.sharding.NamedSharding(_mesh(), jax.P("data")))))
    hosts.gather("host 0 waits")


def _mesh():
    return make_mesh(MeshConfig(data=4, fsdp=1, tensor=1))


if __name__ == "__main__":
    with hosts.joined(dict):
        if sys.argv[1] == "dying":
            hosts.gather("all are here")
            dying(int(sys.argv[2]), signal.Signals[sys.argv[3]])
        if sys.argv[1] == "failing":
            hosts.gather("all are here")
            if not hosts.is_first():
                raise ConfigError("this cannot work")
            hosts.gather("host 0 waits")
        shared()
        hosts.meet(_mesh())
        for mesh_shape in MESHES:
            weights(mesh_shape)
        stopping()
        print(f"fine on {jax.process_count()}", flush=True)
