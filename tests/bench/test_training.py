"""What the training benchmark counts."""

import numpy as np
import pytest

from apr_jax.bench.training import training_flops
from tests.train.small import small_config

pytestmark = pytest.mark.heavy


def test_flops_are_those_of_tokens_and_of_what_they_see():
    config = small_config(**{"model.num_layers": 1, "model.vocab_size": 10})
    model = config.model
    D, F, N, K, H = model.embed_dim, model.mlp_dim, model.num_heads, model.num_kv_heads, model.head_dim
    matrices = D * N * H + 2 * D * K * H + N * H * D + 3 * D * F + 2 * D + D + 10 * D
    segment_ids = np.asarray([[1, 1, 1, 2, 2, 0, 0, 0]])
    pairs = (1 + 2 + 3) + (1 + 2)
    assert training_flops(config, segment_ids) == 6 * matrices * 5 + 12 * H * N * pairs
