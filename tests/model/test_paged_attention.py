"""Every `PagedAttention` equals plain softmax attention over the row that its table names.

The kernels of TPUs and GPUs run on a CPU: Triton's in Pallas' plain interpret mode, the TPU's in
`pltpu.force_tpu_interpret_mode`, which simulates its copies from HBM (and `tests/kernels/test_tpu_pages.py`).
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from apr_jax.config import MeshConfig
from apr_jax.kernels.gpu import paged_attention as gpu
from apr_jax.kernels.pairs import KernelPagedAttention
from apr_jax.kernels.tpu import paged_attention as tpu
from apr_jax.model.head_tile import HeadTile
from apr_jax.model.paged_attention import PagedAttention, Places
from apr_jax.model.paged_cache import PagedKVCache
from apr_jax.model.views.decode import PagedLanes
from apr_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.heavy

PAGE, ROW = 16, 4
LENGTHS = (0, 1, PAGE, PAGE + 1, 3 * PAGE - 1, ROW * PAGE)  # nothing, one, and around the borders of pages
TILES = {"plain": HeadTile(), "pairs": HeadTile(2, 96), "padded": HeadTile(1, 112)}


def rows(N, K, H=16, seed=0):
    """Queries `[L, N, H]`, and keys and values of each lane's whole row `[L, K, S, H]`, exact in bfloat16."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((len(LENGTHS), N, H), *[(len(LENGTHS), K, ROW * PAGE, H)] * 2)
    draws = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return [draw.astype(jnp.bfloat16).astype(jnp.float32) for draw in draws]


def paged(rows_LKSH, tile):
    """The rows in shuffled pages `[P, J, C, W]` (page 0 is trash), and their tables."""
    L, K, _, H = rows_LKSH.shape
    order = 1 + np.random.default_rng(0).permutation(L * ROW)
    pages_QKCH = jnp.swapaxes(rows_LKSH.reshape(L, K, ROW, PAGE, H), 1, 2).reshape(L * ROW, K, PAGE, H)
    pages = jnp.zeros((L * ROW + 1, K, PAGE, H)).at[order].set(pages_QKCH)
    return tile.pack(pages), jnp.asarray(order.reshape(L, ROW), jnp.int32)


