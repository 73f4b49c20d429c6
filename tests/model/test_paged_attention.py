"""Every paged kernel equals plain softmax attention over the row that its table names.

Both kernels run on a CPU: Triton's in Pallas' plain interpret mode, the TPU's in `pltpu.force_tpu_interpret_mode`,
which simulates its copies from HBM.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from apr_jax.config import ConfigError, MeshConfig
from apr_jax.model import native
from apr_jax.model import paged_attention as module
from apr_jax.model.kv_cache import PagedKVCache
from apr_jax.model.paged_attention import HeadTile, check_page_size, choose_impl, paged_attention, write_then_attend
from apr_jax.model.paged_view import PagedView
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


def attend(impl, tile, N, K, dtype=jnp.float32):
    q_LNH, k_LKSH, v_LKSH = rows(N, K)
    (k_pages, tables_LR), (v_pages, _) = paged(k_LKSH, tile), paged(v_LKSH, tile)
    attention = functools.partial(paged_attention, impl=impl, tile=tile, interpret=True)
    arguments = [x.astype(dtype) for x in (q_LNH, k_pages, v_pages)]
    out = jax.jit(attention)(*arguments, jnp.asarray(LENGTHS, jnp.int32), tables_LR)
    assert out.dtype == dtype
    return np.asarray(out, np.float32), plain_attention(q_LNH, k_LKSH, v_LKSH, LENGTHS)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("N", "K"), [(2, 2), (8, 2)])
def test_the_reference_equals_plain_attention(N, K, tile):
    ours, theirs = attend("xla", TILES[tile], N, K)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize(("N", "K", "dtype", "atol"), [(8, 2, jnp.float32, 2e-6), (2, 2, jnp.bfloat16, 0.02)])
def test_the_triton_kernel_equals_plain_attention(N, K, dtype, atol):
    ours, theirs = attend("gpu", HeadTile(), N, K, dtype)
    np.testing.assert_allclose(ours, theirs, atol=atol)


@pytest.mark.parametrize(("N", "K", "tile"), [(8, 2, "pairs"), (3, 3, "padded")])
def test_the_tpu_kernel_equals_plain_attention(N, K, tile, monkeypatch):
    """Its keys and values are bfloat16 inside, which these are exactly. Two calls: four lanes' tables, then two's."""
    monkeypatch.setattr(module, "_TPU_TABLE_BYTES", 4 * 4 * (K // TILES[tile].heads) * ROW)
    with pltpu.force_tpu_interpret_mode():
        ours, theirs = attend("tpu", TILES[tile], N, K)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_tiles_come_back_as_they_were():
    x_KCH = jax.random.normal(jax.random.key(0), (4, 5, 16))
    for tile in (HeadTile(), HeadTile(2, 96), HeadTile(4, 64), HeadTile(1, 112)):
        packed = tile.pack(x_KCH)
        assert packed.shape == (4 // tile.heads, 5, tile.heads * 16 + tile.padding)
        np.testing.assert_array_equal(tile.unpack(packed), x_KCH)


def test_a_tpu_tile_fills_whole_rows_without_crossing_shards():
    assert HeadTile.of("gpu", 64, 16) == HeadTile()
    assert HeadTile.of("tpu", 64, 16) == HeadTile(2, 0)
    assert HeadTile.of("tpu", 64, 3) == HeadTile(1, 64)
    assert HeadTile.of("tpu", 32, 2) == HeadTile(2, 64)
    assert HeadTile.of("tpu", 128, 8) == HeadTile(1, 0)
    assert HeadTile.of("tpu", 256, 8) == HeadTile(1, 0)
    assert HeadTile.of("tpu", 80, 8) == HeadTile(1, 48)


@pytest.mark.parametrize("tile", ["plain", "pairs"])
def test_a_step_writes_one_place_a_live_lane_and_sees_it(tile):
    """Lifted over lanes: what a thread alone gets, on shared pages, and idle lanes only touch the trash page."""
    tile = TILES[tile]
    q_LNH, k_LKSH, v_LKSH = rows(4, 2)
    (k_pages, tables_LR), (v_pages, _) = paged(k_LKSH, tile), paged(v_LKSH, tile)
    lengths_L = jnp.asarray([min(length, ROW * PAGE - 1) for length in LENGTHS], jnp.int32)
    live_L = jnp.asarray([True, True, False, True, True, True])
    k_LKH, v_LKH = (draw[:, :, 0] + 1 for draw in (k_LKSH, v_LKSH))
    view = PagedView(PagedKVCache((k_pages,), (v_pages,)), tables_LR, lengths_L - 1, jnp.int32(1), live_L, "xla", tile)
    axes = PagedView(None, 0, 0, None, 0, "xla", tile)

    def step(view, q_NH, k_KH, v_KH):
        out_TNH, successor = view.attend(0, q_NH[None], k_KH[None], v_KH[None], (view.length + view.step)[None])
        return out_TNH[0], successor.carried

    lifted = jax.jit(jax.vmap(step, in_axes=(axes, 0, 0, 0), out_axes=(0, None)))
    out_LNH, pages = lifted(view, q_LNH, k_LKH, v_LKH)
    lanes = jnp.arange(len(LENGTHS))
    k_LKSH, v_LKSH = (old.at[lanes, :, lengths_L].set(new) for old, new in ((k_LKSH, k_LKH), (v_LKSH, v_LKH)))
    expected = plain_attention(q_LNH, k_LKSH, v_LKSH, np.where(live_L, lengths_L + 1, 0))
    np.testing.assert_allclose(out_LNH, expected, atol=2e-6)
    alone, _ = jax.jit(step)(view_of(view, 3), q_LNH[3], k_LKH[3], v_LKH[3])
    np.testing.assert_allclose(alone, expected[3], atol=2e-6)
    changed = np.asarray(tile.unpack(pages.keys[0]) != tile.unpack(k_pages)).any(axis=(1, 3))
    pages_L, places_L = np.asarray(tables_LR)[lanes, lengths_L // PAGE], lengths_L % PAGE
    wrote = {(int(p), int(c)) for p, c, live in zip(pages_L, places_L, live_L, strict=True) if live}
    assert {(p, c) for p, c in np.argwhere(changed).tolist() if p} == wrote


def view_of(view, lane):
    return PagedView(
        view.pages, view.table_R[lane], view.length[lane], view.step, view.live[lane], view.impl, view.tile
    )


def test_heads_are_mapped_over_the_mesh():
    """Inside a map over data, as the engine runs it: each device attends with its own heads."""
    q_LNH, k_LKSH, v_LKSH = rows(4, 2)
    (k_pages, tables_LR), (v_pages, _) = paged(k_LKSH, HeadTile()), paged(v_LKSH, HeadTile())
    lengths_L = jnp.asarray([min(length, ROW * PAGE - 1) for length in LENGTHS], jnp.int32)
    arguments = (q_LNH, k_LKSH[:, :, 0], v_LKSH[:, :, 0], k_pages, v_pages, lengths_L, lengths_L > 0, tables_LR)
    step = functools.partial(write_then_attend, impl="xla", tile=HeadTile())
    whole = jax.sharding.PartitionSpec()
    mapped = jax.shard_map(
        step,
        mesh=make_mesh(MeshConfig(data=2, fsdp=1, tensor=2)),
        in_specs=whole,
        out_specs=whole,
        axis_names={"data"},
        check_vma=False,
    )
    for ours, theirs in zip(jax.jit(mapped)(*arguments), jax.jit(step)(*arguments), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_what_auto_means():
    for dtype in ("float32", "bfloat16"):
        assert choose_impl("auto", "cpu", dtype) == ("cpu" if native.is_available() else "packed")
        assert choose_impl("paged", "cpu", dtype) == ("cpu" if native.is_available() else "xla")
    assert [choose_impl("auto", platform, "bfloat16") for platform in ("tpu", "gpu", "cuda")] == ["tpu", "gpu", "gpu"]
    assert choose_impl("auto", "tpu", "float32") == "packed"
    assert choose_impl("paged", "tpu", "float32") == "xla"
    assert choose_impl("packed", "tpu", "bfloat16") == "packed"


def test_pages_that_a_kernel_cannot_take_are_refused():
    for impl, page_size in (("packed", 5), ("xla", 5), ("tpu", 24), ("gpu", 32)):
        check_page_size(impl, page_size)
    for impl, page_size in (("tpu", 12), ("gpu", 48), ("gpu", 8)):
        with pytest.raises(ConfigError, match=f"engine.page_size={page_size}"):
            check_page_size(impl, page_size)
