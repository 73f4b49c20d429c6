"""The one door to kernels: what a model computes with on a platform, in training and in decoding.

Everywhere the plain maths of `apr_jax.model` will do, and here is where something faster is chosen instead. What exists
for CPUs alone is a folder that may be missing.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from apr_jax.config import ConfigError, EngineConfig, ModelConfig
from apr_jax.kernels.gpu import cudnn
from apr_jax.kernels.gpu import paged_attention as gpu
from apr_jax.kernels.pairs import KernelPagedAttention
from apr_jax.kernels.tpu import paged_attention as tpu
from apr_jax.kernels.tpu import splash
from apr_jax.kernels.tpu.write_then_attend import UNIT
from apr_jax.model.attention import xla_attention
from apr_jax.model.head_tile import PLAIN
from apr_jax.model.ops import XLA, Ops, rms_norm
from apr_jax.model.paged_attention import PagedAttention
from apr_jax.model.quantised_tile import QuantisedTile
from apr_jax.model.views.training import PackedAttention, TrainingAttention
from apr_jax.parallel.mesh import TENSOR_AXIS, split_rows

_TPU_PREFILL_BLOCK = 256  # positions whose products take a v5e as long as reading the weights for them
GPUS = ("gpu", "cuda", "rocm")  # platforms, as JAX calls them


@dataclasses.dataclass(frozen=True)
class TrainingKernels:
    """The functions of a training forward, on rows `[B, T]` that are split over the ambient mesh."""

    ops: Ops
    attention: TrainingAttention
    takes_branches: bool  # segments may have branches (`data/prefixes.py`)
    packed: PackedAttention | None  # computes within segments without branches alone, given their lengths


@dataclasses.dataclass(frozen=True)
class InPlacePrefill:
    """An attention of prefill's new positions, which are all written before any attends.

    So they may be neighbours in a row, and tokens of any threads fill a call.
    """

    attention: PagedAttention  # of lanes that come `unit` at a time, with one table for each unit
    unit: int  # neighbouring positions of one row; the first is a multiple of it
    block: int  # positions that are computed together, whole units


@dataclasses.dataclass(frozen=True)
class DecodeKernels:
    """The functions of an engine on each data shard."""

    ops: Ops
    attention: PagedAttention
    prefill: InPlacePrefill | None  # None: keys and values are computed first, and then written by a program of its own
    own_head: bool  # a head tied to the embedding is held as a matrix of its own


@dataclasses.dataclass(frozen=True)
class AttentionKernel:
    """An attention of training rows, and where it can compute.

    Attributes:
        load: returns the function, once it is chosen.
        takes_branches: see `TrainingKernels`.
        packed: returns what `TrainingKernels` holds under this name.
        suits: (model, platform) -> True where "auto" chooses it, unless a row above it suits too.
        lacks: (model, platform) -> what a configuration that names it lacks, for the message; None if nothing.
    """

    load: Callable[[], TrainingAttention]
    takes_branches: bool
    suits: Callable[[ModelConfig, str], bool]
    lacks: Callable[[ModelConfig, str], str | None] = lambda model, platform: None
    packed: Callable[[], PackedAttention | None] = lambda: None


def for_training(config: ModelConfig, platform: str) -> TrainingKernels:
    """Choose for `model.attention` and the devices' platform ("cpu", "tpu", "gpu" or "cuda").

    Raises:
        ConfigError: the attention that is asked for cannot compute this model here.
    """
    cpu = cpu_kernels(platform)
    ops = cpu.TRAINING if cpu is not None and config.compute_dtype == "float32" else _SPLIT_XLA
    ops = dataclasses.replace(ops, loops=platform == "tpu")  # whose compiler takes long (docs/scale.md)
    chosen: str = config.attention
    if chosen == "auto":
        chosen = next(name for name, kernel in ATTENTIONS.items() if kernel.suits(config, platform))
    kernel = ATTENTIONS[chosen]
    if lack := kernel.lacks(config, platform):
        raise ConfigError(
            f"model.attention={chosen!r} takes {lack}; here are model.compute_dtype={config.compute_dtype!r} and "
            f"model.head_dim={config.head_dim}. Choose 'auto'"
        )
    return TrainingKernels(ops, kernel.load(), kernel.takes_branches, kernel.packed())


def for_decoding(config: ModelConfig, sizes: EngineConfig, mesh: Mesh) -> DecodeKernels:
    """Choose for `engine.decode_attention` and the mesh. Raises ConfigError for pages that a kernel cannot take.

    Accelerators' kernels compute in bfloat16, the CPU's also in float32. Where there is none, XLA does the work.
    """
    platform, whole = mesh.devices.flat[0].platform, mesh.shape[TENSOR_AXIS] == 1
    on_cpu, plain = platform == "cpu", DecodeKernels(XLA, PagedAttention(), None, platform == "cpu")
    cpu = cpu_kernels(platform)
    xla = sizes.decode_attention == "xla" or not (on_cpu or config.compute_dtype == "bfloat16")
    if xla or (on_cpu and cpu is None):
        quantised = sizes.page_dtype == "int8"
        tile = QuantisedTile(dtype=config.compute_dtype) if quantised else PLAIN
        return dataclasses.replace(plain, attention=PagedAttention(tile))
    if sizes.page_dtype != "compute":
        raise ConfigError(
            f"engine.page_dtype={sizes.page_dtype!r}: the kernel of this platform reads no 8-bit pages; set "
            "engine.decode_attention='xla'"
        )
    if cpu is not None:
        ops = cpu.DECODING[config.compute_dtype] if whole else XLA  # the partitioner cannot split a kernel
        attention = cpu.CpuPagedAttention()
        return DecodeKernels(ops, attention, InPlacePrefill(attention, unit=1, block=32), True)
    if platform == "tpu":
        tpu.check_page_size(sizes.page_size)
        tile = tpu.tile_of(config.head_dim, config.num_kv_heads // mesh.shape[TENSOR_AXIS])
        prefill = InPlacePrefill(tpu.TpuUnitAttention(tile), unit=UNIT, block=_TPU_PREFILL_BLOCK)
        return dataclasses.replace(plain, attention=tpu.TpuPagedAttention(tile), prefill=prefill)
    gpu.check_page_size(sizes.page_size)
    on_pages = KernelPagedAttention(kernel=gpu.attend)
    prefill = InPlacePrefill(on_pages, unit=1, block=gpu.PREFILL_BLOCK)
    return dataclasses.replace(plain, attention=on_pages, prefill=prefill)


def products(config: ModelConfig, platform: str) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which a model's programs are traced: where float32 is asked for, products are of float32.

    Accelerators would multiply float32 as TF32 or bfloat16.
    """
    exact = config.compute_dtype == "float32" and platform != "cpu"
    return jax.default_matmul_precision("highest") if exact else contextlib.nullcontext()


