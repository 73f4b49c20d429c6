"""Causal self-attention within segments: one interface, a kernel per backend behind it.

A segment is one sequence, or several that begin alike and have what is common once (`data/prefixes.py`): its tokens say
how far they reach, and what comes after the end of a branch does not see that branch.

`cpu` and `windows` skip what segments and causality exclude, on CPUs: by kernels of our own, float32
(`cpu_attention.py`), and as far as XLA makes it so (`window_attention.py`). `xla` runs anywhere, in blocks of queries,
so that neither the scores of a whole row nor their gradient ever exist. Blocks of keys to the right of the diagonal are
never computed. XLA runs unrolled blocks at once where it can, which costs memory; rows above 1,024 tokens are therefore
loops over blocks, and their memory is O(block * T): forward and backward at T=4096, N=4, H=16 take 48 MB of
temporaries, and 808 MB without blocks. `splash` is the Pallas kernel that JAX ships for TPU, `cudnn` NVIDIA's flash
attention. The letters of shapes are in `llama.py`.

Measured, forward and backward of one layer in ms on two CPU cores (B=8, T=512, N=K=3, H=64, float32; minima of 8 to 12
runs; in brackets with glibc's malloc told to keep its memory):

    masked softmax over the whole row                       68 (68)
    jax.nn.dot_product_attention                            92
    query blocks, probabilities kept       64: 54           128: 47 (37)    256: 54
    query blocks, jax.checkpoint           64: 48 (36)      128: 50         256: 57
    query blocks, hand-written backward    64: 49 (44)      128: 52 (37)    256: 60
    key blocks in the backward             64: 58           128: 57 (56)    256: 58

At T=512, N=2 the two that recompute were within 7 % of each other, so the shorter one is here.

On packed rows of the laptop run (5 segments a row, B=8, two devices), CPU time of forward and backward, the least of 25
runs in ms: `xla` 85; `windows` with query blocks of 32 and windows rounded up to every 32 tokens 28, to 1, 2, 3, 4, 6,
8, .. blocks (which compiles in half of the time) 32; blocks of 64: 33; of 128: 37 to 42; heads moved to the front once
for the whole row 33; every product without a transposed operand, which costs transposed copies of whole rows, 34 to 37.
One device's half of it, in turns in one process: `windows` 18, `cpu` 8.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from apr_jax.config import ConfigError
from apr_jax.model import cpu_attention
from apr_jax.model.window_attention import Seen, named, window_attention
from apr_jax.parallel.mesh import BATCH_AXES, TENSOR_AXIS, over_mesh, partition_spec

_MASKED = -1e30  # finite: a masked score never makes a NaN
_XLA_BLOCK = 128
_XLA_UNROLLED = 1024  # up to this length every block is unrolled
_XLA_SPANS = 8  # a longer row is that many spans of queries, each a loop over its blocks
_SPLASH_LANES = 128


def self_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    segment_ids_BT: jax.Array | None,
    reach_BT: jax.Array | None = None,
    impl: str = "auto",
) -> jax.Array:
    """Softmax attention to the earlier tokens of a query's own segment, itself included; scores scaled by 1/sqrt(H).

    Args:
        q_BTNH, k_BTKH, v_BTKH: RoPE applied; query head n reads key/value head n // G.
        segment_ids_BT: int32, tokens of a row with one id lie side by side and see each other. None: the row is one
            segment.
        reach_BT: int32, how many tokens see this one, from itself on. None: all later ones of the segment.
        impl: "cpu" (float32, a C++ compiler), "windows" (CPU), "xla", "splash" (TPU), "cudnn" (GPU, bfloat16) or
            "auto", the best that the default backend has.

    Returns:
        `[B, T, N, H]` in the dtype of the queries. Scores and softmax are float32.

    Raises:
        ValueError: shapes do not fit together, or `impl` is none of these.
        ConfigError: "cudnn" was asked for with float32, "cpu" where it cannot be, or "splash" with `reach_BT`.
    """
    (B, T, N, H), K = q_BTNH.shape, k_BTKH.shape[2]
    if k_BTKH.shape != (B, T, K, H) or v_BTKH.shape != k_BTKH.shape or N % K:
        raise ValueError(f"queries {q_BTNH.shape}, keys {k_BTKH.shape} and values {v_BTKH.shape} do not fit together")
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones((B, T), jnp.int32)
    if segment_ids_BT.shape != (B, T):
        raise ValueError(f"segment ids {segment_ids_BT.shape} for queries {q_BTNH.shape}")
    if reach_BT is not None and reach_BT.shape != (B, T):
        raise ValueError(f"reach {reach_BT.shape} for queries {q_BTNH.shape}")
    ends_BT = None if reach_BT is None else jnp.arange(T, dtype=jnp.int32)[None] + reach_BT
    if impl == "auto":
        impl = choose_impl(jax.default_backend(), q_BTNH.dtype, H)
    if impl not in _KERNELS:
        raise ValueError(f"attention {impl!r}: choose one of {', '.join(map(repr, _KERNELS))} or 'auto'")
    out_BTNH: jax.Array = named(_KERNELS[impl](q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, ends_BT))
    return out_BTNH


def choose_impl(backend: str, dtype: jnp.dtype, head_dim: int) -> str:
    """What "auto" means on a backend: on a CPU "cpu" where it can be, else "windows"; on a TPU "splash"; on a GPU
    "cudnn" where it can be, else "xla".
    """
    if backend == "cpu":
        return "cpu" if cpu_attention.is_possible(dtype, head_dim) else "windows"
    if backend == "tpu":
        return "splash"
    if backend == "gpu" and dtype == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= 128:
        return "cudnn"
    return "xla"


def takes_branches(impl: str, backend: str, dtype: jnp.dtype, head_dim: int) -> bool:
    """Whether `impl` (or what "auto" means on a backend) can have segments with branches: all but splash can."""
    return (choose_impl(backend, dtype, head_dim) if impl == "auto" else impl) != "splash"


def xla_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    ends_BT: jax.Array | None = None,
) -> jax.Array:
    """Blocks of queries against the keys up to the block's end, recomputed block by block in the backward pass."""
    (B, T, N, H), K = q_BTNH.shape, k_BTKH.shape[2]
    q_BKGTH = jnp.moveaxis((q_BTNH * (1 / math.sqrt(H))).reshape(B, T, K, N // K, H), 1, 3)
    k_BKSH, v_BKSH = jnp.swapaxes(k_BTKH, 1, 2), jnp.swapaxes(v_BTKH, 1, 2)
    span = _XLA_BLOCK if T <= _XLA_UNROLLED else _round_up(-(-T // _XLA_SPANS), _XLA_BLOCK)
    outs = []
    for start in range(0, T, span):
        end = min(start + span, T)
        ids_BT = segment_ids_BT[:, start:end]
        seen = (segment_ids_BT[:, :end], None if ends_BT is None else ends_BT[:, :end])
        outs.append(_attend_span(q_BKGTH[:, :, :, start:end], k_BKSH[:, :, :end], v_BKSH[:, :, :end], ids_BT, seen))
    out_BKGTH = jnp.concatenate(outs, axis=3)
    return jnp.moveaxis(out_BKGTH, 3, 1).reshape(B, T, N, H)


def _attend_span(q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, ids_BT: jax.Array, seen: Seen) -> jax.Array:
    """The last T of S positions as queries: one block, or several in a loop."""
    (B, K, G, T, H), S = q_BKGTH.shape, k_BKSH.shape[2]
    if T <= _XLA_BLOCK:
        return jax.checkpoint(_attend_block)(q_BKGTH, k_BKSH, v_BKSH, ids_BT, seen, S - T)
    count = -(-T // _XLA_BLOCK)
    length = count * _XLA_BLOCK
    q_BKGCTH = _pad(q_BKGTH, length, axis=3).reshape(B, K, G, count, _XLA_BLOCK, H)
    ids_BCT = _pad(ids_BT, length).reshape(B, count, _XLA_BLOCK)
    starts_C = S - T + _XLA_BLOCK * jnp.arange(count)

    @jax.checkpoint
    def attend(block: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q_BKGTH, ids_BT, start = block
        return _attend_block(q_BKGTH, k_BKSH, v_BKSH, ids_BT, seen, start)

    out_CBKGTH = jax.lax.map(attend, (jnp.moveaxis(q_BKGCTH, 3, 0), jnp.moveaxis(ids_BCT, 1, 0), starts_C))
    return jnp.moveaxis(out_CBKGTH, 0, 3).reshape(B, K, G, length, H)[:, :, :, :T]


def _attend_block(
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    ids_BT: jax.Array,
    seen: Seen,
    start: int | jax.Array,
) -> jax.Array:
    (ids_BS, ends_BS), T = seen, ids_BT.shape[1]
    times_T1 = start + jnp.arange(T)[:, None]
    causal_TS = jnp.arange(ids_BS.shape[1])[None, :] <= times_T1
    visible_BTS = causal_TS[None] & (ids_BT[:, :, None] == ids_BS[:, None, :])
    if ends_BS is not None:
        visible_BTS &= times_T1[None] < ends_BS[:, None, :]
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
    scores = jnp.where(visible_BTS[:, None, None], scores, _MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32)
    return (out / total).astype(q_BKGTH.dtype)


def splash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    ends_BT: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """The Pallas TPU kernel; rows are padded to a multiple of 128 tokens. `interpret` runs it on a CPU, for tests.

    A Pallas call is opaque to the partitioner: under `jax.set_mesh` it is mapped over the mesh's batch and head axes.
    """
    if ends_BT is not None:
        raise ConfigError("model.attention='splash' knows segments, but not their branches")
    T = q_BTNH.shape[1]
    length = _round_up(T, _SPLASH_LANES)
    block = next(size for size in (512, 256, 128) if length % size == 0)
    q_BTNH = _pad(q_BTNH * (1 / math.sqrt(q_BTNH.shape[-1])), length)
    k_BTKH, v_BTKH, segment_ids_BT = _pad(k_BTKH, length), _pad(v_BTKH, length), _pad(segment_ids_BT, length)

    def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, ids_BT: jax.Array) -> jax.Array:
        sizes = splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        )
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([splash.CausalMask((length, length))] * q_BTNH.shape[2]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        q_BNTH, k_BKTH, v_BKTH = (jnp.swapaxes(a, 1, 2) for a in (q_BTNH, k_BTKH, v_BTKH))
        return jnp.swapaxes(jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, splash.SegmentIds(ids_BT, ids_BT)), 1, 2)

    return _over_mesh(attend, 4)(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)[:, :T]


def cudnn_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    ends_BT: jax.Array | None = None,
) -> jax.Array:
    """cuDNN's flash attention, bfloat16 only. Segments are a mask `[B, 1, T, T]`, which JAX hands to it as a bias."""
    if q_BTNH.dtype != jnp.bfloat16:
        raise ConfigError(f"model.attention='cudnn' computes in bfloat16, and model.compute_dtype='{q_BTNH.dtype}'")
    T = q_BTNH.shape[1]
    length = _round_up(T, 2)  # cuDNN takes a bias only for even lengths

    def attend(
        q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, ids_BT: jax.Array, ends_BT: jax.Array | None
    ) -> jax.Array:
        visible_BTS = ids_BT[:, :, None] == ids_BT[:, None, :]
        if ends_BT is not None:
            visible_BTS &= jnp.arange(length)[None, :, None] < ends_BT[:, None, :]
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            mask=visible_BTS[:, None],
            is_causal=True,
            implementation="cudnn",
        )

    # Where weights are split over "fsdp" the partitioner splits queries and keys in different ways, and cuDNN refuses.
    padded = [_pad(x, length) for x in (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)]
    if ends_BT is not None:
        ends_BT = _pad(ends_BT - length, length) + length  # padding sees itself: a row without a key is NaN
    return _over_mesh(attend)(*padded, ends_BT)[:, :T]


def cpu(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    ends_BT: jax.Array | None = None,
) -> jax.Array:
    """Our own kernels for CPUs. Raises ConfigError where they cannot be: another dtype or head size, no compiler."""
    if not cpu_attention.is_possible(q_BTNH.dtype, q_BTNH.shape[-1]):
        raise ConfigError(
            f"model.attention='cpu' takes float32, heads that are a multiple of 16 and a C++ compiler; here are "
            f"model.compute_dtype='{q_BTNH.dtype}' and model.head_dim={q_BTNH.shape[-1]}. Choose 'auto'"
        )
    return _over_mesh(cpu_attention.cpu_attention)(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, ends_BT)


def windows(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    ends_BT: jax.Array | None = None,
) -> jax.Array:
    """Each device loops over the windows of its own rows: the partitioner could not split such a loop."""
    return _over_mesh(window_attention)(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, ends_BT)


_KERNELS: dict[str, Callable[..., jax.Array]] = {
    "cpu": cpu,
    "windows": windows,
    "xla": xla_attention,
    "splash": splash_attention,
    "cudnn": cudnn_attention,
}


def _over_mesh(attend: Callable[..., jax.Array], operands: int = 5) -> Callable[..., jax.Array]:
    """Maps a kernel over the ambient mesh, if there is one: rows over the batch axes, heads over the tensor axis."""
    heads, rows = partition_spec(BATCH_AXES, None, TENSOR_AXIS, None), partition_spec(BATCH_AXES, None)
    return over_mesh(attend, (heads, heads, heads, rows, rows)[:operands], heads)


def _pad(x: jax.Array, length: int, axis: int = 1) -> jax.Array:
    """Zeros at the end of an axis, up to a length. Causality keeps them out of sight of what is before."""
    return jnp.pad(x, [(0, length - size if i == axis else 0) for i, size in enumerate(x.shape)])


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
