"""The TPU's kernel of pages, in interpret mode on a CPU: it writes and attends as plain softmax attention does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from apr_jax.kernels.tpu import write_then_attend as tpu

pytestmark = pytest.mark.heavy

PAGE, ROW, H = 32, 4, 16


def case(K: int, G: int, Q: int, spans: list[tuple[int, int]], tables: list[list[int]], padding: int = 0):
    """Draw queries and new positions of lanes (start, count), and pages whose rows the tables name."""
    keys = jax.random.split(jax.random.key(0), 5)
    L, P = len(spans), 1 + max(map(max, tables))
    q = jax.random.normal(keys[0], (L, Q, K * G, H))
    k, v = (jax.random.normal(key, (L, Q, K, H)) for key in keys[1:3])
    heads = (jax.random.normal(key, (P, 1, PAGE, K * H)).astype(jnp.bfloat16) for key in keys[3:])
    pages = tuple(jnp.pad(each, ((0, 0), (0, 0), (0, 0), (0, padding))) for each in heads)
    starts, counts = (jnp.asarray(x, jnp.int32) for x in zip(*spans, strict=True))
    arrays = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    return *arrays, pages, starts, counts, jnp.asarray(tables, jnp.int32)


def plain(q_LQNH, k_LQKH, v_LQKH, pages, starts, counts, tables):
    """Write position after position and attend head after head, in NumPy. Return the outputs and the pages."""
    q, k, v, *pages = (np.array(x, np.float64) for x in (q_LQNH, k_LQKH, v_LQKH, *pages))
    (L, Q, N, _), K = q.shape, k.shape[2]
    places = [
        [(row, int(s) + j) for j in range(int(c)) for row in [(int(s) + j) % Q]]
        for s, c in zip(starts, counts, strict=True)
    ]
    for lane in range(L):
        for row, position in places[lane]:
            for whole, new in zip(pages, (k, v), strict=True):
                whole[tables[lane, position // PAGE], 0, position % PAGE, : K * H] = new[lane, row].reshape(-1)
    out = np.zeros(q.shape)
    for lane in range(L):
        k_SKH, v_SKH = (x[tables[lane], 0, :, : K * H].reshape(-1, K, H) for x in pages)
        for row, position in places[lane]:
            for n in range(N):
                scores = k_SKH[: position + 1, n * K // N] @ q[lane, row, n]
                weights = np.exp(scores - scores.max())
                out[lane, row, n] = weights @ v_SKH[: position + 1, n * K // N] / weights.sum()
    return out, pages, places


def check(arguments) -> None:
    before = [np.asarray(x, np.float32) for x in arguments[3]]
    with pltpu.force_tpu_interpret_mode():
        out, after = jax.jit(tpu.write_then_attend)(*arguments)
    expected, pages, places = plain(*arguments)
    for lane, each in enumerate(places):
        rows = [row for row, _ in each]
        np.testing.assert_allclose(np.asarray(out, np.float32)[lane, rows], expected[lane, rows], atol=0.03)
        if not each:
            assert not np.asarray(out)[lane].any()
    for ours, theirs, old in zip(after, pages, before, strict=True):
        np.testing.assert_array_equal(np.asarray(ours, np.float64), theirs)
        assert (np.asarray(ours) != old).any()


TABLES = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [9, 10, 13, 14], [15, 16, 17, 18]]


@pytest.mark.parametrize(("K", "G", "padding"), [(2, 1, 96), (8, 2, 0)])
def test_a_decode_step_equals_plain_attention(K, G, padding, monkeypatch):
    """Lanes that see one position, a page's last, all of a row, shared pages, and nothing; blocks of two pages."""
    monkeypatch.setattr(tpu, "_BLOCK_BYTES", 2 * PAGE * (K * H + padding) * 2)
    check(case(K, G, 1, [(0, 1), (PAGE - 1, 1), (ROW * PAGE - 1, 1), (2 * PAGE + 3, 1), (5, 0)], TABLES, padding))


@pytest.mark.parametrize(("K", "G"), [(8, 2)])
def test_a_prefill_equals_plain_attention(K, G, monkeypatch):
    """Lanes that are neighbours in a row among them: all write before any attends."""
    monkeypatch.setattr(tpu, "_BLOCK_BYTES", 2 * PAGE * K * H * 2)
    tables = [TABLES[0], TABLES[0], TABLES[0], TABLES[1], TABLES[2]]
    check(case(K, G, tpu.UNIT, [(37, 11), (48, 16), (64, 5), (0, 9), (7, 0)], tables))


@pytest.mark.slow
def test_more_lanes_than_stages_and_slots():
    tables = [[1 + 4 * lane + page for page in range(4)] for lane in range(40)]
    check(case(8, 1, 1, [((lane * 7) % 128, int(lane % 5 != 2)) for lane in range(40)], tables))
