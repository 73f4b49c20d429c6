"""What is logged of a step."""

import numpy as np
import pytest

from apr_jax.train.rl.sample import Sample
from apr_jax.train.rl.step_metrics import compare_logprobs, sample_metrics
from tests.train.rl.test_sequences import CONFIG, TOKENIZER, scored_rollouts, two_rollouts


def test_logged_figures():
    scored = scored_rollouts(two_rollouts())
    metrics = sample_metrics(Sample(scored, scored, rounds=2, dropped=1), CONFIG, TOKENIZER)
    words = len(scored[0].rollout.calls[0].tokens)
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
    assert (metrics["rollout_rounds"], metrics["dropped_groups"]) == (2, 1)
    np.testing.assert_allclose(metrics["entropy"], (0.5 * (words + 2) + 1.0 * 4) / drawn)


def test_gap_between_rollout_and_trainer():
    same = np.log(np.asarray([0.1, 0.5, 0.9], np.float32))
    none = {"logp_diff_mean": 0, "logp_diff_max": 0, "probs_pearson_corr": 1, "importance_truncated": 0}
    assert compare_logprobs(same, same, 2.0) == pytest.approx(none)
    assert compare_logprobs(np.zeros(0), np.zeros(0), 2.0) == none
    other = np.log(np.asarray([0.9, 0.5, 0.1], np.float32))
    gap = compare_logprobs(same, other, 0.0)
    assert gap["probs_pearson_corr"] == pytest.approx(-1)
    assert gap["importance_truncated"] == 0
    assert compare_logprobs(same, same + np.float32([0, 0, 0.3]), 0.0)["logp_diff_max"] == pytest.approx(0.3, rel=1e-5)
    cut = compare_logprobs(same, same - np.float32([0, 0.6, 0.8]), 2.0)
    assert cut["importance_truncated"] == pytest.approx(1 / 3)
