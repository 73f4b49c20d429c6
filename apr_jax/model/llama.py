"""Llama-2 in Flax NNX: one forward for training (no cache) and for cached decoding.

Letters of shapes, here and everywhere under `apr_jax/model/`:

    B batch    T query time    S key time    N query heads    K key/value heads    G = N / K    H head dim
    D embed    F mlp           V vocabulary  L lanes          P pages

Leading axes are free: `tokens [..., T]` may be one thread `[T]` (the engine writes its step so and vmaps it) or a batch
`[B, T]`. Weights are stored in float32, as the two-dimensional matrices that their matmuls read, and cast to the
compute dtype where they are used. Norms, RoPE, softmax and logits are computed in float32.
"""

import dataclasses
import math
from typing import Any, Literal, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from apr_jax.config import ModelConfig
from apr_jax.model import native
from apr_jax.model.attention import self_attention
from apr_jax.model.rope import Angles, rope_angles, rope_angles_once
from apr_jax.model.shared_attention import SharedRows, shared_angles, shared_attention
from apr_jax.model.training_kernels import product, rms_norm, rotate, swiglu
from apr_jax.model.window_attention import ATTENTION_NAME
from apr_jax.parallel.mesh import partition_spec, split_rows

INIT_STDDEV = 0.02
_POLICIES = jax.checkpoint_policies
# What a layer keeps for its backward pass; None keeps its input alone.
_KEPT = {
    "dots": _POLICIES.save_from_both_policies(
        _POLICIES.dots_with_no_batch_dims_saveable, _POLICIES.save_only_these_names(ATTENTION_NAME)
    ),
    "full": None,
}


class KVCache(Protocol):
    """What the forward needs of a cache: an immutable pytree that attends and returns its successor."""

    def attend(
        self, layer: int, q_TNH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, positions_T: jax.Array
    ) -> tuple[jax.Array, Self]:
        """Stores keys and values at `positions_T`, then attends to all that is stored at positions <= each query's own.

        Queries and keys carry RoPE already; scores are scaled by 1/sqrt(H). Returns `(out_TNH, successor)`.
        """
        ...


C = TypeVar("C", bound=KVCache)
Segments = tuple[jax.Array | None, jax.Array | None]  # segment ids, and how far tokens reach: see `Llama`
Params = nnx.State[Any, Any]  # the weights as a pytree; its keys are the attributes of the modules


# How a matrix lies: [in, out], [out, in], or for the products of `native.py`, in float32 and in bfloat16.
Matrices = Literal["plain", "transposed", "panels", "paired_panels"]
_PANELS = ("panels", "paired_panels")


@dataclasses.dataclass(frozen=True)
class WeightLayout:
    """How the matrices are held: as they are trained, or as a decode step wants them (`decode_weights.py`)."""

    fused: bool = False  # query, key and value in one matrix, and gate and up
    matrices: Matrices = "plain"
    own_head: bool = False  # the output head is a matrix of its own even where it is tied to the embedding

    @property
    def native(self) -> bool:
        """Whether a step goes through the kernels of `native.py`, on a CPU."""
        return self.matrices in _PANELS


TRAINED = WeightLayout()


