"""A tiny model, scripted programs, and a naive interpreter of programs (full forwards, token by token, no cache)."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh

from apr_jax.config import ModelConfig
from apr_jax.engine.constraints import Gate
from apr_jax.engine.engine import Engine
from apr_jax.engine.threads import (
    Append,
    Call,
    Decode,
    Join,
    Open,
    Program,
    Rollout,
    RolloutKey,
    Spawn,
    Stop,
    StopReason,
    Truncate,
)
from apr_jax.model.params import graphdef, init_params
from apr_jax.model.sampling import log_probs
from apr_jax.model.views.training import training_rows
from tests.configs import LAPTOP, TINY_MODEL

TOLERANCE = 1e-4
BANNED = (60, 61, 62, 63)
MODEL = TINY_MODEL
SIZES = dataclasses.replace(
    LAPTOP.engine, lanes=8, pages=8 * 12 + 1, page_size=8, steps_per_visit=8, prefill_lanes=4, decode_attention="xla"
)
ROLLOUT = dataclasses.replace(
    LAPTOP.rollout,
    max_steps=32,
    max_children=8,
    max_spawns=8,
    max_depth=4,
    max_total_children=10_000,
    max_total_tokens=1_000_000,
    temperature=1.0,
)


def make_mesh(data: int = 1, tensor: int = 1) -> Mesh:
    devices = np.asarray(jax.devices()[: data * tensor]).reshape(data, 1, tensor)
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def make_params(model: ModelConfig = MODEL, seed: int = 0) -> Any:
    """Random weights, large enough that the policy is far from uniform."""
    return jax.tree.map(lambda w: w * 4.0 if w.ndim > 1 else w, init_params(model, seed))


def make_engine(
    mesh: Mesh | None = None,
    model: ModelConfig = MODEL,
    banned: tuple[int, ...] = BANNED,
    gate: Gate | None = None,
    max_workers: int = 0,
    expects_groups: bool = True,
    **changes: Any,
) -> Engine:
    """`changes` are of SIZES, or of ROLLOUT."""
    sizes = {name: value for name, value in changes.items() if hasattr(SIZES, name)}
    rollout = {name: value for name, value in changes.items() if name not in sizes}
    how: dict[str, Any] = {"banned_tokens": banned, "gate": gate, "max_workers": max_workers}
    how["expects_groups"] = expects_groups
    limits = dataclasses.replace(SIZES, **sizes), dataclasses.replace(ROLLOUT, **rollout)
    return Engine(model, *limits, mesh or make_mesh(), params=make_params(model), **how)


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 60, length).tolist()


def plain(seed: int, length: int = 10, stop_tokens: tuple[int, ...] = (7,)) -> Program:
    """Opens a random prompt and decodes to a stop token or a limit."""
    thread = yield Open(prompt(seed, length))
    return (yield Decode(thread, stop_tokens))


def searching(seed: int, depth: int, length: int = 9, children: int = 2, rounds: int = 2) -> Program:
    """Decodes, spawns (to `depth` levels), joins, cuts the thread back, appends what the children wrote, decodes on.

    Stop tokens are so many that decodes are short; what the thread wrote decides what its children are given.
    """
    thread = yield Open(prompt(seed, length))
    for turn in range(rounds):
        before = len(thread.tokens)
        yield Decode(thread, (1, 2, 3, 4))
        if depth and turn < rounds - 1:
            written = thread.tokens[before:]
            handle = yield Spawn(
                [
                    searching(seed * 31 + 7 * child + turn, depth - 1, length=4 + child + len(written) % 5, rounds=2)
                    for child in range(children)
                ]
            )
            values = yield Join(handle)
            yield Truncate(thread, before + len(written) // 2)
            yield Append(thread, [token for value in values for token in value[:6]])
    return thread.tokens[length:]


@functools.cache
def _forward(model: ModelConfig, banned_mask: bytes) -> Any:
    mask = np.frombuffer(banned_mask, bool)

    def forward(params: Any, tokens_T: jax.Array, last: jax.Array) -> jax.Array:
        llama = nnx.merge(graphdef(model), params)
        hidden, _ = llama(tokens_T, training_rows(model, jnp.arange(tokens_T.shape[0])))
        return log_probs(llama.logits(hidden[last]), 1.0, jnp.asarray(mask))

    return jax.jit(forward)


class NaiveInterpreter:
    """Runs one program at a time, children one after the other, greedily, by full forwards without any cache.

    Where a token that the engine chose (`chosen`, by path) is within TOLERANCE of the best, it is taken: ties aside,
    the interpreter decides for itself.
    """

    def __init__(
        self, chosen: Rollout, model: ModelConfig = MODEL, max_steps: int = 32, banned: tuple[int, ...] = BANNED
    ):
        self.model, self.max_steps = model, max_steps
        params = make_params(model)
        self._chosen: dict[tuple[int, ...], list[int]] = {}
        for call in chosen.calls:
            self._chosen.setdefault(call.path, []).extend(call.tokens.tolist())
        mask = np.zeros((model.vocab_size,), bool)
        mask[list(banned)] = True

        self._forward = _forward(model, mask.tobytes())
        self._params = params
        self.calls: list[tuple[tuple[int, ...], list[int], list[int], list[float], Stop]] = []

    def logprobs(self, tokens: Sequence[int]) -> np.ndarray:
        padded = np.zeros((self.model.max_seq_len,), np.int32)
        padded[: len(tokens)] = tokens
        return np.asarray(self._forward(self._params, padded, len(tokens) - 1))

    def run(self, program: Program, path: tuple[int, ...] = ()) -> Any:
        from apr_jax.engine.threads import Thread

        thread: Thread | None = None
        value: Any = None
        spawns: list[Any] = []
        generated = 0
        while True:
            try:
                request = program.send(value)
            except StopIteration as stop:
                return stop.value
            value = None
            match request:
                case Open(tokens, fork_of):
                    inherited = fork_of.tokens if fork_of is not None else []
                    thread = value = Thread(path, [*inherited, *tokens], 0, (0, 0))
                case Truncate(_, length):
                    del thread.tokens[length:]
                case Append(_, tokens):
                    thread.tokens.extend(tokens)
                case Spawn(programs):
                    value = len(spawns)
                    spawns.append(
                        [self.run(child, (*path, len(spawns), index)) for index, child in enumerate(programs)]
                    )
                case Join(handle, _):
                    value = spawns[handle]
                case Decode(_, stop_tokens):
                    value, wrote = self._decode(thread, stop_tokens, self.max_steps - generated)
                    generated += wrote

    def _decode(self, thread: Any, stop_tokens: tuple[int, ...], steps: int) -> tuple[Stop, int]:
        context, logprobs_written, stop = list(thread.tokens), [], None
        engine_chose = self._chosen.get(thread.path, [])
        while stop is None:
            if len(thread.tokens) >= self.model.max_seq_len:
                stop = Stop(StopReason.LENGTH, None)
            elif len(logprobs_written) >= steps:
                stop = Stop(StopReason.MAX_STEPS, None)
            else:
                logprobs = self.logprobs(thread.tokens)
                token = int(np.argmax(logprobs))
                if engine_chose and logprobs[engine_chose[0]] > logprobs[token] - TOLERANCE:
                    token = engine_chose[0]
                del engine_chose[:1]
                logprobs_written.append(float(logprobs[token]))
                thread.tokens.append(token)
                if token in stop_tokens:
                    stop = Stop(StopReason.TOKEN, token)
        if logprobs_written:
            self.calls.append((thread.path, context, thread.tokens[len(context) :], logprobs_written, stop))
        return stop, len(logprobs_written)


def assert_equals_naive(rollout: Rollout, program: Program, **changes: Any) -> None:
    """Same result, calls, tokens and stops as the naive interpreter's, and log-probabilities to TOLERANCE."""
    naive = NaiveInterpreter(rollout, **changes)
    assert rollout.result == naive.run(program)
    expected = sorted(naive.calls, key=lambda call: call[0])
    assert [call.path for call in rollout.calls] == [call[0] for call in expected]
    for call, (_, context, tokens, logprobs, stop) in zip(rollout.calls, expected, strict=True):
        assert call.context.tolist() == context
        assert call.tokens.tolist() == tokens
        assert call.stop == stop
        np.testing.assert_allclose(call.logprobs, logprobs, atol=TOLERANCE)


