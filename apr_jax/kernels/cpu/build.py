"""Compiling the C++ kernels, registering them with XLA, and calling them.

The machine's C++ compiler makes them when they are first asked for. Where there is no compiler, or they cannot be made,
everything runs as XLA compiles it, and a warning says so.
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
import numpy as np

_FOLDER = pathlib.Path(__file__).parent
_HEADERS = tuple(sorted(_FOLDER.glob("*.h")))
_TARGETS = {
    _FOLDER / "products.cc": ("apr_product", "apr_outer"),
    _FOLDER / "elementwise.cc": (
        "apr_rotate",
        "apr_swiglu",
        "apr_swiglu_backward",
        "apr_rms_norm",
        "apr_rms_norm_backward",
    ),
    _FOLDER / "draw.cc": ("apr_draw",),
    _FOLDER / "attention_pages.cc": ("apr_attend",),
    _FOLDER / "attention_rows.cc": ("apr_attention", "apr_attention_backward"),
}
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-w")
_COMPILERS = ("c++", "g++", "clang++")

_log = logging.getLogger(__name__)


@functools.cache
def is_available() -> bool:
    """Return True if this process has the kernels, which are made and registered when it is first asked."""
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


def call(target: str, *arguments: Any, **options: Any) -> Callable[..., Any]:
    """Return the call of a kernel, as `jax.ffi.ffi_call` does. Raises RuntimeError where there are none."""
    if not is_available():
        raise RuntimeError(f"there are no kernels for this CPU, and {target} is one: ask is_available() first")
    return jax.ffi.ffi_call(target, *arguments, **options)


def threads() -> np.int64:
    """Count the cores for each device of the ambient mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return np.int64(max(1, cores // (1 if mesh.empty else mesh.size)))


def _made(source: pathlib.Path) -> pathlib.Path:
    """Return the source's shared library, compiled for this CPU unless an earlier process has done so."""
    include = jax.ffi.include_dir()
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise OSError(f"no C++ compiler here; install one of {', '.join(_COMPILERS)}")
    texts = tuple(path.read_text() for path in (source, *_HEADERS))
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
    """Return the folder of compiled kernels: beside what JAX keeps of its own, else in the user's cache."""
    kept = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(kept or pathlib.Path(cache, "apr_jax"), "native")


def _cpu() -> str:
    """Describe this CPU: a library made on another machine may hold instructions that this one lacks."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features"))))
