"""Views of pages equal dense attention, and pages are written where they should be and nowhere else."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.model.attention import xla_attention
from apr_jax.model.head_tile import PLAIN
from apr_jax.model.paged_attention import PagedAttention, Places
from apr_jax.model.paged_cache import PagedKVCache, copy_pages, pages_per_row, write_rows
from apr_jax.model.views.decode import paged_lanes
from apr_jax.model.views.prefill import prefill_rows

pytestmark = pytest.mark.heavy
PAGE, K, N, H, NUM_PAGES = 8, 2, 4, 16, 80
CONFIG = types.SimpleNamespace(
    num_layers=1, num_kv_heads=K, head_dim=H, compute_dtype="float32", rope_theta=1e4, rope_scaling=None
)
LENGTHS = (0, 5, 130, 256, 16)


def draws(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def threads():
    """Keys and values of five threads `[L, 300, K, H]`, and a layer of pages that holds their first positions."""
    keys, values = draws(1, 5, 300, K, H), draws(2, 5, 300, K, H)
    pages = PagedKVCache((jnp.zeros((NUM_PAGES, K, PAGE, H)),), (jnp.zeros((NUM_PAGES, K, PAGE, H)),))
    tables = np.zeros((5, pages_per_row(300, PAGE)), np.int32)
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
    return np.asarray(xla_attention(QUERIES, keys, values, jnp.ones((5, 300), jnp.int32)))


def test_prefill_equals_dense(threads, dense):
    keys, values, pages, tables, lengths = threads
    view = prefill_rows(CONFIG, pages, jnp.asarray(lengths), jnp.asarray(tables), PAGE, PLAIN)
    new = [slice(int(length), int(length) + PAGE) for length in lengths]
    q, k_new, v_new = (jnp.stack([x[lane, new[lane]] for lane in range(5)]) for x in (QUERIES, keys, values))
    out, view = jax.jit(lambda view, *qkv: view.attend(0, *qkv))(view, q, k_new, v_new)
    for lane, length in enumerate(lengths):
        np.testing.assert_allclose(out[lane], dense[lane, length : length + PAGE], atol=1e-5)
    np.testing.assert_array_equal(view.fresh[0][0], jnp.swapaxes(k_new, 1, 2))


@jax.jit
def attend(view, q, k, v):
    return view.attend(0, q, k, v)


def decode_steps(threads, counts):
    """`counts` positions of each thread, one after the other, from its row: outputs [L, steps, N, H] and the pages.

    A lane that has its count is idle.
    """
    keys, values, pages, tables, lengths = threads
    outs = []
    for step in range(max(counts)):
        live, at = step < np.asarray(counts), lengths + step
        places = Places(*map(jnp.asarray, (at, live, tables)))
        view = paged_lanes(CONFIG, pages, places, PagedAttention())
        q, k, v = (jnp.stack([x[lane, n] for lane, n in enumerate(at)]) for x in (QUERIES, keys, values))
        out, view = attend(view, q, k, v)
        pages = view.pages
        outs.append(out)
    return np.asarray(jnp.stack(outs, axis=1)), pages


def test_decode_equals_dense_and_is_written_back(threads, dense):
    keys, values, pages, tables, lengths = threads
    counts = np.asarray([6, 3, 0, 6, 1], np.int32)
    out, written = decode_steps(threads, counts)
    new_keys, new_values = np.asarray(written.keys[0]), np.asarray(written.values[0])
    for lane, count in enumerate(counts):
        np.testing.assert_allclose(out[lane, :count], dense[lane, lengths[lane] : lengths[lane] + count], atol=1e-5)
        np.testing.assert_array_equal(out[lane, count:], 0)
        for position in range(lengths[lane] + count):
            page, place = tables[lane, position // PAGE], position % PAGE
            np.testing.assert_array_equal(new_keys[page, :, place], np.asarray(keys)[lane, position])
            np.testing.assert_array_equal(new_values[page, :, place], np.asarray(values)[lane, position])
    touched = {
        tables[lane, p // PAGE] for lane, c in enumerate(counts) for p in range(lengths[lane], lengths[lane] + int(c))
    }
    same = (new_keys == np.asarray(pages.keys[0])).all(axis=(1, 2, 3))
    assert set(np.flatnonzero(~same)) <= touched | {0}


@pytest.mark.parametrize("lanes", [(0, 1, 4), (2, 4), (3,), (1, 2)])
def test_neighbours_change_no_bit(threads, lanes):
    """A thread gets the same bits with long neighbours and with none."""
    together, _ = decode_steps(threads, [2] * 5)
    apart, _ = decode_steps(threads, [2 * (lane in lanes) for lane in range(5)])
    for lane in lanes:
        assert together[lane].tobytes() == apart[lane].tobytes()


def test_rows_are_written_where_their_tables_say(threads):
    """Several pages of a row at once, from the middle of a page on; nothing else changes."""
    keys, values, pages, tables, lengths = threads
    counts = np.asarray([6, 3, 0, 6, 1], np.int32)
    spans = [slice(int(n), int(n) + 6) for n in lengths]
    fresh = tuple(jnp.stack([jnp.swapaxes(x[lane, spans[lane]], 0, 1) for lane in range(5)]) for x in (keys, values))
    written = write_rows(pages, jnp.asarray(tables), jnp.asarray(lengths), jnp.asarray(counts), (fresh,), 2)
    _, expected = decode_steps(threads, counts)
    for ours, theirs in zip(jax.tree.leaves(written), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours[1:], theirs[1:])


def test_a_row_has_whole_spans():
    assert pages_per_row(300, 8) == 40
    assert pages_per_row(512, 16) == 32
    assert pages_per_row(4096, 64) == 64
    assert pages_per_row(96, 200) == 1


def test_copies_are_made_in_order():
    pages = PagedKVCache((jnp.arange(5.0).reshape(5, 1, 1, 1),), (jnp.arange(5.0).reshape(5, 1, 1, 1),))
    copied = copy_pages(pages, jnp.asarray([1, 2, 0]), jnp.asarray([2, 3, 0]))
    assert copied.keys[0].ravel().tolist() == [0, 1, 1, 1, 4]
