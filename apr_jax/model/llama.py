"""A decoder of Llama's architecture in Flax NNX. One forward serves training, prefill and decoding.

Two things are given to it. `Ops` are the functions that it computes with (`ops.py`): plain maths, or a machine's own
kernels. A *view* is what the tokens at hand can see (`views/`): the packed rows of a training batch, the pages of
threads that decode, the chunk of a prompt, or the caches that Hogwild!'s workers share. So nothing here asks which
backend there is, where keys are stored, or who may attend to whom.

Weights are stored in float32, as the two-dimensional matrices that their products read, and cast to the compute dtype
where they are used. `params.py` makes them, counts them and says how a mesh splits them. The letters of shapes stand in
`model/__init__.py`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from apr_jax.config import ModelConfig
from apr_jax.model.attention import ATTENTION_NAME
from apr_jax.model.families import FAMILIES
from apr_jax.model.ops import XLA, Ops
from apr_jax.model.views.base import V, View

INIT_STDDEV = 0.02
_POLICIES = jax.checkpoint_policies
# The intermediate results that a layer keeps for its backward pass; None keeps the layer's input alone.
_KEPT = {
    "dots": _POLICIES.save_from_both_policies(
        _POLICIES.dots_with_no_batch_dims_saveable, _POLICIES.save_only_these_names(ATTENTION_NAME)
    ),
    "full": None,
}


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, config: ModelConfig, ops: Ops, width: int):
        self.eps, self.ops = config.rms_norm_eps, ops
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return `x [..., width]` for the residual stream, and its norm."""
        return self.ops.norm(x, self.scale[...], self.eps)


class Attention(nnx.Module):
    """Causal self-attention with RoPE; each of the K key/value heads serves N/K consecutive query heads."""

    def __init__(self, config: ModelConfig, ops: Ops, layer: int, *, rngs: nnx.Rngs):
        self.config, self.ops, self.layer = config, ops, layer
        query_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.query = _matrix(rngs, config.embed_dim, query_dim)
        self.key = _matrix(rngs, config.embed_dim, kv_dim)
        self.value = _matrix(rngs, config.embed_dim, kv_dim)
        self.out = _matrix(rngs, query_dim, config.embed_dim, _residual_stddev(config))
        facts = FAMILIES[config.family]
        if facts.biases:
            self.query_bias, self.key_bias, self.value_bias = (_zeros(n) for n in (query_dim, kv_dim, kv_dim))
        if facts.head_norms:
            self.query_norm, self.key_norm = (RMSNorm(config, ops, config.head_dim) for _ in range(2))

    def __call__(self, x: jax.Array, view: V) -> tuple[jax.Array, V]:
        """Attend from `x [..., D]` to what the view shows. Return `[..., D]` and the view with these tokens in it."""
        config, heads = self.config, (-1, self.config.head_dim)
        query_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        flat = _matmul(self.ops, x, (self.query, query_dim), (self.key, kv_dim), (self.value, kv_dim))
        if FAMILIES[config.family].biases:
            biases = (self.query_bias, self.key_bias, self.value_bias)
            flat = [_add_bias(each, bias[...]) for each, bias in zip(flat, biases, strict=True)]
        q_TNH, k_TKH, v_TKH = (each.reshape(*x.shape[:-1], *heads) for each in flat)
        if FAMILIES[config.family].head_norms:
            (_, q_TNH), (_, k_TKH) = self.query_norm(q_TNH), self.key_norm(k_TKH)
        q_TNH, k_TKH = (self.ops.rope(each, view.angles()) for each in (q_TNH, k_TKH))
        out_TNH, view = view.attend(self.layer, q_TNH, k_TKH, v_TKH)
        (out,) = _matmul(self.ops, out_TNH.reshape(*x.shape[:-1], -1), (self.out, config.embed_dim))
        return out, view


class MLP(nnx.Module):
    """SwiGLU: `(silu(x gate) * (x up)) down` (Shazeer 2020, eq. 6)."""

    def __init__(self, config: ModelConfig, ops: Ops, *, rngs: nnx.Rngs):
        self.config, self.ops = config, ops
        self.gate = _matrix(rngs, config.embed_dim, config.mlp_dim)
        self.up = _matrix(rngs, config.embed_dim, config.mlp_dim)
        self.down = _matrix(rngs, config.mlp_dim, config.embed_dim, _residual_stddev(config))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `x [..., D]` to `[..., D]`."""
        F = self.config.mlp_dim
        gate, up = _matmul(self.ops, x, (self.gate, F), (self.up, F))
        (out,) = _matmul(self.ops, self.ops.swiglu(gate, up), (self.down, self.config.embed_dim))
        return out


class Block(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, ops: Ops, layer: int, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config, ops, config.embed_dim)
        self.attention = Attention(config, ops, layer, rngs=rngs)
        self.mlp_norm = RMSNorm(config, ops, config.embed_dim)
        self.mlp = MLP(config, ops, rngs=rngs)

    def __call__(self, x: jax.Array, view: V) -> tuple[jax.Array, V]:
        """Return the residual stream `[..., D]` after this layer, and the view with the layer's keys and values."""
        x, normed = self.attention_norm(x)
        attended, view = self.attention(normed, view)
        x, normed = self.mlp_norm(x + attended)
        return x + self.mlp(normed), view


