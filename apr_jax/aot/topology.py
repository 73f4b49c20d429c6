"""Accelerators by name, and devices of them to compile for where there are none.

    tpu:v5e:4x4      16 chips in a 4 x 4 torus       (hosts of 4 chips)
    tpu:v5p:2x2x1    4 chips                         (one host)
    gpu:h100:8       8 GPUs in one machine           (1 to 8)

XLA's compilers come with libtpu and with JAX's CUDA plugin; neither needs its hardware in order to compile. `make
compile-aot` makes an environment with both.
"""

import ctypes
import dataclasses
import difflib
import importlib.util
import math
import os
import pathlib
import re
import sys
import sysconfig
from typing import Any

from apr_jax.bench.datasheets import PEAKS, Peaks
from apr_jax.config import ConfigError

EXAMPLES = ("tpu:v5e:4x4", "tpu:v5p:2x2x1", "gpu:h100:8")
INSTALL = "make compile-aot TOPOLOGY=... (or: pip install --no-deps -r tests/aot/requirements.txt)"

_KINDS = {"tpu:v5e": 2, "tpu:v5p": 3, "gpu:h100": 1}  # how many numbers its shape has
_COMPILERS = {"tpu": "libtpu", "gpu": "jax_plugins.xla_cuda12"}
_ACCELERATOR = {"v5e": "v5litepod-{chips}", "v5p": "v5p-{cores}"}
_MAX_GPUS = 8  # in one machine, joined by NVLink
# libtpu asks the machine about its TPU. These answer where there is none, and let it run beside another process.
_LIBTPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
# What JAX would ask the GPU's machine for; cuDNN attention needs 9.10 or newer.
_CUDNN_VERSION, _H100_CAPABILITY = 91100, 9.0


@dataclasses.dataclass(frozen=True)
class Topology:
    """Some accelerators of one kind."""

    name: str
    platform: str  # "tpu", "gpu"
    kind: str  # a key of PEAKS
    shape: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape)

    @property
    def peaks(self) -> Peaks:
        return PEAKS[self.kind]


def parse_topology(name: str) -> Topology:
    """Parse a topology's name. Raises ConfigError for any other name, with the one that was probably meant."""
    found = re.fullmatch(r"(tpu|gpu):(\w+):([0-9]{1,9}(?:x[0-9]{1,9})*)", name)
    kind = found and f"{found[1]}:{found[2]}"
    if not found or kind not in _KINDS:
        close = difflib.get_close_matches(name, EXAMPLES, n=1, cutoff=0)
        raise ConfigError(
            f"--topology={name}: no such topology; did you mean {close[0]}? Kinds: {', '.join(_KINDS)}, "
            f"as in {', '.join(EXAMPLES)}"
        )
    shape = tuple(map(int, found[3].split("x")))
    example = next(example for example in EXAMPLES if example.startswith(kind))
    if len(shape) != _KINDS[kind] or not math.prod(shape):
        raise ConfigError(f"--topology={name}: {kind} takes {_KINDS[kind]} numbers above 0, as in {example}")
    if found[1] == "gpu" and shape[0] > _MAX_GPUS:
        raise ConfigError(f"--topology={name}: at most {_MAX_GPUS} GPUs, one machine, can be compiled for")
    return Topology(name, found[1], found[2], shape)


def prepare_process(topology: Topology) -> None:
    """Set what JAX and the compilers read from the environment. Call it before JAX is imported.

    Raises ConfigError, with what to install, when the compiler is not there.
    """
    if not _installed(_COMPILERS[topology.platform]):
        raise ConfigError(
            f"--topology={topology.name} needs a compiler that is not installed ({_COMPILERS[topology.platform]}): "
            f"{INSTALL}"
        )
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # its entries can be read back only where they can run
    if topology.platform == "tpu":
        accelerator = _ACCELERATOR[topology.kind].format(chips=topology.num_devices, cores=2 * topology.num_devices)
        os.environ.update(_LIBTPU, TPU_ACCELERATOR_TYPE=accelerator)
    else:
        # A GPU that is not there cannot tune by trying. cuBLAS takes what Triton's matmuls would.
        os.environ["XLA_FLAGS"] = (
            "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false "
            f"--xla_gpu_cuda_data_dir={_nvidia() / 'cuda_nvcc'}"
        )


def compile_only_devices(topology: Topology) -> list[Any]:
    """Return devices that programs can be compiled for and nothing can run on, in the order of their hosts.

    Their `process_index` says which of them share a host. One process can have them of one platform only. Raises
    ConfigError for a shape that the compiler does not know.
    """
    from jax.experimental import topologies

    if topology.platform == "gpu":
        _offer_cudnn()
        spec = pathlib.Path(__file__).with_name("h100.txtpb").read_text(encoding="utf-8")
        described: Any = topologies.get_topology_desc(
            platform="cuda", topology_name=topology.kind, target_config=spec, topology=f"1x1x{topology.num_devices}"
        )
        return list(described.devices)
    shape = "x".join(map(str, topology.shape))
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=f"{topology.kind}:{shape}")
    except Exception as error:
        # libtpu raises several kinds of RuntimeError; the text names the shapes it knows
        raise ConfigError(f"--topology={topology.name}: the TPU compiler refuses it: {error}") from error
    return sorted(described.devices, key=lambda device: (device.process_index, device.id))


def _offer_cudnn() -> None:
    """Load cuDNN for XLA, and answer for it where JAX would ask a GPU."""
    from jax._src.cudnn import fused_attention_stablehlo

    ctypes.CDLL(str(_nvidia() / "cudnn" / "lib" / "libcudnn.so.9"), mode=ctypes.RTLD_GLOBAL)
    fused_attention_stablehlo.check_cudnn_version = lambda: _CUDNN_VERSION
    fused_attention_stablehlo.check_compute_capability = lambda capability: float(capability) <= _H100_CAPABILITY


def _nvidia() -> pathlib.Path:
    return pathlib.Path(sysconfig.get_paths()["purelib"]) / "nvidia"


def _installed(module: str) -> bool:
    if module in sys.modules:
        return True
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