def cpu_kernels(platform: str) -> Any | None:
    """Return `apr_jax.kernels.cpu` for a CPU that can have kernels of its own: there is a compiler, and the folder."""
    if platform != "cpu" or importlib.util.find_spec(f"{__name__}.cpu") is None:
        return None
    cpu = importlib.import_module(f"{__name__}.cpu")
    return cpu if cpu.is_available() else None


def _cpu_attends(config: ModelConfig, platform: str) -> bool:
    cpu = cpu_kernels(platform)
    return cpu is not None and config.compute_dtype == "float32" and bool(cpu.takes_heads(config.head_dim))


def _cpu_lacks(config: ModelConfig, platform: str) -> str | None:
    return None if _cpu_attends(config, platform) else "float32, heads that are a multiple of 16 and a C++ compiler"


def _cudnn_suits(config: ModelConfig, platform: str) -> bool:
    takes = config.compute_dtype == "bfloat16" and config.head_dim % 8 == 0 and config.head_dim <= 128
    return platform in GPUS and takes


def _cudnn_lacks(config: ModelConfig, platform: str) -> str | None:
    return None if config.compute_dtype == "bfloat16" else "bfloat16"


def _norm_of_split_rows(x: jax.Array, scale_D: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    return rms_norm(split_rows(x), scale_D, eps)


_SPLIT_XLA = dataclasses.replace(XLA, norm=_norm_of_split_rows)

# The attentions of training, by their names in `model.attention`. "auto" is the first that suits.
ATTENTIONS: dict[str, AttentionKernel] = {
    "cpu": AttentionKernel(
        lambda: importlib.import_module(f"{__name__}.cpu").training_attention, True, _cpu_attends, _cpu_lacks
    ),
    "splash": AttentionKernel(lambda: splash.splash_attention, False, lambda _, platform: platform == "tpu"),
    "cudnn": AttentionKernel(
        lambda: cudnn.cudnn_attention,
        True,
        _cudnn_suits,
        _cudnn_lacks,
        packed=lambda: cudnn.packed_attention if cudnn.takes_lengths() else None,
    ),
    "xla": AttentionKernel(lambda: xla_attention, True, lambda *_: True),
}
