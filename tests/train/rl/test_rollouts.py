"""From rollouts to training sequences, and what is logged."""

import dataclasses

import numpy as np
import pytest

from apr_jax.data.tokenizer import load_tokenizer
from apr_jax.engine.threads import Call, Rollout, RolloutKey, Stop, StopReason
from apr_jax.engine.work_counters import Work
from apr_jax.reasoning.outcome import Outcome
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.countdown.task import COUNTDOWN
from apr_jax.train.rl import rollouts
from tests.train.small import small_config

CONFIG = small_config(**{"grpo.prompts_per_step": 1, "grpo.group_size": 2})
TOKENIZER = load_tokenizer("builtin")
PROBLEM = Problem((2, 3, 4), 20)
RIGHT = (
    "Exploring Operation: 2+3=5, Resulting Numbers: [4, 5]\n"
    "Exploring Operation: 4*5=20, Resulting Numbers: [20]\n"
    "20,20 equal: Goal Reached\n"
)


def _call(path, context, tokens, logprob=-0.5):
    return Call(
        path=path,
        context=np.asarray(context, np.int32),
        tokens=np.asarray(tokens, np.int32),
        logprobs=np.full(len(tokens), logprob, np.float32),
        stop=Stop(StopReason.MAX_STEPS, None),
        clock_start=0,
        start_ms=0.0,
        end_ms=1.0,
    )


def _rollout(sample, calls, **outcome):
    values = {"answer": None, "status": "no_solution", "reason": "no_solution", **outcome}
    return Rollout(RolloutKey(0, sample), Outcome(**values), tuple(calls), 7, 5.0, Work())


def _two_rollouts():
    words = TOKENIZER.encode("Exploring Operation: 2+3=5, Resulting Numbers: [4, 5]\n")
    first = _rollout(
        0,
        [_call((), [1, 2, 3], words), _call((), [1, 2], words[:2]), _call((0, 0), [1], [])],
        answer=RIGHT,
        status="answered",
        reason="",
        num_spawns=1,
        num_children=3,
        child_reasons=("max_steps",),
    )
    return [first, _rollout(1, [_call((), [1], words[:4], logprob=-1.0)], status="malformed", reason="no_call_begin")]


def test_every_call_becomes_a_sequence_with_loss_on_its_generated_tokens():
    scored = rollouts.score(_two_rollouts(), [PROBLEM, PROBLEM], CONFIG.grpo, COUNTDOWN)
    assert scored.rewards == (1.0, 0.0)
    np.testing.assert_allclose(scored.advantages, [1, -1], rtol=1e-5)
    sequences = rollouts.training_sequences(scored, kl_coef=0.01)
    assert len(sequences) == 3  # the call without tokens has no sequence, and counts among the 4
    call, sequence = scored.rollouts[0].calls[0], sequences[0]
    whole = [*call.context, *call.tokens]
    assert sequence["tokens"].tolist() == whole[:-1]
    assert sequence["targets"].tolist() == whole[1:]
    generated = np.arange(len(whole) - 1) >= 2
    np.testing.assert_array_equal(sequence["policy_weight"] > 0, generated)
    assert sequence["targets"][generated].tolist() == call.tokens.tolist()
    np.testing.assert_allclose(sequence["rollout_logprob"], -0.5 * generated)
    np.testing.assert_allclose([s["policy_weight"].sum() for s in sequences], [1 / 12, 1 / 12, 1 / 4], rtol=1e-6)
    np.testing.assert_allclose([s["kl_weight"].sum() for s in sequences], [0.01 / 4] * 3, rtol=1e-6)
    assert [s["advantage"][-1] > 0 for s in sequences] == [True, True, False]


def test_calls_without_signal_are_left_out_only_when_they_have_no_loss():
    pair = _two_rollouts()
    same = [pair[1], dataclasses.replace(pair[1], key=RolloutKey(0, 2))]
    config = dataclasses.replace(CONFIG.grpo, group_size=2)
    scored = rollouts.score([*pair, *same], [PROBLEM] * 4, config, COUNTDOWN)
    assert len(rollouts.training_sequences(scored, kl_coef=0.01)) == 5
    kept = rollouts.training_sequences(scored, kl_coef=0.0)
    assert len(kept) == 3
    # N counts all 6 calls.
    np.testing.assert_allclose(kept[-1]["policy_weight"].sum(), 1 / 6, rtol=1e-6)


def test_logged_figures():
    scored = rollouts.score(_two_rollouts(), [PROBLEM, PROBLEM], CONFIG.grpo, COUNTDOWN)
    metrics = rollouts.rollout_metrics(scored, [PROBLEM, PROBLEM], TOKENIZER, CONFIG)
    words = len(scored.rollouts[0].calls[0].tokens)
    drawn = words + 2 + 4
    assert metrics["accuracy"] == 0.5
    assert metrics["reward"] == 0.5
    assert metrics["spawn_depth"] == 0.5
    assert metrics["advantage_share"] == 1
    assert metrics["no_signal_groups"] == 0
    assert metrics["children_per_rollout"] == 1.5
    assert metrics["children_per_spawn"] == 3
    assert metrics["malformed_rate"] == 0.5
    assert metrics["malformed_reasons"] == {"no_call_begin": 1}
    assert metrics["truncated_reasons"] == {}
    assert metrics["child_reasons"] == {"max_steps": 1}
    assert metrics["total_tokens"] == drawn / 2
    assert metrics["calls"] == 4
    np.testing.assert_allclose(metrics["entropy"], (0.5 * (words + 2) + 1.0 * 4) / drawn)


def test_problems_of_a_step_are_distinct_and_repeatable():
    first = rollouts.choose_problems(100, 16, seed=3, step=5)
    assert len(set(first)) == 16
    assert first == rollouts.choose_problems(100, 16, seed=3, step=5)
    assert first != rollouts.choose_problems(100, 16, seed=3, step=6)
    assert first != rollouts.choose_problems(100, 16, seed=4, step=5)
    with pytest.raises(ValueError, match="prompts_per_step=16 exceeds the 8 problems"):
        rollouts.choose_problems(8, 16, seed=0, step=0)
    seeds = {rollouts.rollout_seed(seed, step) for seed in range(10) for step in range(10)}
    assert len(seeds) == 100
    assert max(seeds) < 2**31


def test_gap_between_rollout_and_trainer():
    same = np.log(np.asarray([0.1, 0.5, 0.9], np.float32))
    assert rollouts.gap_metrics(same, same) == pytest.approx(
        {"logp_diff_mean": 0, "logp_diff_max": 0, "probs_pearson_corr": 1}
    )
    other = np.log(np.asarray([0.9, 0.5, 0.1], np.float32))
    assert rollouts.gap_metrics(same, other)["probs_pearson_corr"] == pytest.approx(-1)
    assert rollouts.gap_metrics(same, same + np.float32([0, 0, 0.3]))["logp_diff_max"] == pytest.approx(0.3, rel=1e-5)
    assert rollouts.gap_metrics(np.zeros(0), np.zeros(0))["probs_pearson_corr"] == 1
    assert rollouts.truncated_share(same, same - np.float32([0, 0.6, 0.8]), 2.0) == pytest.approx(1 / 3)
    assert rollouts.truncated_share(same, other, 0.0) == rollouts.truncated_share(np.zeros(0), np.zeros(0), 2.0) == 0
