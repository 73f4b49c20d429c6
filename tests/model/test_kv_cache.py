"""Paged attention equals dense attention, and pages are written where they should be and nowhere else."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.model import kv_cache
from apr_jax.model.attention import self_attention
from apr_jax.model.kv_cache import (
    DecodeView,
    PagedKVCache,
    PrefillView,
    RowBuffers,
    RowLayout,
    copy_pages,
    pack_rows,
    write_rows,
)

pytestmark = pytest.mark.heavy

PAGE, K, N, H, NUM_PAGES = 8, 2, 4, 16, 80
LAYOUT = RowLayout.of(300, PAGE)
CONFIG = types.SimpleNamespace(num_layers=1, num_kv_heads=K, head_dim=H, compute_dtype="float32")
LENGTHS = (0, 5, 130, 256, 16)


def draws(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def threads():
    """Keys and values of five threads `[L, 300, K, H]`, and a layer of pages that holds their first positions."""
    keys, values = draws(1, 5, 300, K, H), draws(2, 5, 300, K, H)
    pages = PagedKVCache((jnp.zeros((NUM_PAGES, K, PAGE, H)),), (jnp.zeros((NUM_PAGES, K, PAGE, H)),))
    tables = np.zeros((5, LAYOUT.pages_per_row), np.int32)
    free = iter(np.random.default_rng(3).permutation(np.arange(1, NUM_PAGES)))
    for lane, length in enumerate(LENGTHS[:-1]):
        count = -(-(length + 2 * PAGE) // PAGE)
        tables[lane, :count] = [next(free) for _ in range(count)]
    tables[4, :2] = tables[3, :2]  # a shared prefix; the fifth thread holds 16 positions
    tables[4, 2:5] = [next(free) for _ in range(3)]
    keys, values = keys.at[4, :16].set(keys[3, :16]), values.at[4, :16].set(values[3, :16])
    lengths = np.asarray(LENGTHS, np.int32)
    fresh = ((jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)),)
    pages = write_rows(pages, jnp.asarray(tables), jnp.zeros(5, jnp.int32), jnp.asarray(lengths), fresh, 38)
    return keys, values, pages, tables, lengths


QUERIES = draws(4, 5, 300, N, H)


@pytest.fixture(scope="module")
def dense(threads):
    """Dense causal attention of every position of the threads, [L, 300, N, H]."""
    keys, values, *_ = threads
    return np.asarray(self_attention(QUERIES, keys, values, segment_ids_BT=None, impl="xla"))


def test_prefill_equals_dense(threads, dense):
    keys, values, pages, tables, lengths = threads
    spans = LAYOUT.spans_for(jnp.max(jnp.asarray(lengths)))

    def attend(q_TNH, table, length, k, v):
        view = PrefillView(pages, table, (), length, spans, LAYOUT)
        return view.attend(0, q_TNH, k, v, length + jnp.arange(PAGE))[0]

    new = [slice(int(length), int(length) + PAGE) for length in lengths]
    q, k_new, v_new = (jnp.stack([x[lane, new[lane]] for lane in range(5)]) for x in (QUERIES, keys, values))
    out = jax.jit(jax.vmap(attend))(q, jnp.asarray(tables), jnp.asarray(lengths), k_new, v_new)
    for lane, length in enumerate(lengths):
        np.testing.assert_allclose(out[lane], dense[lane, length : length + PAGE], atol=1e-5)


VIEW_AXES = DecodeView(rows=None, own_B=0, fresh=0, length=0, step=None)


@functools.cache
def compiled(lanes, large_chunk):
    """`pack_rows`, and `DecodeView.attend` for all lanes and for one thread, traced anew for each chunk size."""
    assert large_chunk == kv_cache.LARGE_CHUNK

    def pack(pages, tables, lengths):
        buffers = jax.tree.map(lambda x: x[0], RowBuffers.create(CONFIG, 1, LAYOUT, 5 * LAYOUT.num_blocks, lanes))
        return pack_rows(buffers, pages, tables, lengths, LAYOUT)

    def attend(view, q, k, v):
        return view.attend(0, q, k, v, view.length[None] + view.step)

    return jax.jit(pack), jax.jit(jax.vmap(attend, (VIEW_AXES, 0, 0, 0), (0, VIEW_AXES))), jax.jit(attend)


def decode_steps(threads, steps, lanes=range(5)):
    """`steps` positions of each thread, one after the other, from its row: outputs [L, steps, N, H] and the view.

    Lanes outside of `lanes` are idle: their rows hold nothing.
    """
    *_, pages, tables, lengths = threads
    lengths = np.where(np.isin(np.arange(5), list(lanes)), lengths, 0)
    pack, attend, _ = compiled(*chunking())
    rows, own_LB = pack(pages, tables, jnp.asarray(lengths))
    empty = jnp.zeros((5, K, steps, H))
    view = DecodeView(rows, own_LB, ((empty, empty),), jnp.asarray(lengths), jnp.int32(0))
    outs = []
    for step in range(steps):
        view = dataclasses.replace(view, step=jnp.int32(step))
        out, view = attend(view, *new_positions(threads, lengths + step))
        outs.append(out[:, 0])
    return np.asarray(jnp.stack(outs, axis=1)), view


def new_positions(threads, at):
    """Queries, keys and values [L, 1, .., H] of one position of each thread."""
    keys, values, *_ = threads
    return (jnp.stack([x[lane, n][None] for lane, n in enumerate(at)]) for x in (QUERIES, keys, values))


MANY_CHUNKS = [2, 2, 4, 4, 4, 4, 4, 1]


def chunking():
    """Lanes and the large chunk's entries, which decide how the entries are cut into chunks."""
    return (5 if kv_cache.LARGE_CHUNK > 4 else 2), kv_cache.LARGE_CHUNK


