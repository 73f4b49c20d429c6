"""Constrained decoding on the host: the tokens that a thread may draw next, in step with the device. No JAX.

A thread that decodes under a `Grammar` is in one of two modes. *Free*: it draws from the policy without the gate's
reserved tokens, and without the gate token itself except where the gate is open. The gate token leads into the second
mode. *Guided*: an `Automaton`, made for what the thread has written, lists the tokens that may come next to its end.

The distribution is the policy's, renormalised over what may be drawn at each position. Whether the gate is open may
depend on text that the device wrote a token ago, and reading text is the host's work. So the device draws as if the
gate were open wherever its token could stand (directly after a token of `Gate.follows`), and stops at it. The host
refuses it where the gate is shut, and the position is drawn again, with a fresh random number, without the gate. That
is exact: with p(gate) = g, a token t is drawn with p(t), or at the second try with g p(t) / (1 - g). The sum is
p(t) / (1 - g), the policy without the gate. That log-probability is recorded, whichever draw it was; the device
returns it beside the other. At temperature 0 the second draw is the argmax of what is left: the masked policy's.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

FREE, START = 0, 1  # states that every automaton has
NO_LIMIT = np.iinfo(np.int32).max
EDGE_FIELDS = 5  # source, token, target, low, high; the words of leaves follow

# Bans of a free position, beyond the tokens that nobody may draw.
BANS_NOTHING, BANS_RESERVED, BANS_GATE = 0, 1, 2  # a thread without grammar; the gate is open; it is shut


@dataclasses.dataclass(frozen=True)
class Gate:
    """Facts of constrained decoding that are known before anything is compiled."""

    token: int  # leads from free to guided
    reserved: tuple[int, ...]  # tokens that only an automaton writes
    follows: frozenset[int]  # the gate token stands directly after one of these
    max_edges: int  # of an automaton
    max_leaves: int  # of an automaton, and one less than the edges that leave a state

    @property
    def num_choices(self) -> int:
        """The most tokens that a guided position allows."""
        return self.max_leaves + 1

    @property
    def num_words(self) -> int:
        """The int32 words that hold a bit for each leaf."""
        return -(-self.max_leaves // 32)

    @property
    def table_shape(self) -> tuple[int, int]:
        """The shape of every automaton's table."""
        return self.max_edges + self.num_choices, EDGE_FIELDS + self.num_words


@dataclasses.dataclass(frozen=True)
class Edge:
    """A token that may follow in a state, while `low <= count <= high` and, if it names leaves, one of them is unused.

    An edge into START uses its leaves up and adds one to the count.
    """

    source: int
    token: int
    target: int
    low: int = 0
    high: int = NO_LIMIT
    leaves: int = 0  # bit mask


@dataclasses.dataclass(frozen=True)
class Registers:
    """The place of a walk over an automaton."""

    state: int = START
    used: int = 0  # bit mask of leaves
    count: int = 0  # returns to START


class Automaton:
    """A register automaton over tokens: choices out of a finite set of leaves, each at most once.

    States are renumbered: a state is 1 + the index of its first edge, so that a device finds its edges by slicing.
    """

    def __init__(self, gate: Gate, edges: Sequence[Edge]) -> None:
        """Take edges in any order, the states' numbers free but for FREE and START.

        Raises ValueError where they don't fit the gate's limits.
        """
        by_source: dict[int, list[Edge]] = {START: []}
        for edge in edges:
            by_source.setdefault(edge.source, []).append(edge)
        degree = max(map(len, by_source.values()))
        if len(edges) > gate.max_edges or degree > gate.num_choices:
            raise ValueError(
                f"an automaton of {len(edges)} edges, {degree} at one state; at most {gate.max_edges} and "
                f"{gate.num_choices} fit"
            )
        renumbered, first = {FREE: FREE}, 1
        for source, leaving in by_source.items():
            renumbered[source] = first
            first += len(leaving)
        self._gate = gate
        self._edges = {
            renumbered[source]: [
                dataclasses.replace(edge, source=renumbered[source], target=renumbered[edge.target]) for edge in leaving
            ]
            for source, leaving in by_source.items()
        }
        self._table: np.ndarray | None = None

    def choices(self, registers: Registers) -> tuple[int, ...]:
        """Return the tokens that may come next."""
        return tuple(edge.token for edge in self._open(registers))

    def step(self, registers: Registers, token: int) -> Registers:
        """Return the registers after one of the choices. Raises StopIteration for another token."""
        edge = next(edge for edge in self._open(registers) if edge.token == token)
        if edge.target != START:
            return dataclasses.replace(registers, state=edge.target)
        return Registers(START, registers.used | edge.leaves, registers.count + 1)

    def table(self) -> np.ndarray:
        """Return the edges as int32 `Gate.table_shape`, then rows of zeros, so that a slice never ends early."""
        if self._table is None:
            gate = self._gate
            self._table = np.zeros(gate.table_shape, np.int32)
            rows = [edge for leaving in self._edges.values() for edge in leaving]
            for row, edge in zip(self._table, rows, strict=False):
                row[:EDGE_FIELDS] = edge.source, edge.token, edge.target, edge.low, edge.high
                row[EDGE_FIELDS:] = words(edge.leaves, gate.num_words)
        return self._table

    def _open(self, registers: Registers) -> list[Edge]:
        unused = ~registers.used
        return [
            edge
            for edge in self._edges[registers.state]
            if edge.low <= registers.count <= edge.high and (not edge.leaves or edge.leaves & unused)
        ]


