"""Compiling the C++ kernels, registering them with XLA, and calling them.

The machine's C++ compiler makes them when they are first asked for. Where there is no compiler, or they cannot be made,
everything runs as XLA compiles it, and a warning says so.
"""

import contextlib
import ctypes
import functools
import logging
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from apr_jax.caches import cache_folder, checksum, keep
from apr_jax.progress import busy

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
_VERSION_SECONDS = 20.0  # a compiler that takes longer to say its version will not do
_COMPILE_SECONDS = 120.0

_log = logging.getLogger(__name__)


@functools.cache
def is_available() -> bool:
    """Return True if this process has the kernels, which are made and registered when it is first asked."""
    try:
        libraries = made()
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("no kernels for this CPU, so decoding takes twice the time, training 1.2 times: %s", error)
        return False
    for source, targets in _TARGETS.items():
        for target in targets:
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(libraries[source][target]), platform="cpu")  # type: ignore[no-untyped-call]
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


def made() -> dict[pathlib.Path, ctypes.CDLL]:
    """Return each source's shared library, compiled for this CPU unless an earlier process has done so.

    Raises OSError or subprocess.SubprocessError where they cannot be made; the message says why.
    """
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise OSError(f"no C++ compiler here; install one of {', '.join(_COMPILERS)}")
    version = _run([[compiler, "--version"]], _VERSION_SECONDS)
    common = (*_FLAGS, compiler, version, jax.__version__, platform.machine(), _cpu())
    names, libraries = {}, {}
    for source in _TARGETS:
        texts = tuple(path.read_text() for path in (source, *_HEADERS))
        names[source] = checksum(repr((*texts, *common)).encode())
        if (kept := _kept(source, names[source])) is not None:
            libraries[source] = kept
    missing = [source for source in _TARGETS if source not in libraries]
    if missing:
        with busy("Compiling the kernels for this CPU"), tempfile.TemporaryDirectory() as folder:
            for source, path in _compiled(compiler, missing, pathlib.Path(folder)).items():
                libraries[source] = _load(path, source)
                _keep(path, names[source])
    return libraries


def _kept(source: pathlib.Path, name: str) -> ctypes.CDLL | None:
    """Return the library that an earlier process kept. Delete what is not as it was: loading it may end the process."""
    folder = _folder()
    for path in folder.glob(f"{name}-*.so") if folder is not None else ():
        with contextlib.suppress(OSError):
            if path.stem == f"{name}-{checksum(path.read_bytes())}":
                return _load(path, source)
            path.unlink()
    return None


def _keep(path: pathlib.Path, name: str) -> None:
    folder, data = _folder(), path.read_bytes()
    if folder is None:
        return
    try:
        keep(folder / f"{name}-{checksum(data)}.so", data)
    except OSError as error:
        _log.warning("the kernels cannot be kept in %s (%s), so each start compiles them", folder, error.strerror)


def _compiled(compiler: str, sources: Sequence[pathlib.Path], folder: pathlib.Path) -> dict[pathlib.Path, pathlib.Path]:
    """Compile sources, each by a process, and try in one more that what came out can be loaded."""
    paths = {source: folder / f"{source.stem}.so" for source in sources}
    how = [compiler, *_FLAGS, "-isystem", jax.ffi.include_dir()]
    _run([[*how, str(source), "-o", str(path)] for source, path in paths.items()], _COMPILE_SECONDS)
    load = "import ctypes, sys; [ctypes.CDLL(path) for path in sys.argv[1:]]"
    try:
        _run([[sys.executable, "-c", load, *map(str, paths.values())]], _COMPILE_SECONDS)
    except subprocess.SubprocessError as error:
        raise OSError(f"what {compiler} made cannot be loaded") from error
    return paths


def _run(commands: Sequence[Sequence[str]], seconds: float) -> str:
    """Run commands at once, with no more than this time for all, and return their output.

    Raises SubprocessError with the output of one that fails, or for one that takes longer. None outlives the call.
    """
    with contextlib.ExitStack() as stack:
        running = []
        for command in commands:
            output = stack.enter_context(tempfile.TemporaryFile())
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            stack.callback(_end, process)
            running.append((process, output))
        deadline, texts = time.monotonic() + seconds, []
        for process, output in running:
            try:
                code = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired as error:
                raise subprocess.SubprocessError(f"{commands[0][0]} has not ended after {seconds:.0f} s") from error
            output.seek(0)
            texts.append(output.read().decode(errors="replace").strip())
            if code:
                raise subprocess.SubprocessError(texts[-1] or f"{commands[0][0]} ended with {code} and no word")
        return "\n".join(texts)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and those that it started, which a compiler does."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _load(path: pathlib.Path, source: pathlib.Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for target in _TARGETS[source]:
        if not hasattr(library, target):
            raise OSError(f"{path} lacks {target}")
    return library


def _folder() -> pathlib.Path | None:
    """Return the folder of compiled kernels: beside what JAX keeps of its own."""
    given = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    kept = pathlib.Path(given) if given else cache_folder()
    return None if kept is None else kept / "native"


def _cpu() -> str:
    """Describe this CPU: a library made on another machine may hold instructions that this one lacks."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features"))))
