"""Kernels of our own for a CPU, which the machine's C++ compiler makes at their first use.

`native.cc` and `native_pages.cc` are for decoding, in float32 and bfloat16: XLA's CPU backend multiplies a few rows at
half of the machine's speed, and its attention reads a copy of the pages (docs/decode.md). `native_training.cc` is for
training, in float32 (docs/performance.md). Where there is no compiler, or the kernels can't be made, everything runs as
XLA compiles it, and a warning says so.

Sums, softmax and norms are taken in float32, and a result in bfloat16 is rounded once.
"""

import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from apr_jax.model.rope import Angles

_FOLDER = pathlib.Path(__file__).parent
_HEADER = _FOLDER / "native.h"
_TARGETS = {
    _FOLDER / "native.cc": (
        "apr_product",
        "apr_rotate",
        "apr_rotate_apart",
        "apr_swiglu_joined",
        "apr_draw",
    ),
    _FOLDER / "native_pages.cc": ("apr_attend",),
    _FOLDER / "native_training.cc": (
        "apr_attention",
        "apr_attention_backward",
        "apr_outer",
        "apr_swiglu",
        "apr_swiglu_backward",
        "apr_rms_norm",
        "apr_rms_norm_backward",
    ),
}
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-w")
_PANEL = 16  # columns of a matrix that lie side by side
_COMPILERS = ("c++", "g++", "clang++")

_log = logging.getLogger(__name__)


@functools.cache
def is_available() -> bool:
    """Whether this process has the kernels; makes and registers them when it is first asked."""
    try:
        with futures.ThreadPoolExecutor() as pool:  # a compiler each
            libraries = [ctypes.CDLL(str(path)) for path in pool.map(_made, _TARGETS)]
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        _log.warning(
            "no kernels for this CPU, so decoding takes twice the time, training 1.2 times: %s", output.strip()
        )
        return False
    for library, targets in zip(libraries, _TARGETS.values(), strict=True):
        for target in targets:
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")  # type: ignore[no-untyped-call]
    return True


