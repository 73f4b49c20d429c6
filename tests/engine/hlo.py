"""Reading optimised HLO: which arrays are copied, which inputs become outputs, and who talks over the data axis."""

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh

from apr_jax.aot.hlo import groups

_COPY = re.compile(r"^\s*(?:ROOT )?%?\S+ = (.*?) copy(?:-start)?\(")
_COLLECTIVE = re.compile(
    r" (?:all-reduce|all-gather|(?:ragged-)?all-to-all|collective-permute|collective-broadcast|reduce-scatter)"
    r"(?:-start)?\("
)
_SHAPE = re.compile(r"\b[a-z]+[0-9]*[a-z0-9]*\[([0-9,]*)\]")
_ALIAS = re.compile(r"\{(\d*)\}: \((\d+), \{\}, (?:may|must)-alias\)")


def step_texts(engine: Any) -> dict[str, str]:
    """The optimised HLO of an engine's device programs."""
    return {name: text_of(step, arguments) for name, (step, arguments) in programs_of(engine).items()}


def programs_of(engine: Any) -> dict[str, Any]:
    """The engine's device programs, each with what it is called with."""
    filler, limits = engine._filler, engine.limits
    lanes, workers = engine._pack(filler.decode()[0]), engine._pack(filler.groups()[0]) if limits.max_workers else None
    sampling, prefill = engine._sampling(1.0), engine._prefill_lanes([])
    return engine._steps.programs(engine._pages, engine._params, lanes, sampling, prefill, workers)


def text_of(step: Any, arguments: Any) -> str:
    return step.jitted.lower(*arguments).compile().as_text()


def local_sizes(cache: Any) -> set[int]:
    """Elements of one device's part of each array."""
    return {array.addressable_shards[0].data.size for array in jax.tree.leaves(cache)}


def collectives(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if _COLLECTIVE.search(line)]


def copies_of(text: str, sizes: set[int]) -> list[str]:
    """The instructions that copy an array of as many elements as one of `sizes`, whatever its shape and layout."""
    return [
        line.strip()
        for line in text.splitlines()
        if (found := _COPY.search(line)) and sizes & {_elements(shape) for shape in _SHAPE.findall(found[1])}
    ]


def aliases(text: str) -> dict[int, int]:
    """Which input each output takes the memory of."""
    return {int(output or 0): int(source) for output, source in _ALIAS.findall(text.partition("\n")[0])}


def collectives_over_data(text: str, mesh: Mesh) -> list[str]:
    """The collectives that join devices of different places on the mesh axis "data", its first."""
    per_shard = mesh.size // mesh.shape["data"]
    return [
        line
        for line in collectives(text)
        if any(len({device // per_shard for device in group}) > 1 for group in groups(line, mesh.size))
    ]


def _elements(shape: str) -> int:
    return math.prod(map(int, shape.split(","))) if shape else 1
