"""Reading optimised HLO: the bytes that a program moves through memory, and the devices that talk to each other.

XLA's own cost analysis counts a loop's body once, gives nothing for GPUs and knows no collectives. Here each
computation counts as often as it runs. A loop's body runs as often as its condition says, where that compares with a
constant. Other loops count once, such as decode's, which ends when the lanes have stopped.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([0-9,]*)\](?:\{([^{}]*)\})?")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^{}]*\}|%[\w.\-]+)"
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_IOTA = re.compile(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[0-9,{}]*\})\}")
_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:[^()]|\([^()]*\))*\))? \{([^}]*)\}")
_COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast|reduce-scatter)"
    r"(-start)?\("
)
_BITS = re.compile(r"\d+")
_LIBRARY = re.compile(r'custom_call_target="__(cublas|cudnn)')
_ALIASED = re.compile(r"\{(\d*)\}: \(\d+, \{\}\)")  # an output of a kernel in an operand's place

_FREE = frozenset(
    {
        "parameter",
        "constant",
        "get-tuple-element",
        "tuple",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
        "iota",
    }
    | {"domain", "opt-barrier", "async-done", "async-update", "copy-done", "slice-done", "all-gather-done"}
    | {"all-reduce-done", "collective-permute-done", "send-done", "recv-done"}
)
_READS_A_PART = frozenset({"dynamic-slice", "gather", "slice"})
_BRANCHES = ("calls", "to_apply", "branch_computations", "called_computations")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line."""

    name: str
    opcode: str
    shape: str  # of the result, as written
    operands: tuple[str, ...]
    rest: str  # all that follows the operands
    line: str

    def called(self, *kinds: str) -> list[str]:
        """Return the computations that it names under attributes of these kinds."""
        return [name for kind, names in _CALLED.findall(self.rest) if kind in kinds for name in _OPERAND.findall(names)]


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of collective in a program, on one device."""

    kind: str
    count: int  # times that it runs
    payload: int  # bytes of the results (of reduce-scatter: of the operands), summed
    sent: float  # bytes that the device sends, on rings


class Program:
    """A compiled program's text, taken apart."""

    def __init__(self, text: str) -> None:
        self.computations, self.entry = _parse(text)
        self._moved: dict[str, int] = {}

    def bytes_moved(self) -> int:
        """Count the bytes that one device reads from and writes to its memory.

        Arrays in a TPU's vector memory (`S(1)`) cost nothing, a slice costs its own part, and a conditional costs the
        branch that moves most.
        """
        return self._moved_by(self.entry)

    def collectives(self, num_devices: int) -> list[Collective]:
        """Sum collectives by kind. A TPU's asynchronous ones appear in several fusions: each channel counts once."""
        counts: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0, 0.0])
        seen, runs = set(), self._runs
        for name, computation in self.computations.items():
            for instruction in computation.values():
                found = _COLLECTIVE.search(instruction.line)
                channel = _CHANNEL.search(instruction.line)
                if not found or not runs[name] or (channel and channel[1] in seen):
                    continue
                if channel:
                    seen.add(channel[1])
                payload = _payload(instruction, computation, found[1], bool(found[2]))
                size = group_size(instruction.line, num_devices)
                entry = counts[found[1]]
                entry[0] += runs[name]
                entry[1] += runs[name] * payload
                entry[2] += runs[name] * sent_bytes(found[1], payload, size)
        return [Collective(kind, int(n), int(payload), sent) for kind, (n, payload, sent) in sorted(counts.items())]

    @functools.cached_property
    def _runs(self) -> dict[str, int]:
        """Count how often each computation runs."""
        runs = dict.fromkeys(self.computations, 0)
        runs[self.entry] = 1
        for name in _callers_first(self.computations, self.entry):
            for instruction in self.computations[name].values():
                trips = self._trips(instruction) if instruction.opcode == "while" else 1
                for kind, names in _CALLED.findall(instruction.rest):
                    called = _OPERAND.findall(names)
                    for each in [max(called, key=self._moved_by)] if kind == "branch_computations" else called:
                        runs[each] += runs[name] * (trips if kind == "body" else 1)
        return runs

    def _moved_by(self, name: str) -> int:
        if name not in self._moved:
            computation = self.computations[name]
            self._moved[name] = sum(self._bytes(instruction, computation) for instruction in computation.values())
        return self._moved[name]

    def _trips(self, loop: Instruction) -> int:
        """Count the runs of a loop's body, where its condition compares a counter that starts at 0 with a constant."""
        if known := _TRIPS.search(loop.line):
            return int(known[1])
        (condition,) = loop.called("condition")
        lines = list(self._with_called(condition))
        constants = [int(found[1]) for i in lines if (found := re.search(r"[su]32\[\]\S* constant\((\d+)\)", i.line))]
        compares = [i for i in lines if i.opcode == "compare"]
        simple = len(compares) == 1 and "direction=LT" in compares[0].rest and len(constants) == 1
        return constants[0] if simple and not any(i.opcode in ("and", "reduce") for i in lines) else 1

    def _with_called(self, name: str) -> Iterator[Instruction]:
        for instruction in self.computations[name].values():
            yield instruction
            for called in instruction.called("calls", "to_apply"):
                yield from self._with_called(called)

    def _bytes(self, instruction: Instruction, computation: Computation) -> int:
        opcode, result = instruction.opcode, _bytes_of(_without_workspace(instruction), in_hbm=True)
        if opcode in _FREE:
            return 0
        if opcode == "while":
            return self._trips(instruction) * self._moved_by(instruction.called("body")[0])
        if opcode in ("conditional", "call", "async-start"):
            return max(map(self._moved_by, instruction.called(*_BRANCHES)), default=0)
        if opcode in ("copy-start", "slice-start"):  # (to, from, context)
            to, source = _parts(instruction.shape)[:2]
            return sum(_bytes_of(to) for end in (to, source) if _bytes_of(end, in_hbm=True))
        operands = [computation[name] for name in instruction.operands if name in computation]
        read = [_bytes_of(operand.shape, in_hbm=True) for operand in operands]
        if opcode in _READS_A_PART:
            return result + (_bytes_of(instruction.shape) if read and read[0] else 0)
        if opcode == "dynamic-update-slice":
            return 2 * _bytes_of(operands[1].shape) if result else read[1]
        if opcode == "fusion":
            return self._fusion_bytes(self.computations[instruction.called("calls")[0]], result, read)
        if opcode == "custom-call":  # a kernel writes only a part of an operand that it takes for its output
            written = _parts(instruction.shape)
            result -= sum(
                _bytes_of(written[int(output or 0)], in_hbm=True) for output in _ALIASED.findall(instruction.line)
            )
        return result + sum(read)

    def _fusion_bytes(self, fused: Computation, result: int, read: list[int]) -> int:
        users: dict[str, list[Instruction]] = collections.defaultdict(list)
        for instruction in fused.values():
            for operand in instruction.operands:
                users[operand].append(instruction)
        moved = 0
        updates = [i for i in fused.values() if i.opcode in ("dynamic-update-slice", "scatter")]
        updated = {_source(fused, update.operands[0]) for update in updates}
        for instruction in fused.values():
            if instruction.opcode != "parameter":
                continue
            index = int(re.search(r"parameter\((\d+)\)", instruction.line)[1])  # type: ignore[index]
            whole = read[index] if index < len(read) else 0
            if instruction.name in updated:
                continue
            using = users[instruction.name]
            if using and all(user.opcode in _READS_A_PART and user.operands[0] == instruction.name for user in using):
                moved += min(whole, sum(_bytes_of(user.shape) for user in using))
            else:
                moved += whole
        if updates and result:
            written = [update.operands[-1 if update.opcode == "scatter" else 1] for update in updates]
            small = sum(_bytes_of(fused[name].shape) for name in written)
            whole = sum(_bytes_of(update.shape) for update in updates)
            return moved + 2 * small + max(0, result - whole)
        return moved + result