def plain_attention(q_LNH, k_LKSH, v_LKSH, lengths):
    """One lane and one head after another, in NumPy."""
    out = np.zeros(q_LNH.shape)
    groups = q_LNH.shape[1] // k_LKSH.shape[1]
    for lane, length in enumerate(lengths):
        for head in range(q_LNH.shape[1]):
            k_SH, v_SH = (np.asarray(x[lane, head // groups, :length], np.float64) for x in (k_LKSH, v_LKSH))
            scores = k_SH @ np.asarray(q_LNH[lane, head], np.float64) / q_LNH.shape[-1] ** 0.5
            weights = np.exp(scores - scores.max(initial=0.0))
            out[lane, head] = weights @ v_SH / weights.sum() if length else 0.0
    return out


def attend(kernel, tile, N, K, dtype=jnp.float32):
    q_LNH, k_LKSH, v_LKSH = rows(N, K)
    (k_pages, tables_LR), (v_pages, _) = paged(k_LKSH, tile), paged(v_LKSH, tile)
    lengths_L = jnp.asarray(LENGTHS, jnp.int32)
    attention = PagedAttention(tile) if kernel is None else KernelPagedAttention(kernel=kernel)
    typed_LNH, *pages = (x.astype(dtype) for x in (q_LNH, k_pages, v_pages))
    out = jax.jit(attention.attend)(typed_LNH, tuple(pages), Places(lengths_L - 1, lengths_L > 0, tables_LR))
    assert out.dtype == dtype
    return np.asarray(out, np.float32), plain_attention(q_LNH, k_LKSH, v_LKSH, LENGTHS)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("N", "K"), [(2, 2), (8, 2)])
def test_the_plain_way_equals_plain_attention(N, K, tile):
    ours, theirs = attend(None, TILES[tile], N, K)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize(("N", "K", "dtype", "atol"), [(8, 2, jnp.float32, 2e-6), (2, 2, jnp.bfloat16, 0.02)])
def test_the_triton_kernel_equals_plain_attention(N, K, dtype, atol):
    ours, theirs = attend(functools.partial(gpu.attend, interpret=True), HeadTile(), N, K, dtype)
    np.testing.assert_allclose(ours, theirs, atol=atol)


def test_tiles_come_back_as_they_were():
    x_KCH = jax.random.normal(jax.random.key(0), (4, 5, 16))
    for tile in (HeadTile(), HeadTile(2, 96), HeadTile(4, 64), HeadTile(1, 112)):
        packed = tile.pack(x_KCH)
        assert packed.shape == (4 // tile.heads, 5, tile.heads * 16 + tile.padding)
        np.testing.assert_array_equal(tile.unpack(packed), x_KCH)


def test_a_tpu_tile_fills_whole_rows_without_crossing_shards():
    assert tpu.tile_of(64, 16) == HeadTile(16, 0)
    assert tpu.tile_of(64, 3) == HeadTile(3, 64)
    assert tpu.tile_of(128, 8) == HeadTile(8, 0)
    assert tpu.tile_of(80, 8) == HeadTile(8, 0)


WAYS: dict[str, PagedAttention] = {
    "plain": PagedAttention(TILES["plain"]),
    "plain, pairs": PagedAttention(TILES["pairs"]),
    "triton": KernelPagedAttention(kernel=functools.partial(gpu.attend, interpret=True)),
    "tpu": tpu.TpuPagedAttention(TILES["pairs"]),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_step_writes_one_place_a_live_lane_and_sees_it(way):
    """Idle lanes only touch the trash page, and get zeros."""
    attention = WAYS[way]
    q_LNH, k_LKSH, v_LKSH = rows(4, 2)
    (k_pages, tables_LR), (v_pages, _) = (paged(x, attention.tile) for x in (k_LKSH, v_LKSH))
    lengths_L = jnp.asarray([min(length, ROW * PAGE - 1) for length in LENGTHS], jnp.int32)
    live_L = jnp.asarray([True, True, False, True, True, True])
    k_LKH, v_LKH = (draw[:, :, 0] + 1 for draw in (k_LKSH, v_LKSH))
    places = Places(lengths_L, live_L, tables_LR)
    view = PagedLanes((q_LNH,) * 2, PagedKVCache((k_pages,), (v_pages,)), places, attention)
    with pltpu.force_tpu_interpret_mode() if way == "tpu" else contextlib.nullcontext():
        out_LNH, successor = jax.jit(lambda view, *qkv: view.attend(0, *qkv))(view, q_LNH, k_LKH, v_LKH)
    lanes = jnp.arange(len(LENGTHS))
    k_LKSH, v_LKSH = (old.at[lanes, :, lengths_L].set(new) for old, new in ((k_LKSH, k_LKH), (v_LKSH, v_LKH)))
    expected = plain_attention(q_LNH, k_LKSH, v_LKSH, np.where(live_L, lengths_L + 1, 0))
    np.testing.assert_allclose(out_LNH, expected, atol=2e-6)
    unpack = attention.tile.unpack
    changed = np.asarray(unpack(successor.pages.keys[0]) != unpack(k_pages)).any(axis=(1, 3))
    pages_L, places_L = np.asarray(tables_LR)[lanes, lengths_L // PAGE], lengths_L % PAGE
    wrote = {(int(p), int(c)) for p, c, live in zip(pages_L, places_L, live_L, strict=True) if live}
    assert {(p, c) for p, c in np.argwhere(changed).tolist() if p} == wrote


@pytest.mark.parametrize("way", ["plain", "triton"])
def test_heads_are_mapped_over_the_mesh(way):
    """Inside a map over data, as the engine runs it: each device attends with its own heads."""
    q_LNH, k_LKSH, v_LKSH = rows(4, 2)
    (k_pages, tables_LR), (v_pages, _) = paged(k_LKSH, HeadTile()), paged(v_LKSH, HeadTile())
    lengths_L = jnp.asarray([min(length, ROW * PAGE - 1) for length in LENGTHS], jnp.int32)
    places = Places(lengths_L, lengths_L > 0, tables_LR)
    arguments = (q_LNH, k_LKSH[:, :, 0], v_LKSH[:, :, 0], (k_pages, v_pages), places)
    step, whole = WAYS[way], jax.sharding.PartitionSpec()
    mapped = jax.shard_map(
        step,
        mesh=make_mesh(MeshConfig(data=2, fsdp=1, tensor=2)),
        in_specs=whole,
        out_specs=whole,
        axis_names={"data"},
        check_vma=False,
    )
    made = (jax.tree.leaves(jax.jit(function)(*arguments)) for function in (mapped, step))
    for ours, theirs in zip(*made, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