def panels_shape(inputs: int, outputs: int, paired: bool = False) -> tuple[int, int, int]:
    """The shape of a matrix's panels."""
    depth = 1 + paired
    return -(-outputs // _PANEL), -(-inputs // depth), depth * _PANEL


def to_panels(matrix_DF: jax.Array, paired: bool = False) -> jax.Array:
    """A matrix as `product` reads it: 16 columns side by side, then the next 16, filled up with zeros.

    `paired`, for bfloat16: two rows lie as 16 pairs, since the CPU multiplies a pair by a pair and adds up.
    """
    (D, F), depth = matrix_DF.shape, 1 + paired
    panels, steps, _ = panels_shape(D, F, paired)
    filled = jnp.pad(matrix_DF, ((0, steps * depth - D), (0, panels * _PANEL - F)))
    return filled.reshape(steps, depth, panels, _PANEL).transpose(2, 0, 3, 1).reshape(panels, steps, -1)


def from_panels(panels: jax.Array, inputs: int, outputs: int) -> jax.Array:
    """The matrix `[inputs, outputs]` of which these are the panels."""
    steps, depth = panels.shape[1], panels.shape[2] // _PANEL
    split = panels.reshape(-1, steps, _PANEL, depth)
    return split.transpose(1, 3, 0, 2).reshape(steps * depth, -1)[:inputs, :outputs]


def product(x: jax.Array, panels: jax.Array, outputs: int, dtype: Any = None) -> jax.Array:
    """`x [..., D]` times a matrix `[D, outputs]`: `[..., outputs]`, float32 or bfloat16 [the dtype of x].

    Each sum is taken along D from first to last, whatever the number of rows. Lifted over lanes it is one product of
    all of them.

    Args:
        panels: the matrix by `to_panels`, in the dtype of x; paired in bfloat16.
    """
    out = _array((*x.shape[:-1], outputs), dtype or x.dtype)
    return _call("apr_product", out, vmap_method="expand_dims")(x, panels, threads=_threads())


def rotate(x: jax.Array, angles: Angles) -> jax.Array:
    """RoPE of whole heads `x [..., T, N H]`, as `rope.apply_rope`, float32; `angles` are `[..., T, 1, H/2]`."""
    cos, sin = (jnp.squeeze(each, -2) for each in angles)
    out: jax.Array = _call("apr_rotate", _float32(*x.shape), vmap_method="broadcast_all")(x, cos, sin)
    return out


def rotate_apart(x: jax.Array, angles: Angles, queries: int, keys: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of rows that hold all three, float32 or bfloat16; queries and keys with RoPE.

    Args:
        x: `[..., T, queries + 2 keys]`.
        angles: cosines and sines `[..., T, 1, H/2]`. XLA would compute them anew for every layer's queries and keys.
    """
    shapes = [_array((*x.shape[:-1], width), x.dtype) for width in (queries, keys, keys)]
    cos, sin = (jnp.squeeze(each, -2) for each in angles)
    q, k, v = _call("apr_rotate_apart", shapes, vmap_method="broadcast_all")(x, cos, sin)
    return q, k, v


def swiglu_joined(x: jax.Array) -> jax.Array:
    """`silu(gate) * up` of rows `[..., 2 F]` that hold both, float32 or bfloat16: `[..., F]`."""
    shape = _array((*x.shape[:-1], x.shape[-1] // 2), x.dtype)
    call = _call("apr_swiglu_joined", shape, vmap_method="broadcast_all")
    out: jax.Array = call(x, threads=_threads())
    return out


def draw(
    logits: jax.Array, temperature: jax.Array, banned_mask_V: jax.Array, uniform: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A token of each row and its log-probability: `sampling.log_probs` and `sampling.sample` in one.

    Args:
        logits: float32 `[..., V]`.
        temperature: float32 scalar. Not a lane's own.
        banned_mask_V: bool. Not a lane's own.
        uniform: float32 `[...]` in [0, 1).

    Returns:
        int32 and float32 `[...]`.
    """
    shapes = [_array(uniform.shape, dtype) for dtype in (jnp.int32, jnp.float32)]
    call = _call("apr_draw", shapes, vmap_method="expand_dims")
    token, logprob = call(logits, temperature, banned_mask_V, uniform, threads=_threads())
    return token, logprob


def write_then_attend(
    q_LNH: jax.Array,
    k_LKH: jax.Array,
    v_LKH: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    seen_L: jax.Array,
    tables_LR: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Writes each lane's new key and value at position `seen_L - 1` of its row, then attends to the first `seen_L`.

    All lanes write before any attends, so lanes may be neighbouring positions of one row.

    Args:
        q_LNH, k_LKH, v_LKH: float32 or bfloat16, RoPE applied; scores are scaled by 1/sqrt(H).
        k_pages, v_pages: `[P, K, C, H]` of the same dtype; donate them, or they are copied.
        seen_L: int32; 0 for a lane that writes nothing and gets zeros.
        tables_LR: int32, the pages of each row in order.

    Returns:
        `[L, N, H]`, and both kinds of pages.
    """
    shapes = [_array(x.shape, x.dtype) for x in (q_LNH, k_pages, v_pages)]
    call = _call("apr_attend", shapes, input_output_aliases={3: 1, 4: 2})
    out_LNH, k_pages, v_pages = call(q_LNH, k_LKH, v_LKH, k_pages, v_pages, seen_L, tables_LR, threads=_threads())
    return out_LNH, k_pages, v_pages


def attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, first_BT: jax.Array, ends_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of each query to tokens from its `first_BT` to itself; scores scaled by 1/sqrt(H).

    Args:
        q_BTNH, k_BTKH, v_BTKH: float32, T and H multiples of 16.
        first_BT: int32, does not decrease along T.
        ends_BT: int32, the first time from which on a token is not seen.

    Returns:
        `[B, T, N, H]`, and the logarithm of each softmax's sum `[B, N, T]`, for `attention_backward`.
    """
    B, T, N, _ = q_BTNH.shape
    shapes = [_float32(*q_BTNH.shape), _float32(B, N, T)]
    call = _call("apr_attention", shapes, vmap_method="sequential")
    out_BTNH, lse_BNT = call(q_BTNH, k_BTKH, v_BTKH, first_BT, ends_BT, threads=_threads())
    return out_BTNH, lse_BNT


def attention_backward(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    first_BT: jax.Array,
    ends_BT: jax.Array,
    out_BTNH: jax.Array,
    lse_BNT: jax.Array,
    dout_BTNH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of queries, keys and values, given that of the output (Dao et al. 2022, algorithm 4)."""
    shapes = [_float32(*x.shape) for x in (q_BTNH, k_BTKH, v_BTKH)]
    call = _call("apr_attention_backward", shapes, vmap_method="sequential")
    dq, dk, dv = call(q_BTNH, k_BTKH, v_BTKH, first_BT, ends_BT, out_BTNH, lse_BNT, dout_BTNH, threads=_threads())
    return dq, dk, dv


def outer(x_MD: jax.Array, y_MF: jax.Array) -> jax.Array:
    """`x^T y [D, F]`: the gradient of a matrix, given its product's inputs and that of its outputs.

    Args:
        x_MD, y_MF: float32, D and F multiples of 16.
    """
    shape = _float32(x_MD.shape[1], y_MF.shape[1])
    out_DF: jax.Array = _call("apr_outer", shape, vmap_method="sequential")(x_MD, y_MF, threads=_threads())
    return out_DF


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`silu(gate) * up`, elementwise, float32."""
    call = _call("apr_swiglu", _float32(*gate.shape), vmap_method="broadcast_all")
    out: jax.Array = call(gate, up, threads=_threads())
    return out


def swiglu_backward(gate: jax.Array, up: jax.Array, dout: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients of gate and up, given that of the output."""
    shapes = [_float32(*x.shape) for x in (gate, up)]
    dgate, dup = _call("apr_swiglu_backward", shapes, vmap_method="broadcast_all")(gate, up, dout, threads=_threads())
    return dgate, dup


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """RMSNorm of each row of `x [..., D]`, float32 or bfloat16. Lifted over lanes the float32 scale is one for all."""
    call = _call("apr_rms_norm", _array(x.shape, x.dtype), vmap_method="expand_dims")
    out: jax.Array = call(x, scale_D, threads=_threads(), eps=np.float32(eps))
    return out


def rms_norm_backward(
    x: jax.Array, scale_D: jax.Array, dout: jax.Array, given: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """The gradients of `x`, added to `given`, and of the scale, given that of the output."""
    call = _call("apr_rms_norm_backward", [_float32(*v.shape) for v in (x, scale_D)], vmap_method="sequential")
    dx, dscale_D = call(x, scale_D, dout, given, threads=_threads(), eps=np.float32(eps))
    return dx, dscale_D


def _call(target: str, *arguments: Any, **options: Any) -> Callable[..., Any]:
    if not is_available():
        raise RuntimeError(f"there are no kernels for this CPU, and {target} is one: ask native.is_available() first")
    return jax.ffi.ffi_call(target, *arguments, **options)


def _array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return _array(shape, jnp.float32)


def _threads() -> np.int64:
    """Cores for each device of the ambient mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return np.int64(max(1, cores // (1 if mesh.empty else mesh.size)))


def _made(source: pathlib.Path) -> pathlib.Path:
    """The source's shared library, compiled for this CPU unless an earlier process has done so."""
    include = jax.ffi.include_dir()
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise OSError(f"no C++ compiler here; install one of {', '.join(_COMPILERS)}")
    texts = (source.read_text(), _HEADER.read_text())
    parts = (*texts, *_FLAGS, compiler, jax.__version__, platform.machine(), _cpu())
    path = _folder() / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = pathlib.Path(folder, path.name)
            command = [compiler, *_FLAGS, "-isystem", include, str(source), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            made.replace(path)  # whole or not at all, should another process do the same
    return path


def _folder() -> pathlib.Path:
    """Where compiled kernels are kept: beside what JAX keeps of its own, else in the user's cache."""
    kept = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(kept or pathlib.Path(cache, "apr_jax"), "native")


def _cpu() -> str:
    """What the compiler would make code for: a library of another machine may hold instructions that this one lacks."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features"))))
