"""Speed of an accelerator beside its checks (`accelerator.py`), and the page that shows all of it."""

import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from apr_jax.bench import decode, training_report
from apr_jax.bench.accelerator import fitted
from apr_jax.bench.agreement import sharp_params
from apr_jax.bench.training import Session
from apr_jax.config import Config
from apr_jax.evaluation.report.page import render
from apr_jax.files import write
from apr_jax.parallel.device_memory import memory_limit
from apr_jax.paths import path_of

Row = dict[str, Any]

_LANES = (64, 256)  # of a data shard
_SECONDS = 1.0  # that each lane count decodes at least
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def about(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Describe the devices, the versions that compute, and the whole model."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    limit = memory_limit(mesh)
    return decode.about(config, mesh) | {
        "config": config.name,
        "kernel": decode.kernel_name(config, mesh),
        "memory_gb": None if limit is None else limit / 1e9,
        "versions": {"python": platform.python_version(), **versions},
    }


def measurements(config: Config, mesh: Mesh) -> dict[str, Callable[[], Row]]:
    """Return what can be measured of the whole model, by name; each call does it."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    config = fitted(config, mesh, 1 if on_cpu else 4)
    effort = decode.Effort.on(mesh, config)
    contexts = [config.model.max_seq_len // 2] if on_cpu else None
    lengths = decode.lengths_to_measure(config.model, mesh, effort, contexts, None)
    lanes = (8,) if on_cpu else tuple(count * mesh.shape["data"] for count in _LANES)
    effort = dataclasses.replace(effort, lanes=lanes, uncounted=0, passes=1, seconds=0.0 if on_cpu else _SECONDS)
    decoding = {f"decode, {each.prompt} + {each.new} tokens": _decoding(config, mesh, each, effort) for each in lengths}
    first, *others = decoding.items()
    return dict([first, ("SFT step", _training(config)), *others])


def _decoding(config: Config, mesh: Mesh, lengths: decode.Lengths, effort: decode.Effort) -> Callable[[], Row]:
    def run() -> Row:
        said: list[str] = []
        params = sharp_params(config.model, config.seed)
        lanes = decode.lanes_to_measure(config, params, mesh, None, lengths, effort, said.append)
        figures = decode.benchmark_decode(config, params, lanes, lengths, effort)
        return {"text": "\n".join([*said, decode.table(figures)]), "figures": figures}

    return run


def _training(config: Config) -> Callable[[], Row]:
    sft = dataclasses.replace(config.sft, optimizer=dataclasses.replace(config.sft.optimizer, name="adamw"))

    def run() -> Row:
        session = Session(peers=(), turns=1, seconds_limit=0.0, say=lambda _: None)
        figures = training_report.measure(dataclasses.replace(config, sft=sft), ["sft"], session)
        return {"text": training_report.table(figures), "figures": figures}

    return run


def measured(measure: Callable[[], Row]) -> Row:
    """Run a measurement, and describe what came out; what it raises is its result, too."""
    began = time.perf_counter()
    try:
        row = measure()
    except Exception as error:  # what cannot be measured must not stop the rest
        row = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    return row | {"seconds": time.perf_counter() - began}


def failures(figures: Mapping[str, Any]) -> list[str]:
    """Return the names of the checks that do not agree, and of what could not be measured."""
    rows = {**figures["checks"], **figures["speed"]}
    return [name for name, row in rows.items() if not row.get("agrees", True) or "error" in row]


def heading(figures: Mapping[str, Any]) -> str:
    """Write for people which devices are checked, and with what."""
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    memory = "" if figures["memory_gb"] is None else f", {figures['memory_gb']:.1f} GB each for programs"
    count = int(np.prod(list(figures["mesh"].values())))
    return (
        f"{count} x {figures['device']}{memory}; {figures['config']}, {figures['model']['num_params']:,} parameters; "
        f"attention by {figures['kernel']}\n{versions}"
    )


def line(name: str, row: Row) -> str:
    """Write a line, or a table, about a check or a measurement."""
    said = f"{name:<28} {verdict(row):<8} {row.get('seconds', 0.0):>5.0f} s  "
    if "error" in row or "left_out" in row:
        return said + str(row.get("error") or row.get("left_out"))
    return said + distances(row) if "found" in row else f"{said}\n{row['text']}"


def verdict(row: Row) -> str:
    """Say in a word what came of a check or a measurement."""
    if "left_out" in row:
        return "left out"
    if "error" in row:
        return "FAILED"
    return "measured" if "agrees" not in row else "agrees" if row["agrees"] else "DIFFERS"


def distances(row: Row) -> str:
    """Write what a check found beside what it may be at most."""
    most = row["tolerances"]
    return ", ".join(
        f"{name} {value:.2g} (at most {most[name]:.2g})" if name in most else f"{name} {value:,.0f}"
        for name, value in row["found"].items()
    )


def write_page(path: str, figures: Mapping[str, Any]) -> None:
    """Write all of it as one self-contained page."""
    checks = [
        {
            "name": name,
            "verdict": verdict(row),
            "agrees": row["agrees"],
            "seconds": f"{row['seconds']:.0f}",
            "found": row.get("error") or distances(row),
            "reason": row["reason"],
        }
        for name, row in figures["checks"].items()
    ]
    speed = [
        {"name": name, "text": row.get("text") or row.get("error") or row["left_out"]}
        for name, row in figures["speed"].items()
    ]
    html = render("accelerator.html", heading=heading(figures), checks=checks, speed=speed, failed=failures(figures))
    write(path_of(path), html.encode())
