"""The C++ kernels as functions of arrays. Sums, softmax and norms are taken in float32; bfloat16 is rounded once."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from apr_jax.kernels.cpu import build
from apr_jax.model.online_softmax import Block
from apr_jax.model.ops import Angles

_PANEL = 16  # columns of a matrix that lie side by side


def panels_shape(inputs: int, outputs: int, paired: bool = False) -> tuple[int, int, int]:
    """Return the shape of a matrix's panels."""
    depth = 1 + paired
    return -(-outputs // _PANEL), -(-inputs // depth), depth * _PANEL


def to_panels(matrix_DF: jax.Array, paired: bool = False) -> jax.Array:
    """Lay a matrix out as `product` reads it: 16 columns side by side, then the next 16, filled up with zeros.

    `paired`, for bfloat16: two rows lie as 16 pairs, since the CPU multiplies a pair by a pair and adds up.
    """
    (D, F), depth = matrix_DF.shape, 1 + paired
    panels, steps, _ = panels_shape(D, F, paired)
    filled = jnp.pad(matrix_DF, ((0, steps * depth - D), (0, panels * _PANEL - F)))
    return filled.reshape(steps, depth, panels, _PANEL).transpose(2, 0, 3, 1).reshape(panels, steps, -1)


def products(x: jax.Array, panels: Sequence[jax.Array], outputs: Sequence[int], dtype: Any = None) -> list[jax.Array]:
    """Multiply `x [..., D]` by several matrices `[D, F]`, into arrays `[..., F]` of `dtype` (None: that of x).

    Each sum is taken along D from first to last, whatever the number of rows. Lifted over lanes it is one product of
    all of them.

    Args:
        panels: the matrices by `to_panels`, in the dtype of x; paired in bfloat16.
        outputs: F of each.
    """
    shapes = [_array((*x.shape[:-1], width), dtype or x.dtype) for width in outputs]
    return list(_call("apr_product", shapes, "expand_dims", x, *panels))


def rotate(x: jax.Array, angles: Angles) -> jax.Array:
    """Rotate whole heads `x [..., N H]` as `ops.apply_rope`; `angles` are `[..., 1, H/2]`."""
    cos, sin = (jnp.squeeze(each, -2) for each in angles)
    return build.call("apr_rotate", _array(x.shape, x.dtype), vmap_method="broadcast_all")(x, cos, sin)


def draw(
    logits: jax.Array, temperature: jax.Array, banned_mask_V: jax.Array, uniform: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draw a token of each row, and return it with its log-probability: `ops.draw` in one pass.

    Args:
        logits: float32 `[..., V]`.
        temperature: float32 scalar. Not a lane's own.
        banned_mask_V: bool. Not a lane's own.
        uniform: float32 `[...]` in [0, 1).

    Returns:
        int32 and float32 `[...]`.
    """
    shapes = [_array(uniform.shape, dtype) for dtype in (jnp.int32, jnp.float32)]
    token, logprob = _call("apr_draw", shapes, "expand_dims", logits, temperature, banned_mask_V, uniform)
    return token, logprob


def write_then_attend(
    q_LNH: jax.Array, k_LKH: jax.Array, v_LKH: jax.Array, pages: Block, seen_L: jax.Array, tables_LR: jax.Array
) -> tuple[jax.Array, Block]:
    """Write each lane's new key and value at position `seen_L - 1` of its row, then attend to the first `seen_L`.

    All lanes write before any attends, so lanes may be neighbouring positions of one row.

    Args:
        q_LNH, k_LKH, v_LKH: float32 or bfloat16, RoPE applied; scores are scaled by 1/sqrt(H).
        pages: of keys and of values, `[P, K, C, H]` of the same dtype; donate them, or they are copied.
        seen_L: int32; 0 for a lane that writes nothing and gets zeros.
        tables_LR: int32, the pages of each row in order.

    Returns:
        `[L, N, H]`, and the pages.
    """
    shapes = [_array(x.shape, x.dtype) for x in (q_LNH, *pages)]
    call = build.call("apr_attend", shapes, input_output_aliases={3: 1, 4: 2})
    out_LNH, k_pages, v_pages = call(q_LNH, k_LKH, v_LKH, *pages, seen_L, tables_LR, threads=build.threads())
    return out_LNH, (k_pages, v_pages)


def attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, first_BT: jax.Array, ends_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attend from each query to the tokens from its `first_BT` to itself; scores are scaled by 1/sqrt(H).

    Args:
        q_BTNH, k_BTKH, v_BTKH: float32, T and H multiples of 16.
        first_BT: int32, does not decrease along T.
        ends_BT: int32, the first time from which on a token is not seen.

    Returns:
        `[B, T, N, H]`, and the logarithm of each softmax's sum `[B, N, T]`, for `attention_backward`.
    """
    B, T, N, _ = q_BTNH.shape
    shapes = [_float32(*q_BTNH.shape), _float32(B, N, T)]
    out_BTNH, lse_BNT = _call("apr_attention", shapes, "sequential", q_BTNH, k_BTKH, v_BTKH, first_BT, ends_BT)
    return out_BTNH, lse_BNT


def attention_backward(
    inputs: Sequence[jax.Array], out_BTNH: jax.Array, lse_BNT: jax.Array, dout_BTNH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the gradients of queries, keys and values, given that of the output (Dao et al. 2022, algorithm 4).

    Args:
        inputs: of `attention`, all five.
    """
    shapes = [_float32(*x.shape) for x in inputs[:3]]
    dq, dk, dv = _call("apr_attention_backward", shapes, "sequential", *inputs, out_BTNH, lse_BNT, dout_BTNH)
    return dq, dk, dv


def outer(x_MD: jax.Array, y_MF: jax.Array) -> jax.Array:
    """Compute `x^T y [D, F]`: the gradient of a matrix, given its product's inputs and that of its outputs.

    Args:
        x_MD, y_MF: float32, D and F multiples of 16.
    """
    shape = _float32(x_MD.shape[1], y_MF.shape[1])
    return _call("apr_outer", shape, "sequential", x_MD, y_MF)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Compute `silu(gate) * up`, elementwise."""
    return _call("apr_swiglu", _array(gate.shape, gate.dtype), "broadcast_all", gate, up)


def swiglu_backward(gate: jax.Array, up: jax.Array, dout: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute the gradients of gate and up, given that of the output; float32."""
    dgate, dup = _call("apr_swiglu_backward", [_float32(*x.shape) for x in (gate, up)], "broadcast_all", gate, up, dout)
    return dgate, dup


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Compute RMSNorm of each row of `x [..., D]`, float32 or bfloat16, with a float32 scale."""
    return _call("apr_rms_norm", _array(x.shape, x.dtype), "expand_dims", x, scale_D, eps=np.float32(eps))


def rms_norm_backward(
    x: jax.Array, scale_D: jax.Array, dout: jax.Array, given: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Compute the gradients of `x`, added to `given`, and of the scale, given that of the output."""
    shapes, inputs = [_float32(*v.shape) for v in (x, scale_D)], (x, scale_D, dout, given)
    dx, dscale_D = _call("apr_rms_norm_backward", shapes, "sequential", *inputs, eps=np.float32(eps))
    return dx, dscale_D


def _call(name: str, shapes: Any, vmap_method: str, *inputs: jax.Array, **attributes: Any) -> Any:
    """Call a kernel on all threads."""
    return build.call(name, shapes, vmap_method=vmap_method)(*inputs, threads=build.threads(), **attributes)


def _array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return _array(shape, jnp.float32)
