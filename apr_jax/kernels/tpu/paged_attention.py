"""Decode attention on TPUs by the Pallas kernel that JAX ships.

Its blocks are a head wide and must be whole rows of 128 lanes, so a head dim of 64 does not compile (and a TPU would
pad it to 128 in memory). `tile_of` therefore lays 128 / H neighbouring heads side by side, and a query is zero in its
neighbours' place: neither memory nor bandwidth is lost. The kernel computes with bfloat16 keys and values whatever it
is given.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import paged_attention as kernel

from apr_jax.config import ConfigError
from apr_jax.model.head_tile import HeadTile
from apr_jax.model.paged_attention import pairs_of

_LANES = 128
_BLOCK = 512  # positions that the kernel holds at once
_TABLE_BYTES = 256 * 1024  # of a call's page table: it lies in scalar memory (1 MiB on v5e)


def tile_of(head_dim: int, heads_per_shard: int) -> HeadTile:
    """Return the tile that fills rows of whole 128 lanes without crossing shards."""
    heads = math.gcd(max(1, _LANES // head_dim), heads_per_shard)
    return HeadTile(heads, -heads * head_dim % _LANES)


def check_page_size(page_size: int) -> None:
    """Raise ConfigError for a page that the kernel's loads cannot take."""
    if page_size % 8:
        raise ConfigError(f"engine.page_size={page_size} must be a multiple of 8 on a TPU (engine.decode_attention)")


def attend(
    q_LJMW: jax.Array, k_PJCW: jax.Array, v_PJCW: jax.Array, lengths_L: jax.Array, tables_LR: jax.Array
) -> jax.Array:
    """Attend to pages; a `PagesKernel`."""
    (L, J, M, W), (P, _, C, _), R = q_LJMW.shape, k_PJCW.shape, tables_LR.shape[1]
    block = max(pages for pages in range(1, R + 1) if R % pages == 0 and (pages * C <= _BLOCK or pages == 1))
    pairs_LJR = pairs_of(tables_LR, J)
    lanes = max(1, _TABLE_BYTES // (4 * J * R))  # of a call
    outs = []
    for first in range(0, L, lanes):
        part = slice(first, first + lanes)
        out = kernel.paged_attention(
            q_LJMW[part].reshape(-1, M, W),
            k_PJCW.reshape(1, P * J, C, W),
            v_PJCW.reshape(1, P * J, C, W),
            jnp.repeat(lengths_L[part], J),
            pairs_LJR[part].reshape(-1, R),
            pages_per_compute_block=block,
        )
        outs.append(out.reshape(-1, J, M, W))
    return jnp.concatenate(outs)
