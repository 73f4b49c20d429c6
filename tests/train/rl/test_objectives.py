"""Every objective against TRL's numbers, by hand, and however its batch is cut."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.data.packing import pack
from apr_jax.train import losses
from apr_jax.train.rl import objectives
from apr_jax.train.rl.objectives import make_objective
from tests.data.packed import read_back
from tests.train.small import small_config

GRPO = small_config().grpo
ORACLE = json.loads((pathlib.Path(__file__).parents[2] / "oracles" / "trl_objectives.json").read_text())
OURS = {"bnpo": "dapo"}  # the mean over a batch's tokens: TRL tells them apart only under gradient accumulation
NAMES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")


def _objective(name, **fields):
    return make_objective(dataclasses.replace(GRPO, objective=name, **fields))


def _loss(objective, tokens, ids, arrays, low, high, cap):
    loss_fn = functools.partial(
        losses.grpo_loss,
        tokens=tokens,
        clip_ratio=low,
        clip_ratio_high=high,
        importance_cap=cap,
        surrogate=objective.surrogate(jnp.asarray(ids, jnp.int32)),
    )
    return jax.value_and_grad(loss_fn, has_aux=True)(*(jnp.asarray(x, jnp.float32) for x in arrays))


@pytest.mark.parametrize("case", ORACLE["cases"], ids=lambda case: case["name"])
def test_loss_and_gradient_equal_trl(case):
    name = OURS.get(case["loss_type"], case["loss_type"]) if "level" not in case else "gspo"
    objective = _objective(name, length_normaliser=ORACLE["max_completion_length"])
    mask = np.asarray(ORACLE["mask"], np.float32)
    advantages, expected = np.asarray(ORACLE["advantages"]), case["expected"]
    weights = objective.weigh(range(len(mask)), mask.sum(1).astype(int).tolist(), ORACLE["beta"])
    tokens = losses.GRPOTokens(
        advantage_BT=jnp.asarray(advantages[:, None] * mask, jnp.float32),
        policy_weight_BT=jnp.asarray(np.asarray([[w.policy] for w in weights]) * mask, jnp.float32),
        kl_weight_BT=jnp.asarray(np.asarray([[w.kl] for w in weights]) * mask, jnp.float32),
        rollout_logprob_BT=jnp.asarray(ORACLE["rollout_logprobs"], jnp.float32),
    )
    arrays = [ORACLE[key] for key in ("logprobs", "old_logprobs", "ref_logprobs")]
    (loss, terms), grad = _loss(objective, tokens, mask, arrays, case["low"], case["high"], case.get("cap", 0.0))
    np.testing.assert_allclose(loss, expected["loss"], atol=1e-6)
    np.testing.assert_allclose(grad, expected["grad_logprobs"], atol=1e-6)
    np.testing.assert_allclose(terms.k3 / terms.tokens, expected["kl"], rtol=1e-5)
    if "clip_fraction" in expected:
        assert expected["clip_fraction"] > 0
        np.testing.assert_allclose(terms.clipped / terms.tokens, expected["clip_fraction"], rtol=1e-5)


def test_advantages_by_hand():
    rewards = [1, 0, 0, 0, 1, 1, 1, 1]
    std = np.sqrt(3) / 4
    for name in NAMES:
        expected = np.asarray([0.75, -0.25, -0.25, -0.25]) / (1 if name == "dr_grpo" else std)
        advantages = _objective(name).advantages(rewards, 4, 0.0 if name == "dr_grpo" else 1e-12)
        np.testing.assert_allclose(advantages[:4], expected, rtol=1e-9, err_msg=name)
        assert not advantages[4:].any()


def test_weights_by_hand():
    calls = ([0, 0, 1], [4, 2, 3], 0.1)  # rollout 0 has calls of 4 and 2 tokens, rollout 1 one of 3
    expected = {
        "grpo": ([1 / (3 * 2 * 4), 1 / (3 * 2 * 2), 1 / (3 * 3)], [0.1 / 12, 0.1 / 6, 0.1 / 9]),
        "dr_grpo": ([1 / (2 * 50)] * 3, [0.1 / 100] * 3),
        "dapo": ([1 / 9] * 3, [0.1 / 9] * 3),
    }
    expected |= {"gspo": expected["grpo"], "cispo": expected["dapo"]}
    for name in NAMES:
        weights = _objective(name, length_normaliser=50).weigh(*calls)
        np.testing.assert_allclose([w.policy for w in weights], expected[name][0], err_msg=name)
        np.testing.assert_allclose([w.kl for w in weights], expected[name][1], err_msg=name)


# Two tokens of one sequence with ratios 1.5 and 0.5; clips at 0.8 and 1.3. (objective and slope in new, per token)
SQRT = np.sqrt(0.75)
BY_HAND = {
    ("grpo", 1.0): ([1.3, 0.5], [0.0, 0.5], 1),  # the first is clipped from above
    ("grpo", -2.0): ([-3.0, -1.6], [-3.0, 0.0], 1),  # the second from below
    ("gspo", 1.0): ([SQRT, SQRT], [SQRT, SQRT], 0),  # one ratio, sqrt(1.5 * 0.5), within the bounds
    ("gspo", -2.0): ([-2 * SQRT, -2 * SQRT], [-2 * SQRT, -2 * SQRT], 0),
    ("cispo", 1.0): ([1.3 * np.log(0.6), 0.8 * np.log(0.1)], [1.3, 0.8], 2),  # clipped tokens still learn
    ("cispo", -2.0): ([-2.6 * np.log(0.6), -1.6 * np.log(0.1)], [-2.6, -1.6], 2),
}


@pytest.mark.parametrize(("name", "advantage"), BY_HAND, ids=str)
def test_surrogates_by_hand(name, advantage):
    objective, slope, clipped = BY_HAND[name, advantage]
    new, old = np.log([[0.6, 0.1, 0.9]]), np.log([[0.4, 0.2, 0.1]])  # the third token is another sequence's context
    tokens = losses.GRPOTokens(
        *(jnp.asarray(x, jnp.float32) for x in ([[advantage, advantage, 0]], [[1, 1, 0]], [[0, 0, 0]], [[0, 0, 0]]))
    )
    ids = [[1, 1, 2]]
    (loss, terms), grad = _loss(_objective(name), tokens, ids, (new, old, new), 0.2, 0.3, 0.0)
    np.testing.assert_allclose(loss, -np.sum(objective), rtol=1e-6)
    np.testing.assert_allclose(grad, [[-slope[0], -slope[1], 0]], rtol=1e-5, atol=1e-7)
    assert int(terms.clipped) == clipped


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_does_not_depend_on_how_sequences_are_packed(name):
    rng = np.random.default_rng(0)
    objective = _objective(name, kl_coef=0.1)
    lengths, rollouts = rng.integers(2, 12, 9).tolist(), sorted(rng.integers(0, 4, 9).tolist())
    generated = [np.arange(length) >= rng.integers(0, length) for length in lengths]
    weights = objective.weigh(rollouts, [int(g.sum()) for g in generated], 0.1)
    sequences = [
        {
            "advantage": rng.normal() * g,
            "policy_weight": w.policy * g,
            "kl_weight": w.kl * g,
            **{k: -rng.exponential(size=len(g)) for k in ("rollout_logprob", "new", "old", "reference")},
        }
        for g, w in zip(generated, weights, strict=True)
    ]

    def loss_of(row_len, order):
        packing = pack([sequences[i] for i in order], row_len)
        rows = packing.rows
        fields = ("advantage", "policy_weight", "kl_weight", "rollout_logprob")
        tokens = losses.GRPOTokens(*(jnp.asarray(rows[field], jnp.float32) for field in fields))
        arrays = [rows[field] for field in ("new", "old", "reference")]
        (loss, _), grad = _loss(objective, tokens, rows["segment_ids"], arrays, 0.2, 0.28, 2.0)
        return loss, [x for _, x in sorted(zip(order, read_back(packing, np.asarray(grad)), strict=True))]

    alone, alone_grads = zip(*(loss_of(12, [i]) for i in range(9)), strict=True)
    expected_grads = [grads[0] for grads in alone_grads]
    for row_len, order in ((12, range(9)), (80, rng.permutation(9).tolist())):
        loss, grads = loss_of(row_len, list(order))
        np.testing.assert_allclose(loss, sum(alone), rtol=1e-5)
        for grad, expected in zip(grads, expected_grads, strict=True):
            np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_without_loss_cannot_poison_it(name):
    tokens = losses.GRPOTokens(*(jnp.asarray([[x, 0.0]]) for x in (1.0, 1.0, 0.1, 0.0)))
    new, old = [[-1.0, -np.inf]], [[-1.5, 0.0]]
    (loss, _), grad = _loss(_objective(name), tokens, [[1, 1]], (new, old, old), 0.2, 0.2, 2.0)
    assert np.isfinite(loss)
    assert np.isfinite(grad).all()
    assert float(grad[0, 1]) == 0


def test_sums_of_segments():
    ids = jnp.asarray([[1, 1, 2, 0], [1, 2, 3, 4]])
    values = jnp.asarray([[1.0, 2.0, 5.0, 7.0], [1.0, 2.0, 3.0, 4.0]])
    np.testing.assert_array_equal(objectives._sum_of_segment(values, ids), [[3, 3, 5, 7], [1, 2, 3, 4]])
