"""From rollouts to training sequences."""

import dataclasses

import numpy as np

from apr_jax.data.tokenizer import load_tokenizer
from apr_jax.engine.threads import Call, Rollout, RolloutKey, Stop, StopReason
from apr_jax.engine.work_counters import Work
from apr_jax.reasoning.base import Outcome
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.countdown.task import COUNTDOWN
from apr_jax.train.rl.sample import score
from apr_jax.train.rl.sequences import training_sequences
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


def two_rollouts():
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


def scored_rollouts(rollouts, grpo=CONFIG.grpo):
    return score(grpo, rollouts, [PROBLEM] * len(rollouts), TOKENIZER, COUNTDOWN)


def sequences_of(scored, kl_coef):
    grpo = dataclasses.replace(CONFIG.grpo, kl_coef=kl_coef)
    return training_sequences(grpo, scored, None, branches=False)


def test_every_call_becomes_a_sequence_with_loss_on_its_generated_tokens():
    scored = scored_rollouts(two_rollouts())
    assert [each.reward for each in scored] == [1.0, 0.0]
    np.testing.assert_allclose([each.advantage for each in scored], [1, -1], rtol=1e-5)
    sequences = sequences_of(scored, kl_coef=0.01)
    assert len(sequences) == 3  # the call without tokens has no sequence, and counts among the 4
    call, sequence = scored[0].rollout.calls[0], sequences[0]
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
    pair = two_rollouts()
    same = [pair[1], dataclasses.replace(pair[1], key=RolloutKey(0, 2))]
    scored = scored_rollouts([*pair, *same])
    assert len(sequences_of(scored, kl_coef=0.01)) == 5
    kept = sequences_of(scored, kl_coef=0.0)
    assert len(kept) == 3
    # N counts all 6 calls.
    np.testing.assert_allclose(kept[-1]["policy_weight"].sum(), 1 / 6, rtol=1e-6)