class Grammar(Protocol):
    """The rule that one Decode puts on its thread, read on the host from the thread's tokens alone."""

    closed: bool  # True: the gate is shut throughout

    def is_open(self, tokens: Sequence[int]) -> bool:
        """Return True where the gate token may follow `tokens`, which end in a token of `Gate.follows`.

        Not asked if `closed`.
        """

    def automaton(self, tokens: Sequence[int]) -> Automaton:
        """Return what must follow `tokens`, which end in the gate token, drawn where the gate was open."""


@dataclasses.dataclass(frozen=True)
class Masks:
    """The tokens that a constrained Decode might have drawn in each of its T places; a trainer scores with them."""

    bans: np.ndarray  # int8 [T]: BANS_RESERVED or BANS_GATE; not read at guided positions
    allowed: np.ndarray  # int32 [T, any]: the ids that a guided position allows, filled with -1; all -1 where free

    def first(self, count: int) -> "Masks":
        """Return the masks of the first `count` tokens."""
        return Masks(self.bans[:count], self.allowed[:count])


class Constraint:
    """The walk of one Decode through its grammar, token by token as the device did it."""

    def __init__(self, gate: Gate, grammar: Grammar) -> None:
        self._gate, self._grammar = gate, grammar
        self._redraw = False  # the gate was drawn while shut: the next token is drawn without it
        self._bans: list[int] = []
        self._allowed: list[tuple[int, ...]] = []
        self.automaton: Automaton | None = None  # None: free
        self.registers = Registers()

    @property
    def gate_from(self) -> int:
        """The first of the next tokens before which the gate may stand."""
        return NO_LIMIT if self._grammar.closed else int(self._redraw)

    def take(
        self, context: Sequence[int], tokens: Sequence[int], logprobs: Sequence[float], shut: Sequence[float]
    ) -> tuple[list[int], list[float]]:
        """Follow tokens that the device drew after `context`; return those that stand and their log-probabilities.

        Args:
            logprobs: as drawn.
            shut: the same without the gate token.
        """
        seen, kept = list(context), []
        for token, open_logprob, shut_logprob in zip(tokens, logprobs, shut, strict=True):
            if self.automaton is not None:
                self._record(BANS_GATE, self.automaton.choices(self.registers))
                self.registers = self.automaton.step(self.registers, token)
                if self.registers.state == FREE:
                    self.automaton = None
                kept.append(open_logprob)
                seen.append(token)
                continue
            is_open = self._may_open(seen[-1]) and self._grammar.is_open(seen)
            self._redraw = token == self._gate.token and not is_open
            if self._redraw:
                break
            self._record(BANS_RESERVED if is_open else BANS_GATE, ())
            kept.append(open_logprob if is_open else shut_logprob)
            seen.append(token)
            if token == self._gate.token:
                self.automaton, self.registers = self._grammar.automaton(seen), Registers()
        return seen[len(context) :], kept

    def masks(self) -> Masks:
        """Return the masks of all tokens taken so far."""
        width = max(map(len, self._allowed), default=0)
        allowed = np.full((len(self._allowed), width), -1, np.int32)
        for row, ids in zip(allowed, self._allowed, strict=True):
            row[: len(ids)] = ids
        return Masks(np.asarray(self._bans, np.int8), allowed)

    def _may_open(self, previous: int) -> bool:
        return not self._grammar.closed and not self._redraw and previous in self._gate.follows

    def _record(self, bans: int, allowed: tuple[int, ...]) -> None:
        self._bans.append(bans)
        self._allowed.append(allowed)


def words(leaves: int, count: int) -> np.ndarray:
    """Return a bit mask as int32 `[count]`, the lowest 32 bits first."""
    return np.asarray([leaves >> (32 * word) & 0xFFFFFFFF for word in range(count)], np.uint32).view(np.int32)
