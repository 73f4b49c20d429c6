"""What the compiled steps must not contain: communication between data shards, and copies of the cache."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from apr_jax.engine.sharded import PAGES, SHARDED, ShardedStep
from apr_jax.model.paged_cache import copy_pages
from tests.engine.helpers import make_engine, make_mesh
from tests.engine.hlo import aliases, collectives, collectives_over_data, copies_of, groups, local_sizes, step_texts

pytestmark = pytest.mark.heavy

DONATED = ("decode", "prefill_write", "copy_pages")


@pytest.fixture(scope="module")
def one_device():
    """An engine whose number of pages no other size happens to equal, and its programs."""
    engine = make_engine(pages=333)
    return engine, step_texts(engine)


def test_pages_are_never_copied(one_device):
    """Neither as a whole nor in another shape or layout."""
    engine, texts = one_device
    for name, text in texts.items():
        assert "333" in text
        assert copies_of(text, local_sizes(engine._pages)) == [], name


def test_pages_are_updated_in_place(one_device):
    """Every page pool array of the output is the memory of the same one of the input."""
    engine, texts = one_device
    for name in DONATED:
        arrays = len(jax.tree.leaves(engine._pages))
        alias = aliases(texts[name])
        assert {output: alias.get(output) for output in range(arrays)} == {i: i for i in range(arrays)}, name


def test_an_undonated_step_is_found_out(one_device):
    """The counterexample: the same step that may not reuse its input has to copy all pages."""
    engine, _ = one_device
    mesh = engine._mesh
    undonated = ShardedStep(copy_pages, mesh, (SHARDED, SHARDED, SHARDED), NamedSharding(mesh, PAGES), donated=())
    pairs = engine._put(jnp.zeros((1, 16), jnp.int32))
    text = undonated.jitted.lower(engine._pages, pairs, pairs).compile().as_text()
    assert len(copies_of(text, local_sizes(engine._pages))) >= len(jax.tree.leaves(engine._pages))
    assert aliases(text) == {}


def test_copies_are_seen_in_any_shape():
    found = "  ROOT %copy-start.3 = (f32[4,6]{1,0}, f32[4,6]{1,0}, u32[]) copy-start(%x)"
    assert copies_of(found, {24}) == [found.strip()]
    assert copies_of("  %c = bf16[2,12]{0,1:T(8,128)} copy(%x), metadata={}", {24})
    assert not copies_of("  %c = f32[25]{0} copy(%x)\n  %d = f32[24]{0} copy-done(%x)", {24})


def test_data_shards_do_not_communicate():
    """With nothing split over "tensor" there is no collective at all."""
    engine = make_engine(make_mesh(data=8), lanes=1, pages=13, prefill_lanes=1)
    for name, text in step_texts(engine).items():
        assert collectives(text) == [], name


def test_collectives_of_split_heads_stay_within_a_data_shard():
    mesh = make_mesh(data=4, tensor=2)
    texts = step_texts(make_engine(mesh, lanes=2, pages=13, prefill_lanes=2))
    assert collectives(texts["decode"])
    assert collectives(texts["prefill"])
    for name, text in texts.items():
        assert collectives_over_data(text, mesh) == [], name


@pytest.mark.parametrize(("data", "tensor"), [(8, 1), (4, 2)])
@pytest.mark.parametrize("axis", ["data", "tensor"])
def test_a_collective_over_data_is_found_out(data, tensor, axis):
    """The counterexample: a sum over either axis."""
    mesh = make_mesh(data, tensor)
    specs = {"in_specs": PartitionSpec("data", "tensor"), "out_specs": PartitionSpec(), "check_vma": False}
    total = jax.shard_map(lambda x: jax.lax.psum(x, axis), mesh=mesh, **specs)
    text = jax.jit(total).lower(jnp.zeros((8, 8))).compile().as_text()
    assert bool(collectives_over_data(text, mesh)) == (axis == "data")
    assert collectives(text) or mesh.shape[axis] == 1


def test_groups_are_read_in_all_notations():
    assert groups("x = f32[] all-reduce(y), replica_groups={{0,1},{2,3}}, to_apply=a", 4) == [[0, 1], [2, 3]]
    assert groups("x = f32[] all-reduce(y), replica_groups=[2,2]<=[4], to_apply=a", 4) == [[0, 1], [2, 3]]
    assert groups("x = f32[] all-reduce(y), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=a", 4) == [[0, 2], [1, 3]]
    assert groups("x = f32[] collective-permute(y), source_target_pairs={{0,1},{1,0}}", 4) == [[0, 1], [1, 0]]
    assert groups("x = f32[] all-reduce(y), replica_groups={}, to_apply=a", 4) == [[0, 1, 2, 3]]


def test_weights_meet_all_lanes_in_one_matmul(one_device):
    """Lifted over lanes, the MLP's products are [L, D] x [D, F]."""
    engine, decode = one_device[0], one_device[1]["decode"]
    lanes = engine.limits.lanes_in_turn
    assert re.search(rf"f32\[{lanes},48\]\S* (dot|fusion)\(", decode)
    assert not re.search(rf"f32\[{lanes},1,48\]\S* dot\(", decode)
