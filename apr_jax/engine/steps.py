"""What runs on the device: decode, page copies and (`prefill.py`) prefill, each compiled once.

The step `decode_thread` is written for one thread and lifted over lanes by `jax.vmap`.
Each data shard then runs its own lanes on its own pages (`shard_map` over the mesh axis "data"), with a loop of its
own length and no communication; within a shard, heads may be split over "tensor" by the compiler.

Every shape is fixed by the configuration, and no floating-point reduction runs over lanes. So a lane's numbers don't
depend on its neighbours, bit for bit.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from apr_jax.config import ModelConfig
from apr_jax.engine import policy_masks
from apr_jax.engine.decode_cache import DecodeCache, DecodePlan, View, open_cache
from apr_jax.engine.lanes import DecodeLanes, SharedLanes, Written
from apr_jax.engine.limits import Limits
from apr_jax.engine.pack_arrays import Packed, unpack
from apr_jax.engine.prefill import choose_prefill
from apr_jax.engine.sampling import log_probs, sample, uniforms
from apr_jax.engine.sharded import PAGES, SHARDED, ShardedStep
from apr_jax.engine.shared_cache import SharedCache
from apr_jax.model import native
from apr_jax.model.kv_cache import PagedKVCache, RowBuffers, copy_pages
from apr_jax.model.llama import Llama, WeightLayout, graphdef
from apr_jax.parallel.mesh import partition_spec

COPIES_PER_CALL = 16  # page copies a call; more take more calls

_constrain: Callable[..., jax.Array] = jax.lax.with_sharding_constraint


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: jax.Array  # float32 scalar
    banned_mask: jax.Array  # bool [V]
    gate: policy_masks.GateMasks | None = None


def decode_thread(
    model: Llama,
    view: View,
    token: jax.Array,
    remaining: jax.Array,
    stop_tokens: jax.Array,
    uniform: jax.Array,
    sampling: Sampling,
    constraints: policy_masks.LaneConstraints | None,
) -> tuple[tuple[Any, ...], jax.Array, jax.Array, jax.Array, tuple[policy_masks.LaneRegisters, jax.Array] | None]:
    """One token of one thread: attention over its pages, logits, a draw, stop matching.

    Returns what the loop carries of the cache, the next token, its log-probability, how many tokens may still follow
    (0 once it stopped; a stopped thread's results are not used), and where the engine has a gate the thread's registers
    and the log-probability without the gate token.
    """
    position = view.length + view.step
    hidden_TD, successor = model(token[None], position[None], cache=view)
    assert successor is not None
    # Gathered over "tensor" before the draw: sampling on split logits would take a dozen small collectives.
    logits_V: jax.Array = _constrain(model.logits(hidden_TD)[0], partition_spec(None))
    gate, banned_mask, constraint, after = sampling.gate, sampling.banned_mask, None, None
    if constraints is not None and gate is not None:
        constraint = policy_masks.constrain_step(constraints, gate, banned_mask, token, view.step)
        banned_mask = constraint.banned_mask
    if constraint is None and model.layout.native:
        drawn, logprob = native.draw(logits_V, sampling.temperature, banned_mask, uniform)
    else:
        logprobs_V = log_probs(logits_V, sampling.temperature, banned_mask)
        drawn = sample(logprobs_V, uniform, sampling.temperature)
        logprob = logprobs_V[drawn]
        after = None if constraint is None else constraint.after(logprobs_V, drawn)
    stopped = jnp.any(drawn == stop_tokens)
    if constraint is not None:
        stopped |= constraint.pauses(drawn)
    left = jnp.where(stopped, 0, jnp.maximum(remaining - 1, 0))
    return successor.carried, drawn, logprob, left, after


def decode_shard(
    model: Llama, steps: int, cache: DecodeCache, lanes: DecodeLanes, sampling: Sampling
) -> tuple[PagedKVCache, RowBuffers, Written]:
    """A decode chunk on one shard (no shard axis): up to `steps` tokens a lane, fewer when all have stopped.

    A chunk is not left while any lane goes on: where a thread's chunks begin, and with that how its attention is
    summed, is then a function of the thread alone.
    """
    num_lanes = lanes.token.shape[0]
    uniforms_LC = jax.vmap(lambda key, first: uniforms(key, first, steps))(lanes.key_data, lanes.generated)
    in_axes, out_axes = (None, cache.view_axes, 0, 0, 0, 0, None, 0), (cache.carried_axis, 0, 0, 0, 0)
    lifted = jax.vmap(decode_thread, in_axes=in_axes, out_axes=out_axes)

    def live(state: tuple[Any, ...]) -> jax.Array:
        step, _, _, remaining_L, *_ = state
        return (step < steps) & jnp.any(remaining_L > 0)

    def body(state: tuple[Any, ...]) -> tuple[Any, ...]:
        step, carried, token_L, remaining_L, counts_L, tokens_CL, logprobs_CL, gated = state
        view = cache.view(carried, step, remaining_L > 0)
        uniform_L = jax.lax.dynamic_index_in_dim(uniforms_LC, step, axis=1, keepdims=False)
        constraints = lanes.constraints and dataclasses.replace(lanes.constraints, registers=gated[0])
        carried, drawn_L, logprob_L, left_L, after = lifted(
            model, view, token_L, remaining_L, lanes.stop_tokens, uniform_L, sampling, constraints
        )
        if after is not None:
            gated = after[0], jax.lax.dynamic_update_index_in_dim(gated[1], after[1], step, axis=0)
        tokens_CL = jax.lax.dynamic_update_index_in_dim(tokens_CL, drawn_L, step, axis=0)
        logprobs_CL = jax.lax.dynamic_update_index_in_dim(logprobs_CL, logprob_L, step, axis=0)
        counts_L = counts_L + (remaining_L > 0).astype(jnp.int32)
        return step + 1, carried, drawn_L, left_L, counts_L, tokens_CL, logprobs_CL, gated

    state = (
        jnp.int32(0),
        cache.start(),
        lanes.token,
        lanes.remaining,
        jnp.zeros((num_lanes,), jnp.int32),
        jnp.zeros((steps, num_lanes), jnp.int32),
        jnp.zeros((steps, num_lanes), jnp.float32),
        None
        if lanes.constraints is None
        else (lanes.constraints.registers, jnp.zeros((steps, num_lanes), jnp.float32)),
    )
    ran, carried, _, _, counts_L, tokens_CL, logprobs_CL, gated = jax.lax.while_loop(live, body, state)
    shut_CL = None if gated is None else gated[1]
    return *cache.finish(carried, counts_L), Written(tokens_CL, logprobs_CL, shut_CL, counts_L, ran)


class Steps:
    """The device programs of one engine. Each donates the cache and returns its successor. Lanes may come packed."""

    def __init__(self, config: ModelConfig, limits: Limits, mesh: Mesh, weights: WeightLayout, plan: DecodePlan):
        self.layout = layout = plan.layout
        assert layout.block_size == limits.block_size
        structure = graphdef(config, weights)

        def decode(
            pages: PagedKVCache, buffers: RowBuffers, params: Any, lanes: DecodeLanes | Packed, sampling: Sampling
        ) -> tuple[PagedKVCache, RowBuffers, Written]:
            model, each = nnx.merge(structure, params), unpack(lanes)
            cache = open_cache(plan, limits.steps_per_visit, pages, buffers, each)
            return decode_shard(model, limits.steps_per_visit, cache, each, sampling)

        def decode_shared(
            pages: PagedKVCache, params: Any, shared: SharedLanes | Packed, sampling: Sampling
        ) -> tuple[PagedKVCache, Written]:
            model, group = nnx.merge(structure, params), unpack(shared)
            lanes = group.lanes
            how = {"steps": limits.steps_per_visit, "workers": limits.max_workers}
            cache = SharedCache.open(
                pages, layout, lanes.tables, lanes.length, group.prompt, rope_theta=config.rope_theta, **how
            )
            pages, _, written = decode_shard(model, limits.steps_per_visit, cache, lanes, sampling)
            return pages, written

        whole = partition_spec()
        pages_out, written_out = NamedSharding(mesh, PAGES), NamedSharding(mesh, SHARDED)
        self.decode = ShardedStep(
            decode,
            mesh,
            (SHARDED, SHARDED, whole, SHARDED, whole),
            (pages_out, pages_out, written_out),
            donated=(0, 1),
        )
        # Lowered when it is first needed: an engine without groups has no such program.
        self.decode_shared = ShardedStep(
            decode_shared, mesh, (SHARDED, whole, SHARDED, whole), (pages_out, written_out)
        )
        self.copy_pages = ShardedStep(copy_pages, mesh, (SHARDED, SHARDED, SHARDED), pages_out)
        self.prefill = choose_prefill(structure, plan, limits, mesh)
        shape: Callable[..., Any] = jax.ShapeDtypeStruct
        self._copies_shape = shape((limits.num_shards, COPIES_PER_CALL), jnp.int32, sharding=written_out)
        self._all = (self.decode, self.decode_shared, self.copy_pages, *self.prefill.steps.values())

    def programs(
        self,
        pages: Any,
        buffers: Any,
        params: Any,
        lanes: Any,
        sampling: Any,
        prefill: Any,
        shared: Any | None = None,
    ) -> dict[str, tuple[ShardedStep, tuple[Any, ...]]]:
        """Return every device program by name, with what it is called with: arrays or shapes like these.

        Args:
            lanes, prefill, shared: the lanes of decode, of prefill, and of decode on shared caches (None: no groups).
        """
        copies = self._copies_shape
        arguments = {
            "decode": (self.decode, (pages, buffers, params, lanes, sampling)),
            "copy_pages": (self.copy_pages, (pages, copies, copies)),
        }
        for name, each in self.prefill.arguments(pages, params, prefill).items():
            arguments[name] = self.prefill.steps[name], each
        if shared is not None:
            arguments["decode_shared"] = self.decode_shared, (pages, params, shared, sampling)
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
