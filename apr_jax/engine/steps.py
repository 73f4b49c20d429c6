"""What runs on the device: prefill, decode and page copies, each compiled once.

The per-thread step (`decode_thread`, `prefill_thread`) is written for one thread and lifted over lanes by `jax.vmap`.
Each data shard then runs its own lanes on its own pages (`shard_map` over the mesh axis "data"), with a loop of its
own length and no communication; within a shard, heads may be split over "tensor" by the compiler.

Every shape is fixed by the configuration, and no floating-point reduction runs over lanes. So a lane's numbers don't
depend on its neighbours, bit for bit.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from apr_jax.config import ModelConfig
from apr_jax.engine import policy_masks
from apr_jax.engine.decode_cache import DecodeCache, DecodePlan, View, open_cache
from apr_jax.engine.pack_arrays import Packed, unpack
from apr_jax.engine.sampling import log_probs, sample, uniforms
from apr_jax.engine.scheduler import Limits
from apr_jax.engine.shared_cache import SharedCache
from apr_jax.model import native
from apr_jax.model.kv_cache import (
    Block,
    PagedKVCache,
    PrefillView,
    RowBuffers,
    RowLayout,
    copy_pages,
    write_rows,
)
from apr_jax.model.llama import Llama, WeightLayout, graphdef
from apr_jax.model.paged_view import PagedView
from apr_jax.parallel.mesh import DATA_AXIS, TENSOR_AXIS, partition_spec

COPIES_PER_CALL = 16  # page copies a call; more take more calls
PREFILL_BLOCK = 32  # lanes that are prefilled at once where they are single positions

SHARDED = partition_spec(DATA_AXIS)
PAGES = partition_spec(DATA_AXIS, None, TENSOR_AXIS)


_constrain: Callable[..., jax.Array] = jax.lax.with_sharding_constraint


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeLanes:
    """What the lanes of a decode chunk need from the host, [shards, L, ...]."""

    token: jax.Array  # int32: the thread's last token, not yet computed
    length: jax.Array  # int32: tokens before it = its position
    remaining: jax.Array  # int32: tokens that the thread may still write; 0 = the lane is idle
    stop_tokens: jax.Array  # int32 [.., MAX_STOP_TOKENS], filled with -1
    key_data: jax.Array  # uint32 [.., 2]
    generated: jax.Array  # int32: tokens that the thread has generated before
    tables: jax.Array  # int32 [.., pages of a row]
    held: policy_masks.Held | None = None  # None: the engine has no gate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedLanes:
    """The same of lanes that are workers on shared caches: lane `a * max_workers + w` is worker w of group a."""

    lanes: DecodeLanes
    prompt: jax.Array  # int32: the first positions of the row, which the group has in common


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillLanes:
    """What a prefill call needs from the host, [shards, L, ...]."""

    tokens: jax.Array  # int32 [.., page], or [.., 1] where lanes may be neighbouring positions of one row
    start: jax.Array  # int32: position of the first
    count: jax.Array  # int32: how many of them are real; 0 = the lane is idle
    tables: jax.Array  # int32 [.., pages of a row]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Policy:
    """How tokens are drawn."""

    temperature: jax.Array  # float32 scalar
    banned_mask: jax.Array  # bool [V]
    gate: policy_masks.GateMasks | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Written:
    """What a decode chunk wrote, [shards, ...]."""

    tokens: jax.Array  # int32 [steps, L]
    logprobs: jax.Array  # float32 [steps, L]
    shut_logprobs: jax.Array | None  # float32 [steps, L]: the same without the gate token
    counts: jax.Array  # int32 [L]: the lane's tokens are the first `count` of its column
    steps: jax.Array  # int32: steps that the shard ran


def decode_thread(
    model: Llama,
    view: View,
    token: jax.Array,
    remaining: jax.Array,
    stop_tokens: jax.Array,
    uniform: jax.Array,
    policy: Policy,
    held: policy_masks.Held | None,
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
    gate = policy.gate
    hold = None if held is None or gate is None else policy_masks.hold(held, gate, policy.banned_mask, token, view.step)
    after = None
    if hold is None and model.layout.native:
        drawn, logprob = native.draw(logits_V, policy.temperature, policy.banned_mask, uniform)
    else:
        logprobs_V = log_probs(logits_V, policy.temperature, policy.banned_mask if hold is None else hold.banned_mask)
        drawn = sample(logprobs_V, uniform, policy.temperature)
        logprob = logprobs_V[drawn]
        after = None if hold is None else hold.after(logprobs_V, drawn)
    stopped = jnp.any(drawn == stop_tokens)
    if hold is not None:
        stopped |= hold.pauses(drawn)
    left = jnp.where(stopped, 0, jnp.maximum(remaining - 1, 0))
    return successor.carried, drawn, logprob, left, after


def prefill_thread(
    model: Llama,
    layout: RowLayout,
    pages: PagedKVCache,
    num_spans: jax.Array,
    table_R: jax.Array,
    tokens_C: jax.Array,
    start: jax.Array,
) -> tuple[Any, ...]:
    """Keys and values of one thread's next positions, within a page; per layer `[K, C, H]` twice."""
    view = PrefillView(pages, table_R, (), start, num_spans, layout)
    _, successor = model(tokens_C, start + jnp.arange(tokens_C.shape[0]), cache=view)
    assert successor is not None
    return successor.fresh


