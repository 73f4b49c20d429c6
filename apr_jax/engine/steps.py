"""The device's programs: decode, page copies and (`prefill.py`) prefill, each compiled once.

A step is one forward over the lanes' tokens. Each data shard runs its own lanes on its own pages (`shard_map` over the
mesh axis "data"), with a loop of its own length and no communication. Within a shard, heads may be split over "tensor"
by the compiler.

Every shape is fixed by the configuration, and no floating-point reduction runs over lanes. So a lane's numbers do not
depend on its neighbours, bit for bit.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from apr_jax.engine import policy_masks
from apr_jax.engine.decode_cache import DecodeCache, PagesInPlace
from apr_jax.engine.group_cache import GroupCache
from apr_jax.engine.lanes import DecodeLanes, GroupLanes, Written
from apr_jax.engine.limits import Limits
from apr_jax.engine.pack_arrays import PackedArrays, unpack_arrays
from apr_jax.engine.prefill import choose_prefill
from apr_jax.engine.sharded import PAGES, SHARDED, ShardedStep
from apr_jax.kernels import DecodeKernels, products
from apr_jax.model.held_weights import HeldWeights
from apr_jax.model.llama import Llama
from apr_jax.model.ops import Ops, draw_from
from apr_jax.model.paged_cache import PagedKVCache, copy_pages, pages_per_row
from apr_jax.model.sampling import log_probs, sample, uniforms
from apr_jax.model.truncation import Truncation, count_kept, truncated
from apr_jax.parallel.mesh import partition_spec

COPIES_PER_CALL = 16  # page copies a call; more take more calls

_constrain: Callable[..., jax.Array] = jax.lax.with_sharding_constraint


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """The parameters of drawing tokens."""

    temperature: jax.Array  # float32 scalar
    banned_mask: jax.Array  # bool [V]
    gate: policy_masks.GateMasks | None = None
    truncation: Truncation = dataclasses.field(default=Truncation(), metadata={"static": True})


class Drawn(NamedTuple):
    """The draws of a step, for each lane."""

    token_L: jax.Array
    logprob_L: jax.Array
    pauses_L: jax.Array | bool = False  # lanes that wait for the host from here on
    kept_L: jax.Array | None = None  # int32: the tokens that a truncated policy left to draw from
    # Of an engine with a gate: the lanes' registers, and the log-probabilities without the gate token.
    gated: tuple[policy_masks.LaneRegisters, jax.Array] | None = None


def draw_tokens(
    ops: Ops,
    logits_LV: jax.Array,
    uniform_L: jax.Array,
    sampling: Sampling,
    constraints: policy_masks.LaneConstraints | None,
    token_L: jax.Array,
    step: jax.Array,
) -> Drawn:
    """Draw each lane's next token."""
    gate, banned_mask, temperature = sampling.gate, sampling.banned_mask, sampling.temperature
    if constraints is None or gate is None:
        if not sampling.truncation.cuts:
            return Drawn(*ops.draw(logits_LV, temperature, banned_mask, uniform_L))
        logprobs_LV = truncated(log_probs(logits_LV, temperature, banned_mask), sampling.truncation)
        return Drawn(*draw_from(logprobs_LV, temperature, uniform_L), kept_L=count_kept(logprobs_LV))

    def constrained(
        logits_V: jax.Array, uniform: jax.Array, constraints: policy_masks.LaneConstraints, token: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, tuple[policy_masks.LaneRegisters, jax.Array]]:
        constraint = policy_masks.constrain_step(constraints, gate, banned_mask, token, step)
        logprobs_V = log_probs(logits_V, temperature, constraint.banned_mask)
        drawn = sample(logprobs_V, uniform, temperature)
        return drawn, logprobs_V[drawn], constraint.pauses(drawn), constraint.after(logprobs_V, drawn)

    token_L, logprob_L, pauses_L, after = jax.vmap(constrained)(logits_LV, uniform_L, constraints, token_L)
    return Drawn(token_L, logprob_L, pauses_L, gated=after)


