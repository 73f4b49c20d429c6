"""Constrained decoding on the device: `constraints.py` for one lane at one step, lifted over lanes by its callers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from apr_jax.engine.constraints import BANS_GATE, BANS_NOTHING, BANS_RESERVED, EDGE_FIELDS, FREE, START, Gate
from apr_jax.model.sampling import probability_of_others


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GateMasks:
    """`constraints.Gate` as arrays; the same for all lanes."""

    token: jax.Array  # int32 scalar
    reserved_mask: jax.Array  # bool [V]
    follows_mask: jax.Array  # bool [V]
    num_choices: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LaneRegisters:
    """`constraints.Registers` of the lanes, [...]."""

    state: jax.Array  # int32; FREE: not guided
    used: jax.Array  # int32 [.., W], a bit mask
    count: jax.Array  # int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LaneConstraints:
    """The grammars of a decode chunk's lanes and their states, [...]."""

    edges: jax.Array  # int32 [.., max_edges + num_choices, EDGE_FIELDS + W]
    gate_from: jax.Array  # int32: the chunk's first step at which the gate may stand; -1: a thread without grammar
    registers: LaneRegisters


def gate_masks(gate: Gate, vocab_size: int) -> GateMasks:
    """Return the gate's arrays (NumPy) for a model of `vocab_size`."""
    reserved_mask, follows_mask = np.zeros((2, vocab_size), bool)
    reserved_mask[list(gate.reserved)] = True
    follows_mask[list(gate.follows)] = True
    return GateMasks(np.int32(gate.token), reserved_mask, follows_mask, gate.num_choices)  # type: ignore[arg-type]


def banned_mask(banned_mask_V: jax.Array, gate: GateMasks, bans: jax.Array, allowed_D: jax.Array) -> jax.Array:
    """Return what may not be drawn at one position, bool [V]. Engine and trainer both ask here.

    Args:
        banned_mask_V: bool, tokens that nobody may draw.
        bans: int32 scalar, BANS_NOTHING, BANS_RESERVED or BANS_GATE; read at a free position.
        allowed_D: int32, ids that a guided position allows, -1 elsewhere; all -1 at a free position.
    """
    size = banned_mask_V.shape[0]
    free_V = banned_mask_V | (gate.reserved_mask & (bans >= BANS_RESERVED))
    free_V = free_V | ((jnp.arange(size) == gate.token) & (bans >= BANS_GATE))
    # -1 would count from the end: out of range it is dropped.
    guided_V = jnp.ones((size,), bool).at[jnp.where(allowed_D < 0, size, allowed_D)].set(False, mode="drop")
    return jnp.where(jnp.any(allowed_D >= 0), guided_V, free_V)


def open_edges(edges_EF: jax.Array, registers: LaneRegisters, num_choices: int) -> tuple[jax.Array, jax.Array]:
    """Return the edges `[D, F]` from a state's first on, and which of them (bool `[D]`) may be taken."""
    state = registers.state
    edges_DF = jax.lax.dynamic_slice_in_dim(edges_EF, jnp.maximum(state - 1, 0), num_choices, axis=0)
    leaves_DW = edges_DF[:, EDGE_FIELDS:]
    unused_DW = leaves_DW & ~registers.used[None, :]
    open_D = (edges_DF[:, 0] == state) & (state != FREE)
    open_D &= (edges_DF[:, 3] <= registers.count) & (registers.count <= edges_DF[:, 4])
    open_D &= jnp.all(leaves_DW == 0, axis=1) | jnp.any(unused_DW != 0, axis=1)
    return edges_DF, open_D


def follow(edges_DF: jax.Array, open_D: jax.Array, registers: LaneRegisters, drawn: jax.Array) -> LaneRegisters:
    """Return the registers after `drawn`; unchanged where no edge is open."""
    taken_D = open_D & (edges_DF[:, 1] == drawn)
    edge_F = jnp.sum(jnp.where(taken_D[:, None], edges_DF, 0), axis=0)  # at most one is taken
    any_taken = jnp.any(taken_D)
    state = jnp.where(any_taken, edge_F[2], registers.state)
    returned = any_taken & (state == START)
    return LaneRegisters(
        state,
        jnp.where(returned, registers.used | edge_F[EDGE_FIELDS:], registers.used),
        registers.count + returned.astype(jnp.int32),
    )


@dataclasses.dataclass(frozen=True)
class StepConstraint:
    """The tokens that one lane may draw at one step, and the effect of a draw."""

    banned_mask: jax.Array  # bool [V]
    _gate: GateMasks
    _registers: LaneRegisters
    _bans: jax.Array
    _edges: tuple[jax.Array, jax.Array]  # of `open_edges`

    def pauses(self, drawn: jax.Array) -> jax.Array:
        """Return True where the lane must wait for the host after this token: the gate, in a thread with a grammar."""
        return (drawn == self._gate.token) & (self._bans != BANS_NOTHING)

    def after(self, logprobs_V: jax.Array, drawn: jax.Array) -> tuple[LaneRegisters, jax.Array]:
        """Return the registers after a draw, and the log-probability that it has without the gate token."""
        others = probability_of_others(logprobs_V, self._gate.token)
        shut = jnp.where(self._bans == BANS_RESERVED, logprobs_V[drawn] - jnp.log(others), logprobs_V[drawn])
        return follow(*self._edges, self._registers, drawn), shut


def constrain_step(
    lane: LaneConstraints, gate: GateMasks, banned_mask_V: jax.Array, token: jax.Array, step: jax.Array
) -> StepConstraint:
    """Return what a lane may draw after `token` at a step, the gate taken to be open wherever it may stand."""
    may_open = gate.follows_mask[token] & (step >= lane.gate_from)
    bans = jnp.where(lane.gate_from < 0, BANS_NOTHING, jnp.where(may_open, BANS_RESERVED, BANS_GATE))
    edges_DF, open_D = open_edges(lane.edges, lane.registers, gate.num_choices)
    allowed_D = jnp.where(open_D, edges_DF[:, 1], -1)
    return StepConstraint(
        banned_mask(banned_mask_V, gate, bans, allowed_D), gate, lane.registers, bans, (edges_DF, open_D)
    )
