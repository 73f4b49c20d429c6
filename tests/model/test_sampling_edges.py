"""No banned token is drawn at any temperature, and draws go over to the argmax as the temperature goes to 0."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.config_fields import LEAST_TEMPERATURE
from apr_jax.engine import policy_masks
from apr_jax.engine.constraints import EDGE_FIELDS, Gate
from apr_jax.engine.steps import Sampling, draw_tokens
from apr_jax.model import ops
from apr_jax.model.sampling import log_probs
from apr_jax.model.truncation import Truncation

VOCAB, LANES = 53, 64
LOWEST = [0.0, 1e-45, 1e-40, 1.2e-38, 1e-35, 1e-30, 1e-29, 1e-28, 1e-25, 1e-21, 1e-20, 1e-10, 1e-6]
TEMPERATURES = [*LOWEST, 1e-3, 0.5, 1.0, 10.0, 1e6, 1e20, 1e30]
BANNED = np.arange(VOCAB) % 3 == 1


def draws():
    """The functions that draw, by name: XLA's, which accelerators share, that of CPU kernels, and a gated engine's."""
    found = {"xla": ops.XLA.draw}
    with contextlib.suppress(ImportError):
        from apr_jax.kernels.cpu import build
        from apr_jax.kernels.cpu.ops import DECODING

        if build.is_available():
            found["cpu"] = DECODING["float32"].draw

    def gated(logits_LV, temperature, banned_V, uniform_L):
        gate = Gate(token=5, reserved=(6, 7), follows=frozenset((8,)), max_edges=1, max_leaves=2)
        masks = jax.tree.map(jnp.asarray, policy_masks.gate_masks(gate, VOCAB))
        registers = policy_masks.LaneRegisters(*(jnp.zeros((LANES, *shape), jnp.int32) for shape in ((), (1,), ())))
        edges = jnp.zeros((LANES, 4, EDGE_FIELDS + 1), jnp.int32)
        constraints = policy_masks.LaneConstraints(edges, jnp.full(LANES, -1, jnp.int32), registers)
        token_L, step = jnp.zeros(LANES, jnp.int32), jnp.int32(0)
        drawn = draw_tokens(
            ops.XLA, logits_LV, uniform_L, Sampling(temperature, banned_V, masks), constraints, token_L, step
        )
        return drawn[0], drawn[1]

    def cut_off(logits_LV, temperature, banned_V, uniform_L):
        some = Sampling(temperature, banned_V, truncation=Truncation(top_k=40, top_p=0.9, min_p=1e-3))
        drawn = draw_tokens(ops.XLA, logits_LV, uniform_L, some, None, jnp.zeros(LANES, jnp.int32), jnp.int32(0))
        return drawn[0], drawn[1]

    return found | {"gated": gated, "cut off": cut_off}


DRAWS = draws()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("path", DRAWS)
def test_no_banned_token_is_drawn_and_the_coldest_draws_are_the_argmax(path, spread, dtype):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.permuted(np.linspace(-1, 1, LANES * VOCAB)).reshape(LANES, VOCAB) * spread, dtype)
    logits = logits.astype(jnp.float32)
    logits = jnp.where(BANNED, jnp.abs(logits) + spread, logits)  # banned ones would be likeliest
    uniform = jnp.linspace(0.0, 1.0 - 2**-24, LANES, dtype=jnp.float32)
    best = np.where(BANNED, -np.inf, logits)
    draw = jax.jit(DRAWS[path])
    for temperature in TEMPERATURES:
        tokens, logprobs = (np.asarray(x) for x in draw(logits, jnp.float32(temperature), jnp.asarray(BANNED), uniform))
        assert not BANNED[tokens].any(), temperature
        assert np.isfinite(logprobs).all(), temperature
        assert (logprobs <= 1e-6).all(), temperature
        chosen = np.take_along_axis(best, tokens[:, None], axis=1)[:, 0]
        if temperature < 1e-7 * spread:
            np.testing.assert_array_equal(chosen, best.max(axis=1), err_msg=str(temperature))


def test_what_counts_as_zero_is_told_apart_at_one_place():
    logits = jnp.asarray([0.0, 1.0, 2.0])
    at_one = log_probs(logits, 1.0, jnp.zeros(3, bool))
    for temperature in (0.0, 1e-45, 9e-21):
        np.testing.assert_array_equal(log_probs(logits, temperature, jnp.zeros(3, bool)), at_one)
    coldest = np.exp(log_probs(logits, LEAST_TEMPERATURE, jnp.zeros(3, bool)))
    np.testing.assert_array_equal(coldest, [0, 0, 1])