def decode_shard(
    model: Llama, steps: int, cache: DecodeCache, lanes: DecodeLanes, sampling: Sampling
) -> tuple[PagedKVCache, Written]:
    """Decode a chunk on one shard (no shard axis): up to `steps` tokens a lane, fewer when all have stopped.

    A chunk is not left while any lane goes on: where a thread's chunks begin, and with that how its attention is
    summed, is then a function of the thread alone.
    """
    num_lanes = lanes.token.shape[0]
    uniforms_LC = jax.vmap(lambda key, first: uniforms(key, first, steps))(lanes.key_data, lanes.generated)

    def live(state: tuple[Any, ...]) -> jax.Array:
        step, _, _, remaining_L, *_ = state
        return (step < steps) & jnp.any(remaining_L > 0)

    def body(state: tuple[Any, ...]) -> tuple[Any, ...]:
        step, carried, token_L, remaining_L, counts_L, tokens_CL, logprobs_CL, kept_CL, gated = state
        hidden_LD, view = model(token_L, cache.view(carried, step, remaining_L > 0))
        # Gathered over "tensor" before the draw: sampling on split logits would take a dozen small collectives.
        logits_LV: jax.Array = _constrain(model.logits(hidden_LD), partition_spec())
        uniform_L = jax.lax.dynamic_index_in_dim(uniforms_LC, step, axis=1, keepdims=False)
        constraints = lanes.constraints and dataclasses.replace(lanes.constraints, registers=gated[0])
        drawn = draw_tokens(model.ops, logits_LV, uniform_L, sampling, constraints, token_L, step)
        # A stopped thread's further results are not used.
        stopped_L = jnp.any(drawn.token_L[:, None] == lanes.stop_tokens, axis=1) | drawn.pauses_L
        left_L = jnp.where(stopped_L, 0, jnp.maximum(remaining_L - 1, 0))
        note = functools.partial(jax.lax.dynamic_update_index_in_dim, index=step, axis=0)
        if drawn.gated is not None:
            gated = drawn.gated[0], note(gated[1], drawn.gated[1])
        if drawn.kept_L is not None:
            kept_CL = note(kept_CL, drawn.kept_L)
        tokens_CL, logprobs_CL = note(tokens_CL, drawn.token_L), note(logprobs_CL, drawn.logprob_L)
        counts_L = counts_L + (remaining_L > 0).astype(jnp.int32)
        after = tokens_CL, logprobs_CL, kept_CL, gated
        return step + 1, cache.carried(view), drawn.token_L, left_L, counts_L, *after

    state = (
        jnp.int32(0),
        cache.start(),
        lanes.token,
        lanes.remaining,
        jnp.zeros((num_lanes,), jnp.int32),
        jnp.zeros((steps, num_lanes), jnp.int32),
        jnp.zeros((steps, num_lanes), jnp.float32),
        jnp.zeros((steps, num_lanes), jnp.int32) if sampling.truncation.cuts else None,
        None
        if lanes.constraints is None
        else (lanes.constraints.registers, jnp.zeros((steps, num_lanes), jnp.float32)),
    )
    ran, carried, _, _, counts_L, tokens_CL, logprobs_CL, kept_CL, gated = jax.lax.while_loop(live, body, state)
    shut_CL = None if gated is None else gated[1]
    return cache.finish(carried, counts_L), Written(tokens_CL, logprobs_CL, shut_CL, kept_CL, counts_L, ran)


class Steps:
    """The device programs of one engine. Each donates the cache and returns its successor. Lanes may come packed."""

    def __init__(self, limits: Limits, mesh: Mesh, weights: HeldWeights, kernels: DecodeKernels):
        self.pages_per_row = pages_per_row(limits.max_seq_len, limits.page_size)
        structure, config, attention = weights.graphdef(), weights.config, kernels.attention

        def decode(
            pages: PagedKVCache, params: Any, lanes: DecodeLanes | PackedArrays, sampling: Sampling
        ) -> tuple[PagedKVCache, Written]:
            model, each = nnx.merge(structure, params), unpack_arrays(lanes)
            cache = PagesInPlace(config, attention, pages, each.tables, each.length)
            return decode_shard(model, limits.steps_per_visit, cache, each, sampling)

        def decode_groups(
            pages: PagedKVCache, params: Any, groups: GroupLanes | PackedArrays, sampling: Sampling
        ) -> tuple[PagedKVCache, Written]:
            model, each = nnx.merge(structure, params), unpack_arrays(groups)
            steps, workers = limits.steps_per_visit, limits.max_workers
            cache = GroupCache.open(config, attention.tile, pages, each, steps=steps, workers=workers)
            return decode_shard(model, steps, cache, each.lanes, sampling)

        tracing = functools.partial(products, config, mesh.devices.flat[0].platform)
        whole = partition_spec()
        pages_out, written_out = NamedSharding(mesh, PAGES), NamedSharding(mesh, SHARDED)
        decode_specs, outs = (SHARDED, whole, SHARDED, whole), (pages_out, written_out)
        self.decode = ShardedStep(decode, mesh, decode_specs, outs, tracing=tracing)
        # Lowered when it is first needed: an engine without groups has no such program.
        self.decode_groups = ShardedStep(decode_groups, mesh, decode_specs, outs, tracing=tracing)
        self.copy_pages = ShardedStep(copy_pages, mesh, (SHARDED, SHARDED, SHARDED), pages_out)
        self.prefill = choose_prefill(structure, kernels, limits, mesh, tracing)
        shape: Callable[..., Any] = jax.ShapeDtypeStruct
        self._copies_shape = shape((limits.num_shards, COPIES_PER_CALL), jnp.int32, sharding=written_out)
        self._all = (self.decode, self.decode_groups, self.copy_pages, *self.prefill.steps.values())

    def programs(
        self, pages: Any, params: Any, lanes: Any, sampling: Any, prefill: Any, groups: Any | None = None
    ) -> dict[str, tuple[ShardedStep, tuple[Any, ...]]]:
        """Return every device program by name, with what it is called with: arrays or shapes like these.

        Args:
            lanes, prefill, groups: the lanes of decode, of prefill, and of decode in groups (None: there are none).
        """
        copies = self._copies_shape
        arguments = {
            "decode": (self.decode, (pages, params, lanes, sampling)),
            "copy_pages": (self.copy_pages, (pages, copies, copies)),
        }
        for name, each in self.prefill.arguments(pages, params, prefill).items():
            arguments[name] = self.prefill.steps[name], each
        if groups is not None:
            arguments["decode_groups"] = self.decode_groups, (pages, params, groups, sampling)
        return arguments

    def compile(self, *arguments: Any) -> None:
        """Compile all programs at once, on as many threads, for `arguments` (see `programs`); none is used up."""
        with concurrent.futures.ThreadPoolExecutor() as pool:
            pending = [
                pool.submit(step.compile, step.jitted.lower(*each)) for step, each in self.programs(*arguments).values()
            ]
            for each in pending:
                each.result()

    @property
    def num_compilations(self) -> int:
        """Programs compiled so far."""
        return sum(step.num_compilations for step in self._all)
