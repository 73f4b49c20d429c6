"""Decode attention on GPUs by the Pallas (Triton) kernel that JAX ships.

cuDNN's paged attention (`jax._src.cudnn`) is no option: it takes pools of exactly lanes times R pages, so no page may
be shared.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import paged_attention as kernel

from apr_jax.config import ConfigError
from apr_jax.model.paged_attention import pairs_of

PREFILL_BLOCK = 256  # positions that prefill computes at a time: about as many FLOPs a byte of weights as an H100 has
_BLOCK = 256  # positions that a Triton program holds at once
_SPLIT = 1024  # positions that a Triton program goes through


def check_page_size(page_size: int) -> None:
    """Raise ConfigError for a page that the kernel's loads cannot take."""
    if page_size < 16 or page_size & (page_size - 1):
        raise ConfigError(
            f"engine.page_size={page_size} must be a power of two and at least 16 on a GPU (engine.decode_attention)"
        )


def attend(
    q_LJMW: jax.Array,
    k_PJCW: jax.Array,
    v_PJCW: jax.Array,
    lengths_L: jax.Array,
    tables_LR: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attend to pages; a `PagesKernel`. `interpret` runs it on a CPU, for tests."""
    (L, J, M, W), (P, _, C, _), R = q_LJMW.shape, k_PJCW.shape, tables_LR.shape[1]
    width = 1 << (R - 1).bit_length()  # Triton's blocks are powers of two; page 0 fills up
    pairs_LJR = pairs_of(jnp.pad(tables_LR, ((0, 0), (0, width - R))), J)
    splits = min(16, width, max(1, width * C // _SPLIT))
    out = kernel.paged_attention(
        q_LJMW.reshape(L * J, M, W),
        k_PJCW.reshape(1, P * J, C, W),
        v_PJCW.reshape(1, P * J, C, W),
        pairs_LJR.reshape(L * J, width),
        jnp.repeat(lengths_L, J),
        pages_per_compute_block=max(1, min(width // splits, _BLOCK // C)),
        k_splits=splits,
        interpret=interpret,
    )
    return out.reshape(L, J, M, W)