def _payload(instruction: Instruction, computation: Computation, kind: str, is_start: bool) -> int:
    """Count bytes of a collective's results, of a reduce-scatter's operands. A started one's shape may name both."""
    operands = sum(_bytes_of(computation[name].shape) for name in instruction.operands if name in computation)
    result = _bytes_of(instruction.shape)
    if kind == "reduce-scatter":
        return operands
    if is_start and kind == "all-gather":
        return result - operands
    return operands if is_start and kind != "all-reduce" else result


def group_size(line: str, num_devices: int) -> int:
    """Count the devices that a collective's line lets talk to each other."""
    if named := _AXES.search(line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
    if "source_target_pairs" in line:
        return 2
    return len(groups(line, num_devices)[0])


def groups(line: str, num_devices: int) -> list[list[int]]:
    """Return the places in the mesh's order of devices that a collective's line lets talk to each other."""
    if iota := _IOTA.search(line):
        shape, order = (list(map(int, part.split(","))) for part in iota.groups()[:2])
        ids = np.arange(math.prod(order)).reshape(order)
        ids = ids.transpose(list(map(int, iota[3].split(",")))) if iota[3] else ids
        return ids.reshape(shape).tolist()
    if listed := _LISTED.search(line):
        return [list(map(int, group.split(","))) for group in re.findall(r"\{([0-9,]+)\}", listed[1])]
    return [list(range(num_devices))]


def sent_bytes(kind: str, payload: int, size: int) -> float:
    """Count the bytes that each of `size` devices sends in a collective on a ring.

    Args:
        payload: the whole result of all-gather and all-to-all, the whole operand of reduce-scatter, and each device's
            part for the others.
    """
    if size < 2:
        return 0.0
    share = (size - 1) / size
    return payload * {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}.get(kind, share)


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[1], {})
            entry = header[1] if line.startswith("ENTRY") else entry
        elif line == "}":  # a kernel's own text may hold lines that begin with one
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(line, found)
            if instruction is not None:
                current[instruction.name] = instruction
    return computations, entry