@dataclasses.dataclass(frozen=True)
class ParamCount:
    """Parameters of a model. The embedding share is the token embedding and, when untied, the output head."""

    embedding: int
    non_embedding: int

    @property
    def total(self) -> int:
        return self.embedding + self.non_embedding


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale`, float32 inside (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, config: ModelConfig, layout: WeightLayout):
        self.eps, self.layout = config.rms_norm_eps, layout
        self.scale = nnx.Param(jnp.ones((config.embed_dim,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.beside(x)[1]

    def beside(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The input, for who goes on with it, too, and the normed one: see `rms_norm`."""
        if self.layout.native:
            return x, native.rms_norm(x, self.scale[...], self.eps)
        return rms_norm(x, self.scale[...], self.eps)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float) -> nnx.Param[Any]:
    return nnx.Param(stddev * jax.random.normal(rngs.params(), shape, jnp.float32))


def _matmul(x: jax.Array, weight: nnx.Param[Any], layout: WeightLayout, outputs: int, dtype: Any = None) -> jax.Array:
    matrix = weight[...].astype(x.dtype)
    if layout.matrices == "plain" and dtype is None:
        return product(x, matrix)
    x_MD = x.reshape(-1, x.shape[-1])
    if layout.native:
        out_MF = native.product(x_MD, matrix, outputs, dtype)
    elif layout.matrices == "transposed":
        out_MF = jnp.einsum("FD,MD->FM", matrix, x_MD, preferred_element_type=dtype).T
    else:
        out_MF = jnp.einsum("MD,DF->MF", x_MD, matrix, preferred_element_type=dtype)
    return out_MF.reshape(*x.shape[:-1], outputs)


def _matrix(
    rngs: nnx.Rngs, inputs: int, outputs: int, layout: WeightLayout, stddev: float = INIT_STDDEV
) -> nnx.Param[Any]:
    shapes: dict[str, tuple[int, ...]] = {
        "plain": (inputs, outputs),
        "transposed": (outputs, inputs),
        "panels": native.panels_shape(inputs, outputs),
        "paired_panels": native.panels_shape(inputs, outputs, paired=True),
    }
    return _normal(rngs, shapes[layout.matrices], stddev)


class Attention(nnx.Module):
    """Causal self-attention with RoPE; each of the K key/value heads serves N/K consecutive query heads."""

    def __init__(self, config: ModelConfig, layout: WeightLayout, *, rngs: nnx.Rngs):
        self.config, self.layout = config, layout
        query_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        if layout.fused:
            self.query_key_value = _matrix(rngs, config.embed_dim, query_dim + 2 * kv_dim, layout)
        else:
            self.query = _matrix(rngs, config.embed_dim, query_dim, layout)
            self.key = _matrix(rngs, config.embed_dim, kv_dim, layout)
            self.value = _matrix(rngs, config.embed_dim, kv_dim, layout)
        self.out = _matrix(rngs, query_dim, config.embed_dim, layout, _residual_stddev(config))

    def project(self, x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`x [..., T, D]` to rotated queries `[..., T, N, H]`, rotated keys and values `[..., T, K, H]`."""
        config, layout, heads = self.config, self.layout, (-1, self.config.head_dim)
        query_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        if layout.fused:
            together = _matmul(x, self.query_key_value, layout, query_dim + 2 * kv_dim)
            if layout.native:
                apart = native.rotate_apart(together, angles, query_dim, kv_dim)
                q_TNH, k_TKH, v_TKH = (flat.reshape(*x.shape[:-1], *heads) for flat in apart)
                return q_TNH, k_TKH, v_TKH
            projected = jnp.split(together, [query_dim, query_dim + kv_dim], axis=-1)
        else:
            of_each = (self.query, query_dim), (self.key, kv_dim), (self.value, kv_dim)
            projected = [_matmul(x, weight, layout, outputs) for weight, outputs in of_each]
        q_TNH, k_TKH, v_TKH = (flat.reshape(*x.shape[:-1], *heads) for flat in projected)
        return rotate(q_TNH, angles), rotate(k_TKH, angles), v_TKH

    def combine(self, out_TNH: jax.Array) -> jax.Array:
        return _matmul(out_TNH.reshape(*out_TNH.shape[:-2], -1), self.out, self.layout, self.config.embed_dim)


class MLP(nnx.Module):
    """SwiGLU: `(silu(x gate) * (x up)) down` (Shazeer 2020, eq. 6)."""

    def __init__(self, config: ModelConfig, layout: WeightLayout, *, rngs: nnx.Rngs):
        self.config, self.layout = config, layout
        if layout.fused:
            self.gate_up = _matrix(rngs, config.embed_dim, 2 * config.mlp_dim, layout)
        else:
            self.gate = _matrix(rngs, config.embed_dim, config.mlp_dim, layout)
            self.up = _matrix(rngs, config.embed_dim, config.mlp_dim, layout)
        self.down = _matrix(rngs, config.mlp_dim, config.embed_dim, layout, _residual_stddev(config))

    def __call__(self, x: jax.Array) -> jax.Array:
        config, layout = self.config, self.layout
        if layout.fused:
            together = _matmul(x, self.gate_up, layout, 2 * config.mlp_dim)
            hidden = native.swiglu_joined(together) if layout.native else swiglu(*jnp.split(together, 2, axis=-1))
        else:
            hidden = swiglu(*(_matmul(x, weight, layout, config.mlp_dim) for weight in (self.gate, self.up)))
        return _matmul(hidden, self.down, layout, config.embed_dim)


class Block(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layout: WeightLayout, *, rngs: nnx.Rngs):
        self.config = config
        self.attention_norm = RMSNorm(config, layout)
        self.attention = Attention(config, layout, rngs=rngs)
        self.mlp_norm = RMSNorm(config, layout)
        self.mlp = MLP(config, layout, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        segments: Segments,
        shared: tuple[SharedRows, tuple[Angles, ...]] | None,
    ) -> jax.Array:
        x, normed = self.attention_norm.beside(split_rows(x))
        q_TNH, k_TKH, v_TKH = self.attention.project(normed, angles)
        if shared is not None:
            return self._residuals(x, shared_attention(q_TNH, k_TKH, v_TKH, *shared))
        batched = [a.reshape(-1, *a.shape[-3:]) for a in (q_TNH, k_TKH, v_TKH)]
        ids_BT, reach_BT = (None if x is None else x.reshape(-1, x.shape[-1]) for x in segments)
        out_BTNH = self_attention(*batched, segment_ids_BT=ids_BT, reach_BT=reach_BT, impl=self.config.attention)
        return self._residuals(x, out_BTNH.reshape(q_TNH.shape))

    def cached(
        self, x: jax.Array, angles: tuple[jax.Array, jax.Array], positions: jax.Array, layer: int, cache: C
    ) -> tuple[jax.Array, C]:
        q_TNH, k_TKH, v_TKH = self.attention.project(self.attention_norm(x), angles)
        out_TNH, cache = cache.attend(layer, q_TNH, k_TKH, v_TKH, positions)
        return self._residuals(x, out_TNH), cache

    def _residuals(self, x: jax.Array, out_TNH: jax.Array) -> jax.Array:
        x, normed = self.mlp_norm.beside(x + self.attention.combine(out_TNH))
        return x + self.mlp(normed)


class Llama(nnx.Module):
    """A decoder. `hidden, cache = model(tokens, positions, ...)`, then `model.logits(hidden)`."""

    def __init__(self, config: ModelConfig, layout: WeightLayout = TRAINED, *, rngs: nnx.Rngs):
        self.config, self.layout = config, layout
        self.embedding = _normal(rngs, (config.vocab_size, config.embed_dim), INIT_STDDEV)
        self.blocks = nnx.List([Block(config, layout, rngs=rngs) for _ in range(config.num_layers)])
        self.final_norm = RMSNorm(config, layout)
        tied = config.tie_embeddings and not layout.own_head
        self.head = None if tied else _matrix(rngs, config.embed_dim, config.vocab_size, layout)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        reach: jax.Array | None = None,
        cache: C | None = None,
        shared: SharedRows | None = None,
    ) -> tuple[jax.Array, C | None]:
        """The hidden states `[..., T, D]` after the final norm, in the compute dtype, and the cache's successor.

        Args:
            tokens: int32 `[..., T]`.
            positions: int32 `[..., T]`, the tokens' positions in their own sequence (they restart at each segment).
            segment_ids: int32 `[..., T]`; a token sees earlier tokens of the row with its own id. None = one segment.
            reach: int32 `[..., T]`, how many tokens of its segment see this one, from itself on: segments may have
                branches (`data/prefixes.py`). None: all later ones.
            cache: holds the keys and values of earlier positions; segment ids have no meaning with it.
            shared: of a batch `[B, T]` whose sequences hold several workers, instead of segment ids; positions then
                count in each worker's own row (`shared_view.py`).

        Raises:
            ValueError: shapes differ, or more than one of `segment_ids`, `cache` and `shared` are given.
        """
        if positions.shape != tokens.shape or (segment_ids is not None and segment_ids.shape != tokens.shape):
            raise ValueError(
                f"tokens {tokens.shape}, positions {positions.shape} and segment_ids "
                f"{None if segment_ids is None else segment_ids.shape} must have one shape"
            )
        if reach is not None and (segment_ids is None or reach.shape != tokens.shape):
            raise ValueError(f"reach {reach.shape} is of tokens {tokens.shape} with segment ids")
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids and cache exclude each other: a cache holds one sequence")
        if shared is not None and (cache is not None or segment_ids is not None):
            raise ValueError("shared rows bring their own segment ids, and are not for a cache")
        config = self.config
        x = self.embedding[...].astype(config.compute_dtype)[tokens]
        find_angles = rope_angles if cache is not None else rope_angles_once
        angles = find_angles(positions, config.head_dim, config.rope_theta)
        more = None if shared is None else (shared, shared_angles(shared, config.head_dim, config.rope_theta))
        for layer, block in enumerate(self.blocks):
            if cache is not None:
                x, cache = block.cached(x, angles, positions, layer, cache)
            elif config.remat in _KEPT:
                x = nnx.remat(Block.__call__, policy=_KEPT[config.remat])(block, x, angles, (segment_ids, reach), more)
            else:
                x = block(x, angles, (segment_ids, reach), more)
        return self.final_norm(x if cache is not None else split_rows(x)), cache

    def head_weight(self) -> jax.Array:
        """The output head `[D, V]` (tied: the embedding, transposed), for losses that chunk over tokens."""
        if self.head is None:
            return self.embedding[...].T
        if self.layout.native:
            return native.from_panels(self.head[...], self.config.embed_dim, self.config.vocab_size)
        return self.head[...].T if self.layout.matrices == "transposed" else self.head[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 logits `[..., T, V]` of hidden states `[..., T, D]`."""
        if self.head is not None:
            return _matmul(hidden, self.head, self.layout, self.config.vocab_size, jnp.float32)
        weight_DV = self.head_weight().astype(hidden.dtype)
        return jnp.einsum("...D,DV->...V", hidden, weight_DV, preferred_element_type=jnp.float32)


def graphdef(config: ModelConfig, layout: WeightLayout = TRAINED) -> nnx.GraphDef[Llama]:
    """The model's structure without weights; `nnx.merge(graphdef(config), params)` is a model. Allocates nothing."""
    return nnx.split(_abstract(config, layout))[0]


def abstract_params(config: ModelConfig, layout: WeightLayout = TRAINED) -> Params:
    """The params' tree with a `jax.ShapeDtypeStruct` for each array."""
    return nnx.split(_abstract(config, layout))[1]


def init_params(config: ModelConfig, seed: int) -> Params:
    """Fresh float32 weights: normal with standard deviation 0.02, norms one.

    The matrices that write to the residual stream (`out` and `down`) start at 0.02 / sqrt(2 * num_layers), so that the
    stream's variance does not grow with depth (GPT-2, section 2.3).
    """
    return nnx.state(Llama(config, rngs=nnx.Rngs(seed)))  # not jitted: XLA compiles a draw per shape, not per matrix


def logical_axes(params: Params) -> Params:
    """The same tree with a `PartitionSpec` of logical axis names for each array (see `parallel.mesh`).

    Raises KeyError for a parameter that has none: a new one must be given its axes here.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: partition_spec(*_LOGICAL_AXES[_name(path)]), params)


def num_params(config: ModelConfig) -> ParamCount:
    """Counts parameters without allocating them."""
    sizes = {"embedding": 0, "non_embedding": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config)):
        sizes["embedding" if _name(path) in ("embedding", "head") else "non_embedding"] += math.prod(leaf.shape)
    return ParamCount(**sizes)


_LOGICAL_AXES: dict[str, tuple[str | None, ...]] = {
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "scale": (None,),
    "query": ("embed", "heads"),
    "query_key_value": ("embed", None),
    "gate_up": ("embed", None),
    "key": ("embed", "kv_heads"),
    "value": ("embed", "kv_heads"),
    "out": ("heads", "embed"),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
}


def _name(path: Any) -> str:
    """The attribute under which a parameter hangs in its module."""
    return next(str(entry.key) for entry in reversed(path) if isinstance(entry, jax.tree_util.DictKey))


def _abstract(config: ModelConfig, layout: WeightLayout = TRAINED) -> Llama:
    return nnx.eval_shape(lambda: Llama(config, layout, rngs=nnx.Rngs(0)))


def _residual_stddev(config: ModelConfig) -> float:
    return INIT_STDDEV / math.sqrt(2 * config.num_layers)