def assert_same_bits(first: Rollout, second: Rollout) -> None:
    assert [call.path for call in first.calls] == [call.path for call in second.calls]
    for a, b in zip(first.calls, second.calls, strict=True):
        np.testing.assert_array_equal(a.context, b.context)
        np.testing.assert_array_equal(a.tokens, b.tokens)
        assert a.logprobs.tobytes() == b.logprobs.tobytes()
        assert (a.stop, a.clock_start) == (b.stop, b.clock_start)
        jax.tree.map(np.testing.assert_array_equal, _masks(a), _masks(b))
    assert first.sequential_tokens == second.sequential_tokens


def _masks(call: Call) -> Any:
    return None if call.masks is None else (call.masks.bans, call.masks.allowed)


def assert_close(first: Rollout, second: Rollout) -> None:
    """Same tokens, log-probabilities to TOLERANCE."""
    assert [call.path for call in first.calls] == [call.path for call in second.calls]
    for a, b in zip(first.calls, second.calls, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=TOLERANCE)


def keyed(programs: Sequence[Program]) -> list[tuple[RolloutKey, Program]]:
    return [(RolloutKey(problem, 0), program) for problem, program in enumerate(programs)]


def all_calls(rollouts: Sequence[Rollout]) -> list[Call]:
    return [call for rollout in rollouts for call in rollout.calls]