def _instruction(line: str, found: re.Match[str]) -> Instruction | None:
    text = found[2]
    end = _closing(text) if text.startswith("(") else 0
    opcode = _OPCODE.search(text, end if end else 0)
    if not opcode:
        return None
    start = opcode.end() - 1
    stop = start + _closing(text[start:])
    operands = tuple(_OPERAND.findall(text[start:stop]))
    return Instruction(found[1], opcode[1], text[: opcode.start()], operands, text[stop:], line)


def _closing(text: str) -> int:
    """Return the place behind the parenthesis that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0 and letter == ")":
            return place + 1
    return len(text)


def _callers_first(computations: dict[str, Computation], entry: str) -> list[str]:
    """Sort computations so that each comes behind all that call it."""
    order: list[str] = []
    done = set()
    stack = [(entry, False)]
    while stack:
        name, finished = stack.pop()
        if finished:
            order.append(name)
        elif name not in done:
            done.add(name)
            stack.append((name, True))
            for instruction in computations[name].values():
                stack += [(c, False) for _, names in _CALLED.findall(instruction.rest) for c in _OPERAND.findall(names)]
    return order[::-1]


def _source(computation: Computation, name: str) -> str:
    """Return the instruction behind bitcasts and copies."""
    while name in computation and computation[name].opcode in ("bitcast", "copy", "convert", "reshape"):
        name = computation[name].operands[0]
    return name


def _without_workspace(instruction: Instruction) -> str:
    """Return the shapes of a result without the scratch memory of cuBLAS or cuDNN, which no caller reads."""
    parts = _parts(instruction.shape)
    has_one = len(parts) > 1 and re.match("[su]8\\[", parts[-1]) and _LIBRARY.search(instruction.rest)
    return " ".join(parts[:-1]) if has_one else instruction.shape


def _parts(shape: str) -> list[str]:
    """Return the arrays of a tuple's shape, as written."""
    return [found[0] for found in re.finditer(_SHAPE, shape)]


def _bytes_of(shape: str, in_hbm: bool = False) -> int:
    """Count bytes of an array or of all arrays of a tuple; `in_hbm`: without those in another memory space."""
    total = 0
    for dtype, dims, layout in _SHAPE.findall(shape):
        if in_hbm and re.search(r"S\([1-9]\d*\)", layout):
            continue
        bits = 8 if dtype == "pred" else int(found[0]) if (found := _BITS.search(dtype)) else 0
        total += math.prod(map(int, dims.split(","))) * bits // 8 if dims else bits // 8
    return total
