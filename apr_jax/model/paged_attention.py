"""Attention of one new position a lane to the lane's pages: kernels that JAX ships, and a reference that runs anywhere.

Letters as in `llama.py`; besides, R pages of a row, C positions of a page, J head groups of a page, W elements of a
group in one position, M query heads of one group.

All backends share one physical layout `[P, J, C, W]`. The kernels want their pages heads first, `[heads, pages, ...]`;
a pair (page, group) is as contiguous here as there, so they are given `P * J` pages of a single head, lanes times
groups as their batch, and tables of pairs: a reshape, no copy.

* "tpu": `jax.experimental.pallas.ops.tpu.paged_attention`. Its blocks are a head wide and must be whole rows of 128
  lanes, so H=64 does not compile (and a TPU would pad it to 128 in memory). `HeadTile` therefore lays 128 / H
  neighbouring heads side by side, and a query is zero in its neighbours' place: neither memory nor bandwidth is lost.
  It computes with bfloat16 keys and values whatever it is given.
* "gpu": `jax.experimental.pallas.ops.gpu.paged_attention`, in Triton.
* "cpu": `native.py`, which writes the new position as well.
* "xla": gathers each row. Exact in float32, and what the kernels are tested against.

cuDNN's paged attention (`jax._src.cudnn`) is no option: it takes pools of exactly lanes times R pages, so no page may
be shared.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import paged_attention as gpu_kernel
from jax.experimental.pallas.ops.tpu import paged_attention as tpu_kernel

from apr_jax.config import ConfigError
from apr_jax.model import native
from apr_jax.parallel.mesh import DATA_AXIS, TENSOR_AXIS, partition_spec

Impl = Literal["xla", "tpu", "gpu", "cpu"]

_MASKED = -1e30
_TPU_LANES = 128
_TPU_BLOCK = 512  # positions that the TPU kernel holds at once
_TPU_TABLE_BYTES = 256 * 1024  # of a call's page table: it lies in scalar memory (1 MiB on v5e)
_GPU_BLOCK = 256  # positions that a Triton program holds at once
_GPU_SPLIT = 1024  # positions that a Triton program goes through


@dataclasses.dataclass(frozen=True)
class HeadTile:
    """How key/value heads lie in pages: `heads` neighbours side by side, then zeros."""

    heads: int = 1
    padding: int = 0

    @classmethod
    def of(cls, impl: str, head_dim: int, heads_per_shard: int) -> "HeadTile":
        """The tile that an implementation needs: rows of whole 128 lanes on TPU, as it comes elsewhere."""
        if impl != "tpu":
            return cls()
        heads = math.gcd(max(1, _TPU_LANES // head_dim), heads_per_shard)
        return cls(heads, -heads * head_dim % _TPU_LANES)

    def head_dim(self, width: int) -> int:
        return (width - self.padding) // self.heads

    def pack(self, x: jax.Array) -> jax.Array:
        """`[..., K, C, H]` to `[..., J, C, W]`."""
        *lead, K, C, H = x.shape
        grouped = jnp.swapaxes(x.reshape(*lead, K // self.heads, self.heads, C, H), -3, -2)
        return _pad_last(grouped.reshape(*lead, K // self.heads, C, self.heads * H), self.padding)

    def unpack(self, x: jax.Array) -> jax.Array:
        """`[..., J, C, W]` to `[..., K, C, H]`."""
        *lead, J, C, W = x.shape
        H = self.head_dim(W)
        grouped = x[..., : self.heads * H].reshape(*lead, J, C, self.heads, H)
        return jnp.swapaxes(grouped, -3, -2).reshape(*lead, J * self.heads, C, H)

    def pack_queries(self, q_LNH: jax.Array, J: int) -> jax.Array:
        """`[L, J, M, W]`: each query head as wide as its group, zero where its neighbours' keys lie."""
        L, N, H = q_LNH.shape
        q_LJPGH = q_LNH.reshape(L, J, self.heads, N // J // self.heads, H)
        places = [(place * H, (self.heads - 1 - place) * H + self.padding) for place in range(self.heads)]
        spread = [
            jnp.pad(q_LJPGH[:, :, place], ((0, 0), (0, 0), (0, 0), widths)) for place, widths in enumerate(places)
        ]
        return jnp.concatenate(spread, axis=2)

    def unpack_outputs(self, out_LJMW: jax.Array) -> jax.Array:
        """`[L, N, H]`: of each query head what it found in its own head's values."""
        L, J, M, W = out_LJMW.shape
        H = self.head_dim(W)
        out_LJPGW = out_LJMW.reshape(L, J, self.heads, M // self.heads, W)
        own = [out_LJPGW[:, :, place, :, place * H : (place + 1) * H] for place in range(self.heads)]
        return jnp.concatenate(own, axis=2).reshape(L, J * M, H)


PLAIN = HeadTile()


def choose_impl(requested: str, platform: str, dtype: str) -> Literal["packed"] | Impl:
    """What `engine.decode_attention` means on a platform ("cpu", "tpu", "gpu" or "cuda").

    Accelerators' kernels compute in bfloat16, the CPU's also in float32. Where there is none, "auto" is "packed", and
    "paged" the exact "xla".
    """
    if requested == "packed":
        return "packed"
    kernel: Impl = "tpu" if platform == "tpu" else "gpu" if platform in ("gpu", "cuda", "rocm") else "cpu"
    if not (native.is_available() if kernel == "cpu" else dtype == "bfloat16"):
        kernel = "xla"
    if requested == "auto" and kernel == "xla":
        return "packed"
    return kernel


def check_page_size(impl: str, page_size: int) -> None:
    """Raises ConfigError for a page that the kernel's loads cannot take."""
    if impl == "tpu" and page_size % 8:
        raise ConfigError(f"engine.page_size={page_size} must be a multiple of 8 on a TPU (engine.decode_attention)")
    if impl == "gpu" and (page_size < 16 or page_size & (page_size - 1)):
        raise ConfigError(
            f"engine.page_size={page_size} must be a power of two and at least 16 on a GPU (engine.decode_attention)"
        )


def paged_attention(
    q_LNH: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    lengths_L: jax.Array,
    tables_LR: jax.Array,
    *,
    impl: Impl,
    tile: HeadTile = PLAIN,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention of one query a lane to the first `lengths_L` positions of its row; scores scaled by 1/sqrt(H).

    Args:
        q_LNH: RoPE applied; query head n reads key/value head n // G.
        k_pages, v_pages: `[P, J, C, W]`, heads laid out by `tile`. Every element must be finite.
        lengths_L: int32, 0 for a lane without a thread.
        tables_LR: int32, the pages of each row in order; what lies behind the length is not read or masked.
        interpret: runs the GPU kernel on a CPU, for tests (for the TPU kernel: `pltpu.force_tpu_interpret_mode`).

    Returns:
        `[L, N, H]` in the dtype of the queries; zeros where the length is 0.
    """
    H = q_LNH.shape[-1]
    q_LJMW = tile.pack_queries((q_LNH / math.sqrt(H)).astype(q_LNH.dtype), k_pages.shape[1])
    kernels: dict[str, Callable[..., jax.Array]] = {
        "xla": _gathered,
        "tpu": _tpu,
        "gpu": functools.partial(_gpu, interpret=interpret),
    }
    return tile.unpack_outputs(kernels[impl](q_LJMW, k_pages, v_pages, lengths_L, tables_LR))


def _gathered(
    q_LJMW: jax.Array, k_PJCW: jax.Array, v_PJCW: jax.Array, lengths_L: jax.Array, tables_LR: jax.Array
) -> jax.Array:
    L, J, _, W = q_LJMW.shape
    S = tables_LR.shape[1] * k_PJCW.shape[2]

    def rows(pages_PJCW: jax.Array) -> jax.Array:
        rows_LRJCW = pages_PJCW.at[tables_LR].get(mode="promise_in_bounds")
        return jnp.swapaxes(rows_LRJCW, 1, 2).reshape(L, J, S, W)

    mask_L11S = (jnp.arange(S)[None] < lengths_L[:, None])[:, None, None]
    scores = jnp.einsum("LJMW,LJSW->LJMS", q_LJMW, rows(k_PJCW), preferred_element_type=jnp.float32)
    scores = jnp.where(mask_L11S, scores, _MASKED)
    weights = jnp.where(mask_L11S, jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    values = rows(v_PJCW)
    out = jnp.einsum("LJMS,LJSW->LJMW", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return (out / jnp.where(total > 0, total, 1.0)).astype(q_LJMW.dtype)


def _tpu(
    q_LJMW: jax.Array, k_PJCW: jax.Array, v_PJCW: jax.Array, lengths_L: jax.Array, tables_LR: jax.Array
) -> jax.Array:
    (L, J, M, W), (P, _, C, _), R = q_LJMW.shape, k_PJCW.shape, tables_LR.shape[1]
    block = max(pages for pages in range(1, R + 1) if R % pages == 0 and (pages * C <= _TPU_BLOCK or pages == 1))
    pairs_LJR = _pairs(tables_LR, J)
    lanes = max(1, _TPU_TABLE_BYTES // (4 * J * R))  # of a call
    outs = []
    for first in range(0, L, lanes):
        part = slice(first, first + lanes)
        out = tpu_kernel.paged_attention(
            q_LJMW[part].reshape(-1, M, W),
            k_PJCW.reshape(1, P * J, C, W),
            v_PJCW.reshape(1, P * J, C, W),
            jnp.repeat(lengths_L[part], J),
            pairs_LJR[part].reshape(-1, R),
            pages_per_compute_block=block,
        )
        outs.append(out.reshape(-1, J, M, W))
    return jnp.concatenate(outs)


def _gpu(
    q_LJMW: jax.Array,
    k_PJCW: jax.Array,
    v_PJCW: jax.Array,
    lengths_L: jax.Array,
    tables_LR: jax.Array,
    *,
    interpret: bool,
) -> jax.Array:
    (L, J, M, W), (P, _, C, _), R = q_LJMW.shape, k_PJCW.shape, tables_LR.shape[1]
    width = 1 << (R - 1).bit_length()  # Triton's blocks are powers of two; page 0 fills up
    pairs_LJR = _pairs(jnp.pad(tables_LR, ((0, 0), (0, width - R))), J)
    splits = min(16, width, max(1, width * C // _GPU_SPLIT))
    out = gpu_kernel.paged_attention(
        q_LJMW.reshape(L * J, M, W),
        k_PJCW.reshape(1, P * J, C, W),
        v_PJCW.reshape(1, P * J, C, W),
        pairs_LJR.reshape(L * J, width),
        jnp.repeat(lengths_L, J),
        pages_per_compute_block=max(1, min(width // splits, _GPU_BLOCK // C)),
        k_splits=splits,
        interpret=interpret,
    )
    return out.reshape(L, J, M, W)


def _pairs(tables_LR: jax.Array, J: int) -> jax.Array:
    """`[L, J, R]`: a row's (page, group) pairs, as indices into `P * J` pages."""
    return tables_LR[:, None] * J + jnp.arange(J, dtype=tables_LR.dtype)[None, :, None]


def _pad_last(x: jax.Array, count: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count)]) if count else x


def _write(pages_PJCW: jax.Array, new_LJW: jax.Array, page_L: jax.Array, place_L: jax.Array) -> jax.Array:
    """One position a lane. As rows of one long list: with (page, place) as the scatter's index XLA gives the pages
    another layout than the kernels want, and copies all of them in every layer of every step."""
    (P, J, C, W), L = pages_PJCW.shape, len(page_L)
    rows_LJ = (page_L[:, None] * J + jnp.arange(J)[None]) * C + place_L[:, None]
    rows = pages_PJCW.reshape(P * J * C, W).at[rows_LJ.reshape(-1)]
    return rows.set(new_LJW.reshape(L * J, W), mode="promise_in_bounds").reshape(pages_PJCW.shape)


def write_then_attend(
    q_LNH: jax.Array,
    k_LKH: jax.Array,
    v_LKH: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    lengths_L: jax.Array,
    live_L: jax.Array,
    tables_LR: jax.Array,
    *,
    impl: Impl,
    tile: HeadTile,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Writes each live lane's new key and value at position `lengths_L` of its row, then attends to all up to it.

    Lanes that are not live write to the trash page and attend to nothing. Returns the outputs `[L, N, H]` and both
    kinds of pages. On a mesh each device does this for its own heads: the partitioner cannot split a kernel.
    """

    def local(
        of_heads: tuple[jax.Array, ...], of_lanes: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        (q_LNH, k_LKH, v_LKH, k_pages, v_pages), (lengths_L, live_L, tables_LR) = of_heads, of_lanes
        seen_L = jnp.where(live_L, lengths_L + 1, 0)
        if impl == "cpu":
            return native.write_then_attend(q_LNH, k_LKH, v_LKH, k_pages, v_pages, seen_L, tables_LR)
        page_size = k_pages.shape[2]
        page_L = jnp.take_along_axis(tables_LR, lengths_L[:, None] // page_size, axis=1)[:, 0]
        page_L = jnp.where(live_L, page_L, 0)
        k_pages, v_pages = (
            _write(pages, tile.pack(new[:, :, None])[:, :, 0], page_L, lengths_L % page_size)
            for pages, new in ((k_pages, k_LKH), (v_pages, v_LKH))
        )
        return paged_attention(q_LNH, k_pages, v_pages, seen_L, tables_LR, impl=impl, tile=tile), k_pages, v_pages

    arguments = (q_LNH, k_LKH, v_LKH, k_pages, v_pages), (lengths_L, live_L, tables_LR)
    mesh = jax.sharding.get_abstract_mesh()
    unmapped = set(mesh.axis_names) - {DATA_AXIS}
    if not unmapped:
        return local(*arguments)
    heads, whole = partition_spec(None, TENSOR_AXIS), partition_spec()
    mapped = jax.shard_map(local, in_specs=(heads, whole), out_specs=heads, axis_names=unmapped, check_vma=False)
    return mapped(*arguments)
