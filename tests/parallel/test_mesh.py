"""Sharded equals unsharded; what cannot be sharded is refused with both numbers."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from apr_jax.config import ConfigError, MeshConfig, ModelConfig
from apr_jax.model import params as params_of
from apr_jax.model.views.training import training_rows
from apr_jax.parallel.mesh import (
    BATCH_AXES,
    Rules,
    make_mesh,
    num_row_shards,
    num_slices,
    param_shardings,
    replicated,
    slices_along_data,
    split_over_data,
    split_rows,
)
from tests.configs import TINY_MODEL

MODEL = dataclasses.replace(
    TINY_MODEL, vocab_size=32, embed_dim=16, mlp_dim=24, head_dim=4, max_seq_len=64, tie_embeddings=True
)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def loss_and_grads(config: ModelConfig, params: Any, batch: dict[str, jax.Array]) -> Any:
    def loss(params: Any) -> jax.Array:
        model = nnx.merge(params_of.graphdef(config), params)
        hidden, _ = model(batch["tokens"], training_rows(config, batch["positions"], batch["segment_ids"]))
        log_probs = jax.nn.log_softmax(model.logits(hidden))
        return -jnp.mean(jnp.take_along_axis(log_probs, batch["targets"][..., None], axis=-1))

    return jax.value_and_grad(loss)(params)


def random_batch() -> dict[str, jax.Array]:
    tokens = jax.random.randint(jax.random.key(1), (8, 17), 0, MODEL.vocab_size)
    positions = jnp.broadcast_to(jnp.concatenate([jnp.arange(6), jnp.arange(10)])[None], (8, 16))
    segment_ids = jnp.broadcast_to(jnp.asarray([1] * 6 + [2] * 10)[None], (8, 16))
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions, "segment_ids": segment_ids}


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("shape", "tied"), [((8, 1, 1), True), ((1, 8, 1), False), ((2, 2, 2), True), ((1, 4, 2), False)]
)
def test_sharded_loss_and_gradients_equal_one_device(shape: tuple[int, int, int], tied: bool) -> None:
    config = dataclasses.replace(MODEL, tie_embeddings=tied, remat="full" if tied else "none")
    params, batch = params_of.init_params(config, 0), random_batch()
    step = jax.jit(lambda params, batch: loss_and_grads(config, params, batch))
    expected_loss, expected_grads = step(params, batch)
    mesh = make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "tensor"), shape, strict=True))))
    shardings = param_shardings(mesh, params, params_of.logical_axes(params))
    params, batch = jax.device_put(params, shardings), jax.device_put(batch, batch_sharding(mesh))
    up = params["blocks"][0]["mlp"]["up"][...]
    assert up.addressable_shards[0].data.shape == (16 // shape[1], 24 // shape[2])
    assert batch["tokens"].addressable_shards[0].data.shape == (8 // (shape[0] * shape[1]), 16)
    loss, grads = jax.jit(step, out_shardings=(replicated(mesh), shardings))(params, batch)
    np.testing.assert_allclose(loss, expected_loss, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert grads["blocks"][0]["mlp"]["up"][...].sharding == up.sharding


def test_mesh_axes() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 3
    chosen = jax.devices()[4:]
    assert set(make_mesh(MeshConfig(data=1, fsdp=2, tensor=1), chosen).devices.flat) == set(chosen[:2])


def test_too_few_devices_are_counted() -> None:
    with pytest.raises(ConfigError, match="needs 16 devices, but there are 8"):
        make_mesh(MeshConfig(data=4, fsdp=2, tensor=2))


def test_rules_map_names_to_mesh_axes() -> None:
    assert Rules().spec(("embed", "heads")) == PartitionSpec("fsdp", "tensor")
    assert Rules(vocab=None).spec(("vocab", "embed")) == PartitionSpec(None, "fsdp")
    assert Rules().spec((None,)) == PartitionSpec(None)


def test_collisions_and_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="mesh axis 'tensor' would split 2 axes"):
        Rules(embed="tensor").spec(("embed", "heads"))
    with pytest.raises(ConfigError, match="'expert' has no rule"):
        Rules().spec(("expert",))


@pytest.mark.parametrize(
    ("field", "size", "message"),
    [
        ("vocab_size", 31, r"embedding.*'vocab' of 31 is not a multiple of mesh\.tensor=2"),
        ("embed_dim", 14, r"'embed' of 14 is not a multiple of mesh\.fsdp=4"),
        ("mlp_dim", 25, r"mlp.*'mlp' of 25 is not a multiple of mesh\.tensor=2"),
    ],
)
def test_an_axis_that_does_not_divide_is_named(field: str, size: int, message: str) -> None:
    params = params_of.abstract_params(dataclasses.replace(MODEL, **{field: size}))
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    with pytest.raises(ConfigError, match=message):
        param_shardings(mesh, params, params_of.logical_axes(params))
    if field == "vocab_size":
        param_shardings(mesh, params, params_of.logical_axes(params), Rules(vocab=None))


@pytest.mark.parametrize(
    ("spec", "shape", "expected"),
    [
        ((None, None), (4, 6), (None, "data")),
        (("fsdp", None), (8, 6), (("fsdp", "data"), None)),
        (("fsdp", "tensor"), (6, 4), ("fsdp", ("tensor", "data"))),  # 6 rows do not divide by fsdp * data = 4
        ((None,), (3,), (None,)),
        ((), (), ()),
    ],
)
def test_the_longest_axis_that_divides_is_split_over_data(spec: Any, shape: Any, expected: Any) -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sharding = split_over_data(jax.sharding.NamedSharding(mesh, PartitionSpec(*spec)), shape)
    assert sharding.spec == PartitionSpec(*expected)
    assert sharding.shard_shape(shape) == tuple(
        size // int(np.prod([mesh.shape[name] for name in np.atleast_1d(axes or [])], dtype=int))
        for size, axes in zip(shape, expected, strict=True)
    )


def test_activations_keep_their_rows_where_weights_are_split_over_fsdp():
    """And without an ambient mesh, as in the engine, nothing is touched."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    x_BTD = jnp.zeros((8, 4, 16))
    assert split_rows(x_BTD) is x_BTD
    assert num_row_shards() == 1
    with jax.set_mesh(mesh):
        assert num_row_shards() == 4
        assert jax.jit(split_rows)(x_BTD).sharding.is_equivalent_to(batch_sharding(mesh), 3)


@pytest.mark.heavy
def test_loss_and_gradients_are_the_same_under_an_ambient_mesh():
    params, batch = params_of.init_params(MODEL, 0), random_batch()
    expected = jax.jit(loss_and_grads, static_argnums=0)(MODEL, params, batch)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(params, param_shardings(mesh, params, params_of.logical_axes(params)))
    with jax.set_mesh(mesh):
        found = jax.jit(loss_and_grads, static_argnums=0)(MODEL, placed, jax.device_put(batch, batch_sharding(mesh)))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def _of_slice(index: int, number: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(id=number, slice_index=index, process_index=index, device_kind="none", platform="cpu")


def test_slices_of_a_tpu_lie_one_after_the_other_along_data():
    devices = [_of_slice(index, 4 * index + number) for index in range(2) for number in range(4)]
    assert num_slices(devices) == 2
    assert num_slices(jax.devices()) == 1
    grid = slices_along_data((4, 2, 1), devices[::-1])
    assert [[device.slice_index for device in row.flat] for row in grid] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert len({device.id for device in grid.flat}) == 8
    with pytest.raises(ConfigError, match=r"mesh\.data=1 must be a multiple of 2, the job's TPU slices"):
        slices_along_data((1, 8, 1), devices)
