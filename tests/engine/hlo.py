"""Reading optimised HLO: which arrays are copied, which inputs become outputs, which devices talk to each other."""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

_COPY = re.compile(r"^\s*(?:ROOT )?%?\S+ = (.*?) copy(?:-start)?\(")
_SHAPE = re.compile(r"\b[a-z]+[0-9]*[a-z0-9]*\[([0-9,]*)\]")
_ALIAS = re.compile(r"\{(\d*)\}: \((\d+), \{\}, (?:may|must)-alias\)")
_COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast|reduce-scatter)"
    r"(-start)?\("
)
_IOTA = re.compile(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[0-9,{}]*\})\}")


def step_texts(engine: Any) -> dict[str, str]:
    """The optimised HLO of an engine's device programs."""
    steps, policy = engine._steps, engine._policy(1.0)
    pages, params = engine._pages, engine._params
    prefill = engine._prefill_lanes([])
    fresh = steps._compute.eval_shape(pages, params, prefill)
    pairs = engine._put(np.zeros((engine.limits.num_shards, 16), np.int32))
    lowered = {
        "decode": steps.decode.lower(pages, engine._rows, params, engine._decode_lanes()[0], policy),
        "prefill": steps._compute.lower(pages, params, prefill),
        "write": steps._write.lower(pages, prefill, fresh),
        "copy_pages": steps.copy_pages.lower(pages, pairs, pairs),
    }
    return {name: step.compile().as_text() for name, step in lowered.items()}


def local_sizes(cache: Any) -> set[int]:
    """Elements of one device's part of each array."""
    return {array.addressable_shards[0].data.size for array in jax.tree.leaves(cache)}


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


def groups(line: str, num_devices: int) -> list[list[int]]:
    """The places in the mesh's order of devices that a collective's line lets talk to each other."""
    if iota := _IOTA.search(line):
        shape, order = (list(map(int, part.split(","))) for part in iota.groups()[:2])
        ids = np.arange(math.prod(order)).reshape(order)
        ids = ids.transpose(list(map(int, iota[3].split(",")))) if iota[3] else ids
        return ids.reshape(shape).tolist()
    if listed := _LISTED.search(line):
        return [list(map(int, group.split(","))) for group in re.findall(r"\{([0-9,]+)\}", listed[1])]
    return [list(range(num_devices))]


def collectives(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if _COLLECTIVE.search(line)]


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