@pytest.fixture
def many_chunks(monkeypatch):
    """`MANY_CHUNKS`: the threads' nine entries fill three and a bit of eight."""
    monkeypatch.setattr(kv_cache, "LARGE_CHUNK", 4)


def test_chunks_grow_with_the_list():
    assert kv_cache.chunk_sizes(64, 1) == [2, 2, 4, 8, 16, 32]
    assert kv_cache.chunk_sizes(96, 32) == [32, 32, 32]
    assert kv_cache.chunk_sizes(20, 8) == [8, 8, 4]
    assert kv_cache.chunk_sizes(1, 8) == [1]
    for entries in range(1, 3000, 37):
        for lanes in (1, 3, 8, 64):
            sizes = kv_cache.chunk_sizes(entries, lanes)
            assert sum(sizes) == entries
            assert len(sizes) <= kv_cache.MAX_LARGE_CHUNKS + 8  # as often as the size may double


def check_decode(threads, dense, chunks):
    keys, values, pages, tables, lengths = threads
    steps = 6
    out, view = decode_steps(threads, steps)
    assert [len(k) for k, _ in view.rows.buffers.layers[0]] == chunks
    for lane, length in enumerate(lengths):
        np.testing.assert_allclose(out[lane], dense[lane, length : length + steps], atol=1e-5)
    counts = np.asarray([6, 3, 0, 6, 1], np.int32)
    written = write_rows(pages, jnp.asarray(tables), jnp.asarray(lengths), jnp.asarray(counts), view.fresh, 2)
    new_keys, new_values = np.asarray(written.keys[0]), np.asarray(written.values[0])
    for lane, count in enumerate(counts):
        for position in range(lengths[lane] + count):
            page, place = tables[lane, position // PAGE], position % PAGE
            np.testing.assert_array_equal(new_keys[page, :, place], np.asarray(keys)[lane, position])
            np.testing.assert_array_equal(new_values[page, :, place], np.asarray(values)[lane, position])
    touched = {
        tables[lane, p // PAGE] for lane, c in enumerate(counts) for p in range(lengths[lane], lengths[lane] + int(c))
    }
    same = (new_keys == np.asarray(pages.keys[0])).all(axis=(1, 2, 3))
    assert set(np.flatnonzero(~same)) <= touched | {0}


def test_decode_equals_dense_and_is_written_back(threads, dense):
    check_decode(threads, dense, chunks=[5, 5, 10, 5])


@pytest.mark.usefixtures("many_chunks")
def test_decode_from_many_chunks_equals_dense_and_is_written_back(threads, dense):
    check_decode(threads, dense, chunks=MANY_CHUNKS)


@pytest.mark.usefixtures("many_chunks")
def test_packed_entries_are_the_filled_blocks(threads):
    """Entries are the lanes' blocks in order, hold their pages' contents, and nothing behind the last is copied."""
    keys, values, pages, tables, lengths = threads
    rows, own_LB = compiled(*chunking())[0](pages, tables, jnp.asarray(lengths))
    blocks = [(lane, start) for lane, n in enumerate(lengths) for start in range(0, n, LAYOUT.block_size)]
    assert int(rows.num_entries) == len(blocks) == 9
    assert [len(k) for k, _ in rows.buffers.layers[0]] == MANY_CHUNKS
    stored = [np.concatenate([np.asarray(chunk[kind]) for chunk in rows.buffers.layers[0]]) for kind in range(2)]
    for entry, (lane, start) in enumerate(blocks):
        held = min(lengths[lane] - start, LAYOUT.block_size)
        assert (rows.lane_E[entry], rows.length_E[entry]) == (lane, held)
        assert own_LB[lane, start // LAYOUT.block_size] == entry
        for packed, source in zip(stored, (keys, values), strict=True):
            expected = np.asarray(source)[lane, start : start + held].swapaxes(0, 1)
            np.testing.assert_array_equal(packed[entry, :, :held], expected)
    assert not rows.length_E[len(blocks) :].any()
    assert not any(packed[len(blocks) :].any() for packed in stored)
    assert int((own_LB == len(rows.lane_E)).sum()) == own_LB.size - len(blocks)


@pytest.mark.usefixtures("many_chunks")
@pytest.mark.parametrize("lanes", [(0, 1, 4), (2, 4), (3,), (1, 2)])
def test_neighbours_entries_change_no_bit(threads, lanes):
    """A thread gets the same bits with long neighbours and with none, wherever among the chunks its entries lie."""
    together, _ = decode_steps(threads, 2)
    apart, view = decode_steps(threads, 2, lanes)
    assert [len(k) for k, _ in view.rows.buffers.layers[0]] == MANY_CHUNKS
    for lane in lanes:
        assert together[lane].tobytes() == apart[lane].tobytes()


@pytest.mark.usefixtures("many_chunks")
def test_one_thread_equals_its_lane(threads):
    """The view of one thread is complete by itself: not lifted, it computes what it computes as one of many lanes."""
    *_, pages, tables, lengths = threads
    lifted, _ = decode_steps(threads, 1)
    pack, _, attend = compiled(*chunking())
    rows, own_LB = pack(pages, tables, jnp.asarray(lengths))
    q, k, v = new_positions(threads, lengths)
    for lane, length in enumerate(lengths):
        empty = jnp.zeros((K, 1, H))
        view = DecodeView(rows, own_LB[lane], ((empty, empty),), jnp.int32(length), jnp.int32(0))
        out, _ = attend(view, q[lane], k[lane], v[lane])
        np.testing.assert_allclose(out[0], lifted[lane, 0], atol=1e-6)


def test_copies_are_made_in_order():
    pages = PagedKVCache((jnp.arange(5.0).reshape(5, 1, 1, 1),), (jnp.arange(5.0).reshape(5, 1, 1, 1),))
    copied = copy_pages(pages, jnp.asarray([1, 2, 0]), jnp.asarray([2, 3, 0]))
    assert copied.keys[0].ravel().tolist() == [0, 1, 1, 1, 4]
