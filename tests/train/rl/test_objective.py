"""Every objective against TRL's numbers, by hand, and however its batch is cut."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.config import ConfigError
from apr_jax.data.packing import pack
from apr_jax.train.rl import objective
from apr_jax.train.rl.objective import OBJECTIVES, CallWeights, Tokens, call_weights, choose_objective
from tests.train.small import small_config

GRPO = small_config().grpo
ORACLE = json.loads((pathlib.Path(__file__).parents[2] / "oracles" / "trl_objectives.json").read_text())
REFERENCE = pathlib.Path(__file__).parents[2] / "oracles" / "grpo_reference.json"
OURS = {"bnpo": "dapo"}  # the mean over a batch's tokens: TRL tells them apart only under gradient accumulation
NAMES = tuple(OBJECTIVES)


def _grpo(name, **fields):
    return dataclasses.replace(GRPO, objective=name, **fields)


def tokens_of(advantage, policy, kl, rollout=None, call=None):
    """Target tokens without log-probabilities."""
    rollout = np.zeros_like(policy) if rollout is None else rollout
    call = np.ones_like(policy) if call is None else call
    arrays = {"advantage_BT": advantage, "policy_weight_BT": policy, "kl_weight_BT": kl, "rollout_logprob_BT": rollout}
    floats = {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}
    unknown = dict.fromkeys(("logprob_BT", "old_logprob_BT", "reference_logprob_BT"), floats["advantage_BT"])
    return Tokens(**floats, **unknown, call_BT=jnp.asarray(call, jnp.int32))


def loss_of(grpo, tokens, new, old, reference):
    """((loss, terms), gradient in the new log-probabilities)."""
    new, old, reference = (jnp.asarray(x, jnp.float32) for x in (new, old, reference))

    def loss_fn(new):
        given = {"logprob_BT": new, "old_logprob_BT": old, "reference_logprob_BT": reference}
        terms = choose_objective(grpo).terms(grpo, dataclasses.replace(tokens, **given))
        return terms.loss, terms

    return jax.value_and_grad(loss_fn, has_aux=True)(new)


@pytest.mark.parametrize("case", ORACLE["cases"], ids=lambda case: case["name"])
def test_loss_and_gradient_equal_trl(case):
    name = OURS.get(case["loss_type"], case["loss_type"]) if "level" not in case else "gspo"
    grpo = _grpo(
        name,
        length_normaliser=ORACLE["max_completion_length"],
        kl_coef=ORACLE["beta"],
        clip_ratio=case["low"],
        clip_ratio_high=case["high"],
        importance_cap=case.get("cap", 0.0),
    )
    mask = np.asarray(ORACLE["mask"], np.float32)
    advantages, expected = np.asarray(ORACLE["advantages"]), case["expected"]
    weights = choose_objective(grpo).weights(grpo, range(len(mask)), mask.sum(1).astype(int).tolist())
    tokens = tokens_of(
        advantages[:, None] * mask,
        np.asarray([[w.policy] for w in weights]) * mask,
        np.asarray([[w.kl] for w in weights]) * mask,
        ORACLE["rollout_logprobs"],
        mask,
    )
    arrays = [ORACLE[key] for key in ("logprobs", "old_logprobs", "ref_logprobs")]
    (loss, terms), grad = loss_of(grpo, tokens, *arrays)
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
        grpo = _grpo(name, group_size=4, advantage_eps=0.0 if name == "dr_grpo" else 1e-12)
        advantages = choose_objective(grpo).advantages(grpo, rewards)
        np.testing.assert_allclose(advantages[:4], expected, rtol=1e-9, err_msg=name)
        assert not advantages[4:].any()


def test_weights_by_hand():
    calls = ([0, 0, 1], [4, 2, 3])  # rollout 0 has calls of 4 and 2 tokens, rollout 1 one of 3
    expected = {
        "grpo": ([1 / (3 * 2 * 4), 1 / (3 * 2 * 2), 1 / (3 * 3)], [0.1 / 12, 0.1 / 6, 0.1 / 9]),
        "dr_grpo": ([1 / (2 * 50)] * 3, [0.1 / 100] * 3),
        "dapo": ([1 / 9] * 3, [0.1 / 9] * 3),
    }
    expected |= {"gspo": expected["grpo"], "cispo": expected["dapo"]}
    for name in NAMES:
        grpo = _grpo(name, length_normaliser=50, kl_coef=0.1)
        weights = choose_objective(grpo).weights(grpo, *calls)
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
    grpo = _grpo(name, clip_ratio=0.2, clip_ratio_high=0.3, importance_cap=0.0)
    tokens = tokens_of([[advantage, advantage, 0]], [[1, 1, 0]], [[0, 0, 0]], call=[[1, 1, 2]])
    (loss, terms), grad = loss_of(grpo, tokens, new, old, new)
    np.testing.assert_allclose(loss, -np.sum(objective), rtol=1e-6)
    np.testing.assert_allclose(grad, [[-slope[0], -slope[1], 0]], rtol=1e-5, atol=1e-7)
    assert int(terms.clipped) == clipped


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_does_not_depend_on_how_sequences_are_packed(name):
    rng = np.random.default_rng(0)
    grpo = _grpo(name, kl_coef=0.1, clip_ratio=0.2, clip_ratio_high=0.28, importance_cap=2.0)
    lengths, rollouts = rng.integers(2, 12, 9).tolist(), sorted(rng.integers(0, 4, 9).tolist())
    generated = [np.arange(length) >= rng.integers(0, length) for length in lengths]
    weights = choose_objective(grpo).weights(grpo, rollouts, [int(g.sum()) for g in generated])
    sequences = [
        {
            "advantage": rng.normal() * g,
            "policy_weight": w.policy * g,
            "kl_weight": w.kl * g,
            **{k: -rng.exponential(size=len(g)) for k in ("rollout_logprob", "new", "old", "reference")},
        }
        for g, w in zip(generated, weights, strict=True)
    ]

    def packed_loss(row_len, order):
        packing = pack([sequences[i] for i in order], row_len)
        rows = packing.rows
        fields = ("advantage", "policy_weight", "kl_weight", "rollout_logprob", "segment_ids")
        tokens = tokens_of(*(rows[field] for field in fields))
        (loss, _), grad = loss_of(grpo, tokens, rows["new"], rows["old"], rows["reference"])
        return loss, [x for _, x in sorted(zip(order, packing.read_back(np.asarray(grad)), strict=True))]

    alone, alone_grads = zip(*(packed_loss(12, [i]) for i in range(9)), strict=True)
    expected_grads = [grads[0] for grads in alone_grads]
    for row_len, order in ((12, range(9)), (80, rng.permutation(9).tolist())):
        loss, grads = packed_loss(row_len, list(order))
        np.testing.assert_allclose(loss, sum(alone), rtol=1e-5)
        for grad, expected in zip(grads, expected_grads, strict=True):
            np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_without_loss_cannot_poison_it(name):
    grpo = _grpo(name, clip_ratio=0.2, clip_ratio_high=0.2, importance_cap=2.0)
    tokens = tokens_of([[1.0, 0.0]], [[1.0, 0.0]], [[0.1, 0.0]])
    new, old = [[-1.0, -np.inf]], [[-1.5, 0.0]]
    (loss, _), grad = loss_of(grpo, tokens, new, old, old)
    assert np.isfinite(loss)
    assert np.isfinite(grad).all()
    assert float(grad[0, 1]) == 0


def test_sums_of_calls():
    ids = jnp.asarray([[1, 1, 2, 0], [1, 2, 3, 4]])
    values = jnp.asarray([[1.0, 2.0, 5.0, 7.0], [1.0, 2.0, 3.0, 4.0]])
    np.testing.assert_array_equal(objective._sum_of_call(values, ids), [[3, 3, 5, 7], [1, 2, 3, 4]])


def test_a_name_that_is_none_is_refused_with_the_closest():
    with pytest.raises(ConfigError, match=r"grpo\.objective='dr\.grpo': choose one of .* did you mean 'dr_grpo'\?"):
        choose_objective(_grpo("dr.grpo"))


@pytest.mark.parametrize("case", json.loads(REFERENCE.read_text()), ids=["apr", "serial"])
def test_grpo_equals_the_released_apr_code(case):
    grpo = _grpo(
        "grpo",
        group_size=case["group_size"],
        advantage_eps=1e-10,
        kl_coef=case["kl_coef"],
        clip_ratio=case["clip_ratio"],
        clip_ratio_high=case["clip_ratio"],
        importance_cap=0.0,
    )
    mask = np.asarray(case["mask"], np.float32)
    expected = case["expected"]
    advantages = choose_objective(grpo).advantages(grpo, case["rewards"])[case["rollout_of_call"]]
    np.testing.assert_allclose(advantages, expected["advantages"], atol=1e-7)
    weights = call_weights(grpo, case["rollout_of_call"], mask.sum(1).astype(int).tolist())
    tokens = tokens_of(
        advantages[:, None] * mask,
        np.asarray([[w.policy] for w in weights]) * mask,
        np.asarray([[w.kl] for w in weights]) * mask,
    )
    (loss, terms), grad = loss_of(grpo, tokens, *(case[k] for k in ("logprobs", "old_logprobs", "ref_logprobs")))
    np.testing.assert_allclose(terms.policy_loss, expected["policy_loss"], atol=1e-5)
    np.testing.assert_allclose(terms.kl_loss / case["kl_coef"], expected["kl_loss"], atol=1e-5)
    np.testing.assert_allclose(loss, expected["loss"], atol=1e-5)
    np.testing.assert_allclose(terms.clipped / terms.tokens, expected["clip_fraction"], atol=1e-5)
    np.testing.assert_allclose(grad, expected["grad_logprobs"], atol=1e-5)


def test_weights_sum_to_what_the_nested_means_say():
    rollouts, tokens = [0, 0, 0, 1, 2, 2], [4, 1, 7, 3, 2, 0]
    weights = call_weights(_grpo("grpo", kl_coef=0.01), rollouts, tokens)
    assert weights[0] == CallWeights(policy=1 / (6 * 3 * 4), kl=0.01 / (6 * 4))
    # A rollout's policy weights sum to 1/N however many calls it has; every call's KL weights to beta/N.
    for rollout in (0, 1):
        total = sum(w.policy * t for r, t, w in zip(rollouts, tokens, weights, strict=True) if r == rollout)
        np.testing.assert_allclose(total, 1 / 6)
    np.testing.assert_allclose(sum(w.kl * t for t, w in zip(tokens, weights, strict=True)), 0.01 * 5 / 6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "slope"),
    [(1.0, 2.0, 2.0, 2.0), (1.5, 2.0, 2.4, 0.0), (0.5, 2.0, 1.0, 1.0), (0.5, -2.0, -1.6, 0.0), (1.5, -2.0, -3.0, -3.0)],
)
def test_the_clipped_surrogate_by_hand(ratio, advantage, expected, slope):
    grpo = _grpo("grpo", clip_ratio=0.2, clip_ratio_high=0.2, importance_cap=0.0)
    new = np.log([[ratio]])
    (loss, terms), grad = loss_of(grpo, tokens_of([[advantage]], [[1]], [[0]]), new, np.zeros((1, 1)), new)
    np.testing.assert_allclose(loss, -expected, rtol=1e-6)
    np.testing.assert_allclose(grad, [[-slope]], rtol=1e-6)
    assert int(terms.clipped) == int(slope == 0)


def test_importance_weight_is_truncated():
    grpo = _grpo("grpo", importance_cap=2.0)
    tokens = tokens_of([[1.0, 1.0]], [[1, 1]], [[0, 0]], rollout=np.log([[0.5, 0.01]]))
    old = np.log([[0.25, 0.5]])
    (loss, _), _ = loss_of(grpo, tokens, old, old, old)
    np.testing.assert_allclose(loss, -(0.5 + 2.0), rtol=1e-6)
