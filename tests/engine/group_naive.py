"""Workers on a shared cache the slow way: every token's view is written out and attended to densely, without a cache.

For each token the view is a list of tokens, [prompt][the others' segments][its own], and a token's place in this list
is its position there. Keys are rotated to their place and the query to its own, anew for every token: no relative
positions, no shifts, nothing of `model/views/shared.py`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from apr_jax.config import ModelConfig
from apr_jax.engine.threads import Call
from apr_jax.model.params import graphdef
from apr_jax.model.sampling import log_probs


@dataclasses.dataclass(frozen=True)
class Token:
    """A token that some worker read; the prompt's are worker None's."""

    token: int
    worker: int | None
    place: int  # in the prompt, or in its worker's segment
    time: int  # step that read it, 0 = the last token of every header; before that negative


def read_tokens(calls: Sequence[Call]) -> list[Token]:
    """What the workers of one group read."""
    shared = calls[0].group_prompt
    prompt = [Token(int(token), None, place, -1000) for place, token in enumerate(calls[0].context[:shared])]
    tokens = list(prompt)
    for worker, call in enumerate(calls):
        assert call.context[:shared].tolist() == [token.token for token in prompt]
        header = call.context[shared:]
        read = [*header.tolist(), *call.tokens.tolist()][:-1]
        tokens += [Token(token, worker, place, place - (len(header) - 1)) for place, token in enumerate(read)]
    return tokens


def view_of(query: Token, tokens: Sequence[Token]) -> list[int]:
    """Indices of the tokens that a token sees, in the order of its view; it is the last of them."""
    num_workers = 1 + max(token.worker for token in tokens if token.worker is not None)
    places = {(token.worker, token.place): index for index, token in enumerate(tokens)}
    if query.worker is None:
        return [places[None, place] for place in range(query.place + 1)]
    view = [index for index, token in enumerate(tokens) if token.worker is None]
    for other in range(num_workers):
        if other != query.worker and query.time >= 0:
            view += [i for i, token in enumerate(tokens) if token.worker == other and token.time <= query.time]
    return view + [places[query.worker, place] for place in range(query.place + 1)]


def rotated(x_NH: np.ndarray, position: int, theta: float) -> np.ndarray:
    half = x_NH.shape[-1] // 2
    angles = position * theta ** (-np.arange(half) / half)
    first, second = x_NH[..., :half], x_NH[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class _Projected:
    """A view that keeps queries, keys and values as they are projected, not rotated."""

    def __init__(self, model: ModelConfig):
        self.half = model.head_dim // 2
        self.projected: tuple[Any, ...] = ()

    def angles(self) -> Any:
        return jnp.ones((1, 1, self.half)), jnp.zeros((1, 1, self.half))

    def attend(self, layer: int, *projected: Any) -> Any:
        self.projected = projected
        return projected[0], self


def naive_logprobs(model: ModelConfig, params: Any, calls: Sequence[Call], banned: Sequence[int]) -> list[np.ndarray]:
    """For each worker, the log-probabilities `[written tokens, V]` at temperature 1 of what it could have written."""
    tokens = read_tokens(calls)
    views = [view_of(token, tokens) for token in tokens]
    llama = nnx.merge(graphdef(model), params)
    x = jnp.asarray(np.asarray(llama.embedding[...]))[np.array([token.token for token in tokens])]
    for block in llama.blocks:
        seen = _Projected(model)
        x, normed = block.attention_norm(x)
        block.attention(normed, seen)
        q, k, v = (np.asarray(each, np.float64) for each in seen.projected)
        outs = []
        for index, view in enumerate(views):
            assert view[-1] == index
            keys = np.stack([rotated(k[key], place, model.rope_theta) for place, key in enumerate(view)])
            query = rotated(q[index], len(view) - 1, model.rope_theta)
            heads = [n * model.num_kv_heads // model.num_heads for n in range(model.num_heads)]
            scores = np.einsum("nh,snh->ns", query, keys[:, heads]) / np.sqrt(model.head_dim)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            outs.append(np.einsum("ns,snh->nh", weights, v[view][:, heads]))
        attended = jnp.asarray(np.stack(outs), jnp.float32).reshape(len(tokens), -1)
        x, normed = block.mlp_norm(x + attended @ block.attention.out[...])
        x = x + block.mlp(normed)
    mask = np.zeros((model.vocab_size,), bool)
    mask[list(banned)] = True
    logprobs = np.asarray(log_probs(llama.logits(llama.final_norm(x)[1]), 1.0, jnp.asarray(mask)))
    return [
        logprobs[[i for i, token in enumerate(tokens) if token.worker == worker and token.time >= 0]]
        for worker in range(len(calls))
    ]
