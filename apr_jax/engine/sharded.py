"""Functions of one data shard, compiled once and run on every data shard of a mesh."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from apr_jax.kernels import GPUS
from apr_jax.parallel.mesh import DATA_AXIS, TENSOR_AXIS, partition_spec

SHARDED = partition_spec(DATA_AXIS)
PAGES = partition_spec(DATA_AXIS, None, TENSOR_AXIS)


class ShardedStep:
    """A jitted function that each data shard runs on its own slice of the arguments' leading axis.

    Once compiled ahead (`compile`), it takes no other shapes and compiles nothing more.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        mesh: Mesh,
        in_specs: tuple[PartitionSpec, ...],
        out_shardings: Any,
        donated: tuple[int, ...] = (0,),
        tracing: Callable[[], Any] = contextlib.nullcontext,
    ):
        """Take a `function` that sees no shard axis, and make the context it is traced in.

        Arguments whose spec is not SHARDED reach every shard whole.
        """

        def local(*arguments: Any) -> Any:
            # A shard sees its slice of the leading axis, of size one.
            squeezed = [
                jax.tree.map(lambda x: x[0], argument) if spec == SHARDED else argument
                for argument, spec in zip(arguments, in_specs, strict=True)
            ]
            with tracing():
                return jax.tree.map(lambda x: x[None], function(*squeezed))

        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=in_specs, out_specs=SHARDED, axis_names={DATA_AXIS}, check_vma=False
        )
        options = _compiler_options(mesh)
        self.jitted: Any = jax.jit(
            mapped, donate_argnums=donated, out_shardings=out_shardings, compiler_options=options
        )
        self._compiled: Any = None

    def __call__(self, *arguments: Any) -> Any:
        return (self._compiled or self.jitted)(*arguments)

    def compile(self, lowered: Any) -> None:
        """Compile what `jitted.lower` returned; calls use it from now on."""
        self._compiled = lowered.compile()

    @property
    def num_compilations(self) -> int:
        """Programs compiled so far."""
        return int(self.jitted._cache_size()) + (self._compiled is not None)


def _compiler_options(mesh: Mesh) -> dict[str, Any]:
    """Return the compiler's options for a mesh.

    On a CPU products stay on one core each where every core is a device of the mesh: sharing them out gets in the way.
    On a GPU products that share an operand stay apart: merged ones copy their weights side by side in every step.
    """
    platform = mesh.devices.flat[0].platform
    if platform == "cpu" and mesh.size >= (os.cpu_count() or 1):
        return {"xla_cpu_multi_thread_eigen": False}
    return {"xla_gpu_dot_merger_threshold_mb": 0} if platform in GPUS else {}
