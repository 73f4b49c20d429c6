"""Kernels on a mesh: the partitioner cannot split them, so they are mapped over its devices."""

from collections.abc import Callable
from typing import Any

from apr_jax.parallel.mesh import BATCH_AXES, TENSOR_AXIS, over_mesh, partition_spec


def over_rows_and_heads(attend: Callable[..., Any], operands: int = 5) -> Callable[..., Any]:
    """Map training attention over the ambient mesh: rows over the batch axes, heads over the tensor axis.

    `attend` takes the first `operands` of queries, keys, values, segment ids and ends.
    """
    heads, rows = partition_spec(BATCH_AXES, None, TENSOR_AXIS, None), partition_spec(BATCH_AXES, None)
    return over_mesh(attend, (heads, heads, heads, rows, rows)[:operands], heads)
