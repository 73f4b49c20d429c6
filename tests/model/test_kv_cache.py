"""Paged attention equals dense attention, and pages are written where they should be and nowhere else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.config import ModelConfig
from apr_jax.model.attention import self_attention
from apr_jax.model.kv_cache import (
    DecodeRows,
    DecodeView,
    PagedKVCache,
    PrefillView,
    Refresh,
    RowLayout,
    copy_pages,
    refresh_rows,
    write_rows,
)

PAGE, K, N, H, NUM_PAGES = 8, 2, 4, 16, 80
LAYOUT = RowLayout.of(300, PAGE)
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
    blocks = LAYOUT.blocks_for(jnp.max(jnp.asarray(lengths)))

    def attend(q_TNH, table, length, k, v):
        view = PrefillView(pages, table, (), length, blocks, LAYOUT)
        return view.attend(0, q_TNH, k, v, length + jnp.arange(PAGE))[0]

    new = [slice(int(length), int(length) + PAGE) for length in lengths]
    q, k_new, v_new = (jnp.stack([x[lane, new[lane]] for lane in range(5)]) for x in (QUERIES, keys, values))
    out = jax.jit(jax.vmap(attend))(q, jnp.asarray(tables), jnp.asarray(lengths), k_new, v_new)
    for lane, length in enumerate(lengths):
        np.testing.assert_allclose(out[lane], dense[lane, length : length + PAGE], atol=1e-5)


def refreshed(pages, tables, lengths):
    config = dataclasses.replace(CONFIG, num_layers=1)
    rows = jax.tree.map(lambda x: x[0] + 9.0, DecodeRows.create(config, 1, 5, LAYOUT))
    counts = np.zeros((LAYOUT.num_blocks,), np.int32)
    entries = np.zeros((LAYOUT.num_blocks, 5 * LAYOUT.pages_per_block, 3), np.int32)
    for lane, length in enumerate(lengths):
        for ordinal in range(-(-int(length) // PAGE)):
            block, place = divmod(ordinal, LAYOUT.pages_per_block)
            entries[block, counts[block]] = lane, place, tables[lane, ordinal]
            counts[block] += 1
    return refresh_rows(rows, pages, Refresh(jnp.asarray(counts), jnp.asarray(entries)), LAYOUT)


CONFIG = ModelConfig(
    vocab_size=8,
    num_layers=1,
    embed_dim=8,
    mlp_dim=8,
    num_heads=N,
    num_kv_heads=K,
    head_dim=H,
    max_seq_len=300,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tie_embeddings=True,
    compute_dtype="float32",
    attention="xla",
    remat=False,
)


def decode_steps(threads, steps, num_blocks):
    """`steps` positions of each thread, one after the other, from its row: outputs [L, steps, N, H] and the view."""
    keys, values, pages, tables, lengths = threads
    rows = refreshed(pages, tables, lengths)
    empty = jnp.zeros((5, K, steps, H))
    view = DecodeView(rows.blocks, ((empty, empty),), jnp.asarray(lengths), num_blocks, jnp.int32(0))
    axes = DecodeView(row=0, fresh=0, length=0, num_blocks=None, step=None)
    attend = jax.jit(
        jax.vmap(
            lambda view, q, k, v: view.attend(0, q, k, v, view.length[None] + view.step), (axes, 0, 0, 0), (0, axes)
        )
    )
    outs = []
    for step in range(steps):
        at = lengths + step
        q, k, v = (jnp.stack([x[lane, n][None] for lane, n in enumerate(at)]) for x in (QUERIES, keys, values))
        view = dataclasses.replace(view, step=jnp.int32(step))
        out, view = attend(view, q, k, v)
        outs.append(out[:, 0])
    return jnp.stack(outs, axis=1), view


def test_decode_equals_dense_and_is_written_back(threads, dense):
    keys, values, pages, tables, lengths = threads
    steps = 6
    out, view = decode_steps(threads, steps, LAYOUT.blocks_for(jnp.max(jnp.asarray(lengths))))
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


def test_blocks_beyond_a_thread_change_no_bit(threads):
    """Threads of one block or less get the same bits whether two or all blocks are visited."""
    few, _ = decode_steps(threads, 2, jnp.int32(2))
    every, _ = decode_steps(threads, 2, jnp.int32(LAYOUT.num_blocks))
    assert LAYOUT.num_blocks == 3
    assert few.tobytes() == every.tobytes()


def test_copies_are_made_in_order():
    pages = PagedKVCache((jnp.arange(5.0).reshape(5, 1, 1, 1),), (jnp.arange(5.0).reshape(5, 1, 1, 1),))
    copied = copy_pages(pages, jnp.asarray([1, 2, 0]), jnp.asarray([2, 3, 0]))
    assert copied.keys[0].ravel().tolist() == [0, 1, 1, 1, 4]
