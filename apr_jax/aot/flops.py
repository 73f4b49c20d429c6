"""Floating-point operations of a traced program: of its products and attention kernels, in all its loops.

The count is of the jaxpr, before XLA, over all devices together. It includes what a backward pass recomputes, and a
scan counts as often as it runs. (XLA counts a loop's body once, and the inside of a kernel not at all.) Everything but
products is left out, because it is bound by bytes.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core

# Of the triangle of a full row, what its segments leave: rows of 4,096 that `:paper`'s demonstrations fill, on average.
PACKED_SHARE = 0.22


def count_flops(jaxpr: Any) -> int:
    """Count FLOPs of all devices: 2 a multiply-add, half of a causal attention's square. A `while` counts once.

    The work of attention within packed segments depends on the data: `PACKED_SHARE` stands for it.
    """
    return sum(_of(equation) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _of(equation: Any) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        ((contracted, _), (_, _)) = parameters["dimension_numbers"]
        (shape,) = (variable.aval.shape for variable in equation.outvars)
        return int(2 * math.prod(shape) * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted))
    if name.startswith("dot_product_attention"):  # cuDNN: two products forward, five backward
        query, key = (variable.aval.shape for variable in equation.invars[:2])
        B, T, N, H = query
        share = PACKED_SHARE if equation.invars[6].aval.ndim == 2 else 1.0  # offsets of segments
        return int(2 * B * N * T * key[1] * H * (5 if "bwd" in name else 2) // 2 * share)
    inner = [count_flops(sub) for sub in _jaxprs(parameters)]
    if name == "pallas_call":
        grid = parameters["grid_mapping"].grid
        blocks = math.prod(size for size in grid if isinstance(size, int))
        return int(sum(inner) * blocks * _visited(equation, grid))
    if name == "scan":
        return sum(inner) * int(parameters["length"])
    if name == "cond":
        return max(inner, default=0)
    if name == "shard_map":
        sizes = dict(parameters["mesh"].shape)
        return sum(inner) * math.prod(sizes[axis] for axis in parameters["newly_manual_axes"])
    return sum(inner)


def _visited(equation: Any, grid: tuple[Any, ...]) -> float:
    """Return the share of a splash kernel's blocks that causality leaves; its grid has the others, and skips them."""
    if "splash" not in str(equation.params.get("name", equation.params.get("name_and_src_info", ""))):
        return 1.0
    blocks = int(grid[-1])
    return (blocks + 1) / (2 * blocks)


def _jaxprs(parameters: dict[str, Any]) -> Iterator[Any]:
    for value in parameters.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr | core.Jaxpr):
                yield item
