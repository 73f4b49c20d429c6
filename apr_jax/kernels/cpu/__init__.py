"""Everything that exists for CPUs alone: C++ kernels and what makes, calls and feeds them. See README.md.

The package works without this folder; `apr_jax.kernels` is the only one that looks for it.
"""

from apr_jax.kernels.cpu.attention import CpuPagedAttention, takes_heads, training_attention
from apr_jax.kernels.cpu.build import is_available
from apr_jax.kernels.cpu.ops import DECODING, TRAINING

__all__ = ["DECODING", "TRAINING", "CpuPagedAttention", "is_available", "takes_heads", "training_attention"]