def prefill_in_place(model: Llama, plan: DecodePlan, pages: PagedKVCache, lanes: PrefillLanes) -> PagedKVCache:
    """New positions as lanes of one token each, written to the pages as decode does it (no shard axis).

    A loop over PREFILL_BLOCK lanes at a time, as many as are used. Outside of a loop XLA would copy the pages.
    """
    assert plan.impl == "cpu"

    def position(pages: PagedKVCache, lane: PrefillLanes) -> PagedKVCache:
        view = PagedView(pages, lane.tables, lane.start, jnp.int32(0), lane.count > 0, "cpu", plan.layout.tile)
        _, successor = model(lane.tokens, lane.start[None], cache=view)
        assert successor is not None
        return successor.pages

    def block(index: jax.Array, pages: PagedKVCache) -> PagedKVCache:
        def part(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, index * PREFILL_BLOCK, PREFILL_BLOCK)

        return jax.vmap(position, in_axes=(None, 0), out_axes=None)(pages, jax.tree.map(part, lanes))

    used = jnp.sum((lanes.count > 0).astype(jnp.int32))
    return jax.lax.fori_loop(0, (used + PREFILL_BLOCK - 1) // PREFILL_BLOCK, block, pages)


def decode_shard(
    model: Llama, steps: int, cache: DecodeCache, lanes: DecodeLanes, policy: Policy
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
        held = None if lanes.held is None else dataclasses.replace(lanes.held, registers=gated[0])
        carried, drawn_L, logprob_L, left_L, after = lifted(
            model, view, token_L, remaining_L, lanes.stop_tokens, uniform_L, policy, held
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
        None if lanes.held is None else (lanes.held.registers, jnp.zeros((steps, num_lanes), jnp.float32)),
    )
    ran, carried, _, _, counts_L, tokens_CL, logprobs_CL, gated = jax.lax.while_loop(live, body, state)
    shut_CL = None if gated is None else gated[1]
    return *cache.finish(carried, counts_L), Written(tokens_CL, logprobs_CL, shut_CL, counts_L, ran)


def prefill_shard(model: Llama, layout: RowLayout, pages: PagedKVCache, lanes: PrefillLanes) -> tuple[Block, ...]:
    """Keys and values of up to one page of new positions for each lane of a shard (no shard axis); pages are only read.

    They are written by a call of their own: in one program XLA would copy every page, since branches read them.
    """
    num_spans = layout.spans_for(jnp.max(jnp.where(lanes.count > 0, lanes.start, 0)))
    lifted = jax.vmap(prefill_thread, in_axes=(None, None, None, None, 0, 0, 0))
    return lifted(model, layout, pages, num_spans, lanes.tables, lanes.tokens, lanes.start)


class Steps:
    """The jitted steps of one engine. Each donates the cache and returns the successor. Lanes may come packed."""

    def __init__(self, config: ModelConfig, limits: Limits, mesh: Mesh, weights: WeightLayout, plan: DecodePlan):
        self.layout = layout = plan.layout
        self.prefill_width, self.prefills_in_place = plan.prefill_width, plan.prefills_in_place
        assert layout.block_size == limits.block_size
        structure = graphdef(config, weights)

        def decode(
            pages: PagedKVCache, buffers: RowBuffers, params: Any, lanes: DecodeLanes | Packed, policy: Policy
        ) -> tuple[PagedKVCache, RowBuffers, Written]:
            model, each = nnx.merge(structure, params), unpack(lanes)
            cache = open_cache(plan, limits.steps_per_visit, pages, buffers, each)
            return decode_shard(model, limits.steps_per_visit, cache, each, policy)

        def prefill(pages: PagedKVCache, params: Any, lanes: PrefillLanes | Packed) -> PagedKVCache:
            return prefill_in_place(nnx.merge(structure, params), plan, pages, unpack(lanes))

        def compute(pages: PagedKVCache, params: Any, lanes: PrefillLanes | Packed) -> tuple[Block, ...]:
            return prefill_shard(nnx.merge(structure, params), layout, pages, unpack(lanes))

        def write(pages: PagedKVCache, lanes: PrefillLanes | Packed, fresh: tuple[Block, ...]) -> PagedKVCache:
            fresh, each = jax.tree.map(layout.tile.pack, fresh), unpack(lanes)
            return write_rows(pages, each.tables, each.start, each.count, fresh, 1)

        def decode_shared(
            pages: PagedKVCache, params: Any, shared: SharedLanes | Packed, policy: Policy
        ) -> tuple[PagedKVCache, Written]:
            model, group = nnx.merge(structure, params), unpack(shared)
            lanes = group.lanes
            how = {"steps": limits.steps_per_visit, "workers": limits.max_workers}
            cache = SharedCache.open(
                pages, layout, lanes.tables, lanes.length, group.prompt, rope_theta=config.rope_theta, **how
            )
            pages, _, written = decode_shard(model, limits.steps_per_visit, cache, lanes, policy)
            return pages, written

        whole = partition_spec()
        pages_out, written_out = NamedSharding(mesh, PAGES), NamedSharding(mesh, SHARDED)
        self._pages_out, self._sharded = pages_out, written_out
        self.decode = _lift(
            decode,
            mesh,
            (SHARDED, SHARDED, whole, SHARDED, whole),
            (pages_out, pages_out, written_out),
            donated=(0, 1),
        )
        # Lowered when it is first needed: an engine without groups has no such program.
        self.decode_shared = _lift(decode_shared, mesh, (SHARDED, whole, SHARDED, whole), (pages_out, written_out))
        self._prefill = _lift(prefill, mesh, (SHARDED, whole, SHARDED), pages_out)
        self._compute = _lift(compute, mesh, (SHARDED, whole, SHARDED), pages_out, donated=())
        self._write = _lift(write, mesh, (SHARDED, SHARDED, SHARDED), pages_out)
        self.copy_pages = _lift(copy_pages, mesh, (SHARDED, SHARDED, SHARDED), pages_out)

    def prefill(self, pages: PagedKVCache, params: Any, lanes: PrefillLanes | Packed) -> PagedKVCache:
        """Computes the lanes' new positions and writes them into the pages, which are donated."""
        if self.prefills_in_place:
            return self._prefill(pages, params, lanes)
        return self._write(pages, lanes, self._compute(pages, params, lanes))

    def compile(
        self,
        pages: PagedKVCache,
        buffers: RowBuffers,
        params: Any,
        lanes: DecodeLanes | Packed,
        policy: Policy,
        prefill: Any,
        shared: SharedLanes | Packed | None = None,
    ) -> None:
        """Compiles all steps at once, on as many threads, for arguments like these; none of them is used up.

        `shared` None: an engine without groups.
        """
        shape: Callable[..., Any] = jax.ShapeDtypeStruct
        pairs = shape((pages.keys[0].shape[0], COPIES_PER_CALL), jnp.int32, sharding=self._sharded)
        if self.prefills_in_place:
            prefills = [(self._prefill, (pages, params, prefill))]
        else:
            fresh = self._compute.eval_shape(pages, params, prefill)
            fresh = jax.tree.map(lambda x: shape(x.shape, x.dtype, sharding=self._pages_out), fresh)
            prefills = [(self._compute, (pages, params, prefill)), (self._write, (pages, prefill, fresh))]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            pending = [
                pool.submit(step.prepare, step.lower(*arguments))
                for step, arguments in (
                    (self.decode, (pages, buffers, params, lanes, policy)),
                    *prefills,
                    (self.copy_pages, (pages, pairs, pairs)),
                    *(() if shared is None else ((self.decode_shared, (pages, params, shared, policy)),)),
                )
            ]
            for each in pending:
                each.result()

    @property
    def num_compilations(self) -> int:
        """Programs compiled so far."""
        steps = (self.decode, self.decode_shared, self._prefill, self._compute, self._write, self.copy_pages)
        return sum(step.num_compilations for step in steps)


class Step:
    """A jitted function that may have been compiled ahead: it then takes no other shapes, and compiles nothing more."""

    def __init__(self, jitted: Any):
        self._jitted, self._compiled = jitted, None

    def __call__(self, *arguments: Any) -> Any:
        return (self._compiled or self._jitted)(*arguments)

    def lower(self, *arguments: Any) -> Any:
        return self._jitted.lower(*arguments)

    def eval_shape(self, *arguments: Any) -> Any:
        return self._jitted.eval_shape(*arguments)

    def prepare(self, lowered: Any) -> None:
        self._compiled = lowered.compile()

    @property
    def num_compilations(self) -> int:
        return int(self._jitted._cache_size()) + (self._compiled is not None)


def _lift(
    step: Callable[..., Any],
    mesh: Mesh,
    in_specs: tuple[PartitionSpec, ...],
    out_shardings: Any,
    donated: tuple[int, ...] = (0,),
) -> Step:
    """Runs a one-shard step on every data shard."""

    def local(*args: Any) -> Any:
        # A shard sees its slice of the leading axis, of size one.
        squeezed = [
            jax.tree.map(lambda x: x[0], arg) if spec == SHARDED else arg
            for arg, spec in zip(args, in_specs, strict=True)
        ]
        return jax.tree.map(lambda x: x[None], step(*squeezed))

    lifted = jax.shard_map(
        local, mesh=mesh, in_specs=in_specs, out_specs=SHARDED, axis_names={DATA_AXIS}, check_vma=False
    )
    options = _compiler_options(mesh)
    return Step(jax.jit(lifted, donate_argnums=donated, out_shardings=out_shardings, compiler_options=options))


def _compiler_options(mesh: Mesh) -> dict[str, Any]:
    """Where every core is a device of the mesh, products that share out their work among cores only get in the way."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return {"xla_cpu_multi_thread_eigen": False} if on_cpu and mesh.size >= (os.cpu_count() or 1) else {}