class Llama(nnx.Module):
    """A decoder. `hidden, view = model(tokens, view)`, then `model.logits(hidden)`."""

    def __init__(self, config: ModelConfig, ops: Ops = XLA, *, rngs: nnx.Rngs):
        self.config, self.ops = config, ops
        self.embedding = _normal(rngs, (config.vocab_size, config.embed_dim), INIT_STDDEV)
        self.blocks = nnx.List([Block(config, ops, layer, rngs=rngs) for layer in range(config.num_layers)])
        self.final_norm = RMSNorm(config, ops, config.embed_dim)
        self.head = None if config.tie_embeddings else _matrix(rngs, config.embed_dim, config.vocab_size)

    def __call__(self, tokens: jax.Array, view: V) -> tuple[jax.Array, V]:
        """Run all layers over int32 `tokens [...]`.

        Returns:
            The hidden states `[..., D]` after the final norm, in the compute dtype, and the view with the tokens in it.
        """
        config = self.config
        x = self.embedding[...].astype(config.compute_dtype)[tokens]
        if config.remat == "full" and self.ops.loops:
            x = _looped(self.blocks, x, view)
        else:
            for block in self.blocks:
                x, view = _recomputed(block, x, view) if config.remat in _KEPT else block(x, view)
        return self.final_norm(x)[1], view

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Compute float32 logits `[..., V]` of hidden states `[..., D]`."""
        head = self.embedding[...].T if self.head is None else self.head[...]
        return self.ops.logits(hidden, head.astype(hidden.dtype), self.config.vocab_size)


def _recomputed(block: Block, x: jax.Array, view: V) -> tuple[jax.Array, V]:
    """Run a layer whose backward pass recomputes what `config.remat` does not keep.

    `nnx.remat` would write the weights back, which fails where the caller has closed over them.
    """
    graphdef, weights = nnx.split(block)
    run = jax.checkpoint(
        lambda weights, x, view: nnx.merge(graphdef, weights)(x, view), policy=_KEPT[block.attention.config.remat]
    )
    out: tuple[jax.Array, V] = run(weights, x, view)
    return out


def _looped(blocks: Sequence[Block], x: jax.Array, view: View) -> jax.Array:
    """Run layers as one loop whose backward pass recomputes all but their inputs. They must leave the view as it is.

    The weights are stacked in the compute dtype, so the copies are those of the casts that each layer would do.
    """
    graphdef, _ = nnx.split(blocks[0])

    def stack(*layers: jax.Array) -> jax.Array:
        return jnp.stack([weight.astype(x.dtype) if weight.ndim > 1 else weight for weight in layers])

    @functools.partial(jax.checkpoint, prevent_cse=False)  # forward and backward are two loops, so nothing can merge
    def run(x: jax.Array, weights: Any) -> jax.Array:
        return nnx.merge(graphdef, weights)(x, view)[0]

    stacked = jax.tree.map(stack, *(nnx.state(block) for block in blocks))
    out, _ = jax.lax.scan(lambda x, weights: (run(x, weights), None), x, stacked)
    return out


def _matmul(ops: Ops, x: jax.Array, *weights: tuple[nnx.Param[Any], int]) -> list[jax.Array]:
    """Multiply `x [..., D]` by several matrices, each given with its width, in the dtype of x."""
    return ops.matmul(x, [weight[...].astype(x.dtype) for weight, _ in weights], [width for _, width in weights])


def _matrix(rngs: nnx.Rngs, inputs: int, outputs: int, stddev: float = INIT_STDDEV) -> nnx.Param[Any]:
    return _normal(rngs, (inputs, outputs), stddev)


def _add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    return x + jnp.broadcast_to(bias.astype(x.dtype), x.shape)


def _zeros(width: int) -> nnx.Param[Any]:
    return nnx.Param(jnp.zeros((width,), jnp.float32))


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float) -> nnx.Param[Any]:
    return nnx.Param(stddev * jax.random.normal(rngs.params(), shape, jnp.float32))


def _residual_stddev(config: ModelConfig) -> float:
    """Scale down the matrices that write to the residual stream, so that its variance does not grow with depth.

    GPT-2, section 2.3 (Radford et al. 2019): 0.02 / sqrt(2 * num_layers).
    """
    return INIT_STDDEV / math.sqrt(2 * config.num_layers)
