"""Meshes that divide, configs fitted to them, and the order in which they are tried."""

import dataclasses
import math

import pytest

from apr_jax.aot.mesh_search import candidates, estimate, parse_mesh, rows_per_shard, shapes
from apr_jax.bench.datasheets import PEAKS
from apr_jax.config import Config, ConfigError, MeshConfig
from apr_jax.config_dict import from_config_dict
from apr_jax.model.params import num_params
from apr_jax.parallel.fit import fit
from configs.grpo import get_config

V5E, V5P, H100 = PEAKS["v5e"], PEAKS["v5p"], PEAKS["h100"]


def load(variant: str) -> Config:
    return from_config_dict(get_config(variant))


@pytest.mark.parametrize("devices", [1, 6, 16])
def test_every_shape_once(devices):
    found = shapes(devices)
    assert all(mesh.data * mesh.fsdp * mesh.tensor == devices for mesh in found)
    assert len(found) == len(set(found))
    assert len(found) == sum(devices % (a * b) == 0 for a in range(1, devices + 1) for b in range(1, devices + 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4,4", "give DATA,FSDP,TENSOR as three numbers above 0, such as 16,1,1"),
        ("4,x,1", "three numbers above 0"),
        ("4,0,4", "three numbers above 0"),
        ("4,2,1", "--mesh=4,2,1 has 8 devices, and the topology has 16"),
    ],
)
def test_a_wrong_mesh_says_why(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_mesh(text, 16)


def test_a_mesh_is_read():
    assert parse_mesh("4,2,2", 16) == MeshConfig(data=4, fsdp=2, tensor=2)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=2, fsdp=1, tensor=8), "mesh.tensor=8 must divide the 4 devices of a host"),
        (MeshConfig(data=3, fsdp=1, tensor=1), "sft.rows_per_step=256 must be a multiple of mesh.data"),
        (MeshConfig(data=512, fsdp=1, tensor=1), "sft.rows_per_step=256 must be a multiple of mesh.data"),
    ],
)
def test_a_mesh_that_does_not_divide_says_what(mesh, message):
    with pytest.raises(ConfigError, match=message):
        fit(load("paper"), mesh, devices_per_host=4)


def test_fitting_keeps_the_global_batch_and_what_each_device_has():
    paper = load("paper")
    fitted = fit(paper, MeshConfig(data=4, fsdp=2, tensor=2), devices_per_host=4)
    assert fitted.sft.rows_per_step == paper.sft.rows_per_step
    assert rows_per_shard(fitted) == rows_per_shard(paper) == 4
    assert fitted.grpo.rows_per_microbatch == 8 * paper.grpo.rows_per_microbatch
    assert fitted.engine == paper.engine
    assert fit(fitted, paper.mesh, devices_per_host=1) == paper
    few = fit(paper, MeshConfig(data=4, fsdp=2, tensor=2), devices_per_host=4, rows_per_shard=1)
    assert (rows_per_shard(few), few.sft.microbatches) == (1, 32)


def test_a_small_model_needs_no_tensor_axis_and_a_large_one_is_split():
    paper = candidates(load("paper"), 16, 4, V5E)
    assert paper[0].mesh.tensor == 1
    assert {c.mesh.tensor for c in paper} == {1, 2, 4}, "tensor stays within a host of four"
    assert all(c.bytes_needed < V5E.memory for c in paper)
    seven = candidates(load("7b"), 8, 8, H100)
    whole = next(c for c in seven if c.mesh == MeshConfig(data=8, fsdp=1, tensor=1))
    assert whole.bytes_needed > H100.memory
    fitting = [c.bytes_needed <= H100.memory for c in seven]
    assert fitting[0]
    assert fitting == sorted(fitting, reverse=True), "those that fit come first"
    times = [c.estimate.seconds for c in seven if c.bytes_needed <= H100.memory]
    assert times == sorted(times)


def test_rows_are_halved_where_memory_is_short():
    tight = dataclasses.replace(V5E, memory=4 * 10**9)
    found = candidates(load("paper"), 16, 4, tight)
    assert min(map(rows_per_shard, (c.config for c in found))) < 4
    assert found[0].bytes_needed <= tight.memory


def test_the_estimate_by_hand():
    paper = load("paper")
    paper = dataclasses.replace(paper, model=dataclasses.replace(paper.model, remat="full"))
    found = estimate(fit(paper, MeshConfig(data=2, fsdp=2, tensor=1), 4), V5P)
    tokens, D, L = 256 * 4096, 1024, 18
    weights = L * (4 * D * D + 3 * D * 2752 + 2 * D) + D + 32_000 * D
    flops = (8 * weights + 4 * 2 * L * D * 4096) * tokens / 4
    assert found.estimate.compute == pytest.approx(flops / V5P.flops)
    everything = weights + 32_000 * D
    sent = 16 * (3 * everything * 2 / 2 + 2 * everything / 2 * 4 / 2)
    assert found.estimate.links == pytest.approx(sent / V5P.link_bandwidth)
    assert math.isclose(found.estimate.seconds, found.estimate.compute)


def test_auto_recomputes_the_least_that_fits():
    paper = fit(load("paper"), MeshConfig(data=1, fsdp=1, tensor=1), 1, rows_per_shard=8)

    def named(remat):
        return dataclasses.replace(paper, model=dataclasses.replace(paper.model, remat=remat))

    for gigabytes, remat in ((80, "none"), (28, "dots"), (12, "full")):
        peaks = dataclasses.replace(H100, memory=gigabytes * 10**9)
        found, expected = estimate(paper, peaks), estimate(named(remat), peaks)
        assert (found.bytes_needed, found.estimate) == (expected.bytes_needed, expected.estimate)


def test_weights_that_are_gathered_count_where_layers_are_kept():
    """Over fsdp a device holds less state, and beside it every layer's weights in bfloat16 unless it recomputes."""
    paper = load("paper")

    def needed(remat, fsdp):
        model = dataclasses.replace(paper.model, remat=remat)
        mesh = MeshConfig(data=4 // fsdp, fsdp=fsdp, tensor=1)
        return estimate(fit(dataclasses.replace(paper, model=model), mesh, 4), V5P).bytes_needed

    gathered = 2 * num_params(paper.model).non_embedding
    assert needed("none", 4) - needed("none", 1) == needed("full", 4) - needed("full", 1) + gathered
