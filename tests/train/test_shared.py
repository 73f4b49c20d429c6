"""Training on workers that shared a cache: the trainer's function of the tokens is the engine's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.config import ConfigError
from apr_jax.config_dict import from_config_dict
from apr_jax.data.packing import pack
from apr_jax.data.shared_sequences import Segment, shared_sequence
from apr_jax.model.sampling import log_probs
from apr_jax.train.run import train
from apr_jax.train.scorer import make_scorer, to_mesh
from configs.methods import get_config
from tests.engine.helpers import BANNED, MODEL, keyed, make_engine, make_mesh, make_params
from tests.engine.test_group_cache import sharing

pytestmark = pytest.mark.heavy


def sequence_of(rollout):
    calls = rollout.calls
    prompt = calls[0].context[: calls[0].group_prompt].tolist()
    segments = [Segment(call.context[call.group_prompt :].tolist(), call.tokens.tolist()) for call in calls]
    return shared_sequence(prompt, segments)


def policy(logits):
    mask = np.zeros((MODEL.vocab_size,), bool)
    mask[list(BANNED)] = True
    return log_probs(logits, 1.0, jnp.asarray(mask))


@pytest.fixture(scope="module")
def rollouts():
    engine = make_engine(max_workers=3)
    programs = [sharing(1), sharing(2, length=30), sharing(3, headers=(2, 4), stops=((), ()), limits=(12, 20))]
    return engine.run(keyed(programs), seed=3, temperature=1.0)


def test_trainer_logprobs_equal_the_engines(rollouts):
    """Three workers, in packed rows, split over a mesh; then two."""
    for chosen in (rollouts[:2], rollouts[2:]):
        packing = pack([sequence_of(rollout) for rollout in chosen], row_len=192)
        rows = packing.rows
        assert packing.num_rows == 1
        rows = {name: np.concatenate([array, array]) for name, array in rows.items()}
        mesh = make_mesh(data=2)
        score = jax.jit(make_scorer(MODEL, mesh, policy))
        scored = score(make_params(), to_mesh(rows, mesh)).logprob_BT
        for (row, start), length, rollout in zip(packing.places, packing.lengths, chosen, strict=True):
            here = slice(start, start + length)
            written = rows["written"][row, here] > 0
            expected = np.concatenate([call.logprobs for call in rollout.calls])
            np.testing.assert_allclose(np.asarray(scored)[row, here][written], expected, atol=1e-5)


def test_a_token_sees_headers_at_once_and_what_is_read_later_never(rollouts):
    """Worker 0's first token: worker 1's header of five tokens matters, the token that it reads next does not."""
    sequence = sequence_of(rollouts[0])
    rows = pack([sequence], row_len=192).rows
    score = jax.jit(make_scorer(MODEL, make_mesh(), policy))
    first = int(np.flatnonzero(sequence["written"])[0])

    base = np.asarray(score(make_params(), to_mesh(rows, make_mesh())).logprob_BT)[0]
    for place in range(len(sequence["tokens"])):
        if sequence["workers"][place] == 2 and sequence["places"][place] in (0, 4, 5):
            changed = {name: array.copy() for name, array in rows.items()}
            changed["tokens"][0, place] = (changed["tokens"][0, place] + 1) % 60
            moved = np.asarray(score(make_params(), to_mesh(changed, make_mesh())).logprob_BT)[0]
            sees = sequence["places"][place] <= 4
            assert (abs(moved[first] - base[first]) > 1e-6) == sees


def test_grpo_is_refused_before_any_work(tmp_path):
    config = get_config("hogwild")
    config.grpo.num_steps = 3
    with pytest.raises(ConfigError, match=r"set grpo\.num_steps=0"):
        train(from_config_dict(config), tmp_path / "run")
    assert not (tmp_path / "run").exists()
