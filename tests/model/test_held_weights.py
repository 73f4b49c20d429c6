"""Every way to hold the weights is the same model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apr_jax.config import MeshConfig
from apr_jax.kernels import cpu_kernels
from apr_jax.model import held_weights
from apr_jax.model import params as params_of
from apr_jax.model.held_weights import HeldWeights
from apr_jax.model.ops import XLA
from apr_jax.model.placement import place_params
from apr_jax.model.views.training import training_rows
from apr_jax.parallel.mesh import make_mesh as mesh_of
from tests.engine.helpers import MODEL, make_mesh

pytestmark = pytest.mark.heavy
CPU = cpu_kernels("cpu")
WAYS = {"plain": XLA} if CPU is None else {"plain": XLA, **CPU.DECODING}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_do_not_depend_on_how_weights_are_held(way, own_head, tied):
    config = dataclasses.replace(MODEL, tie_embeddings=tied, remat="full")
    if half := way == "bfloat16":
        config = dataclasses.replace(config, compute_dtype="bfloat16")
    params = params_of.init_params(config, 0)
    tokens, view = jnp.arange(12), training_rows(config, jnp.arange(12))

    def logits(model):
        return model.logits(model(tokens, view)[0])

    if way != "plain" and tied and not own_head:
        return  # the kernels' head is a matrix of its own
    weights = HeldWeights.of(config, WAYS[way], own_head)
    made = weights.hold(params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(
        lambda x: (x.shape, x.dtype), weights.abstract()
    )
    expected = logits(nnx.merge(params_of.graphdef(config), params))
    np.testing.assert_allclose(logits(nnx.merge(weights.graphdef(), made)), expected, atol=0.002 if half else 1e-5)


def test_matrices_are_in_the_compute_dtype_and_norms_in_float32():
    config = dataclasses.replace(MODEL, compute_dtype="bfloat16", tie_embeddings=True)
    weights = HeldWeights.of(config, XLA, own_head=True)
    made = weights.hold(params_of.init_params(config, 0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(made) if leaf.ndim > 1} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(made) if leaf.ndim == 1} == {"float32"}
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(made)) - made["embedding"][...].nbytes
    assert weights.num_bytes() == read
    tied = HeldWeights.of(config, XLA, own_head=False)
    assert tied.num_bytes() == sum(leaf.nbytes for leaf in jax.tree.leaves(tied.hold(params_of.init_params(config, 0))))


def test_matrices_are_split_over_tensor_as_they_were_trained():
    specs = HeldWeights.of(MODEL, XLA, own_head=False).shardings(make_mesh(data=2, tensor=2))
    down, gate = (specs["blocks"][0]["mlp"][name].get_value().spec for name in ("down", "gate"))
    assert (down[0], gate[1]) == ("tensor", "tensor")


@pytest.mark.skipif(CPU is None, reason="no kernels for this CPU")
def test_what_lies_in_panels_is_whole_on_every_device():
    specs = HeldWeights.of(MODEL, WAYS["float32"], own_head=True).shardings(make_mesh(data=2))
    assert all(leaf.spec == jax.sharding.PartitionSpec() for leaf in jax.tree.leaves(specs["blocks"][0]["mlp"]))


@pytest.mark.parametrize("way", WAYS)
def test_new_weights_take_the_place_of_the_old_array_by_array(way, monkeypatch):
    """The devices never hold more than the trainer's weights and one copy of the engine's."""
    mesh, trainer = make_mesh(data=4), mesh_of(MeshConfig(data=1, fsdp=4, tensor=1))
    config = dataclasses.replace(MODEL, compute_dtype="bfloat16" if way == "bfloat16" else "float32")
    weights = HeldWeights.of(config, WAYS[way], own_head=True)
    first, second = (place_params(params_of.init_params(config, seed), trainer, config) for seed in (0, 1))
    expected, kept = jax.device_get((weights.hold(second), first))
    old, peaks, jitted = weights.take(first, mesh), [], held_weights._jitted

    def watched(making, place):
        def make(given):
            made = jitted(making, place)(given)
            peaks.append(sum(array.nbytes for array in jax.live_arrays()))
            return made

        return make

    monkeypatch.setattr(held_weights, "_jitted", watched)
    before = sum(array.nbytes for array in jax.live_arrays())
    new = weights.take(second, mesh, old)
    assert len(peaks) == len(jax.tree.leaves(new))
    assert max(peaks) <= before
    assert all(array.is_deleted() for array in jax.tree.leaves(old))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(new), expected)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(first), kept)
