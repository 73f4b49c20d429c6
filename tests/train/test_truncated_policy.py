"""Top-k, top-p and min-p: the engine draws from the truncated policy, and the trainer scores with it."""

import dataclasses

import jax
import numpy as np
import pytest

from apr_jax.config import ConfigError
from apr_jax.config_dict import from_config_dict
from apr_jax.data.tokenizer import load_tokenizer
from apr_jax.engine.cancellation import trim
from apr_jax.engine.engine import Engine
from apr_jax.engine.stop_strings import StopStrings
from apr_jax.engine.threads import Decode, Open, RolloutKey, StopReason
from apr_jax.model.params import init_params
from apr_jax.model.truncation import truncation_of
from apr_jax.parallel.mesh import make_mesh
from apr_jax.reasoning.settings import banned_tokens
from apr_jax.train.rl.sample import Scored
from apr_jax.train.rl.sequences import training_sequences
from apr_jax.train.rl.step_metrics import gap_metrics
from apr_jax.train.rl.update import Updater
from apr_jax.train.state import create_state
from configs import grpo
from tests.train.small import on_mesh, small_config

pytestmark = pytest.mark.heavy

TOKENIZER = load_tokenizer("builtin")
CONFIG = small_config(
    **{
        "rollout.temperature": 1.3,
        "rollout.max_steps": 16,
        "grpo.group_size": 4,
        "grpo.inner_updates": 1,
        "grpo.optimizer.clip_norm": 0.0,
        "grpo.optimizer.b1": 0.5,
    }
)
BANNED = banned_tokens(TOKENIZER, CONFIG.model.vocab_size)


def _config(**rule):
    return dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, **rule))


def _params():
    """Weights of a policy that is far from uniform."""
    return jax.tree.map(lambda w: w * 3.0 if w.ndim > 1 else w, init_params(CONFIG.model, 3))


def _program(seed):
    thread = yield Open([TOKENIZER.bos_id, *np.random.default_rng(seed).integers(3, 300, 3 + seed % 9).tolist()])
    yield Decode(thread, (TOKENIZER.eos_id,))


def _draw(config, count=6, program=_program):
    mesh = make_mesh(config.mesh)
    engine = Engine(config.model, config.engine, config.rollout, mesh, params=_params(), banned_tokens=BANNED)
    programs = [(RolloutKey(index, 0), program(index)) for index in range(count)]
    return engine.run(programs, seed=0, temperature=config.rollout.temperature)


def _gap(config, rollouts):
    """The gap between trainer and engine, and the gradients, of one update."""
    mesh = make_mesh(config.mesh)
    scored = [
        Scored(None, rollout, True, float(index % 2), (1.0, -1.0)[index % 2], np.ones(len(rollout.calls)))
        for index, rollout in enumerate(rollouts)
    ]
    updater = Updater(config, mesh, TOKENIZER)
    state = create_state(mesh, config.model, updater.optimizer, _params())
    batches = updater.microbatches(training_sequences(config.grpo, scored, None, branches=False))
    state, _, old = updater.update(state, batches, state.params)
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    grads = [np.asarray(leaf) for path, leaf in leaves if ".mu" in jax.tree_util.keystr(path)]
    return gap_metrics(batches, old, 0.0), grads


def test_the_trainer_scores_what_was_drawn_from():
    config = _config(top_k=8)
    rollouts = _draw(config)
    gap, grads = _gap(config, rollouts)
    assert gap["logp_diff_max"] < 1e-4
    assert gap["probs_pearson_corr"] > 0.999999
    assert all(np.isfinite(grad).all() for grad in grads)
    assert any(np.abs(grad).max() > 0 for grad in grads)
    whole, _ = _gap(CONFIG, rollouts)
    assert whole["logp_diff_max"] > 0.1, "without the rule the trainer would score another policy"


def test_the_trainer_scores_what_was_drawn_from_by_all_rules_on_four_devices():
    """As many tokens stay as were drawn from, so that no share of a token at the cut comes or goes by rounding."""
    config = _config(top_k=40, top_p=0.8, min_p=0.02)
    gap, _ = _gap(on_mesh(config, data=2, fsdp=2), _draw(config))
    assert gap["logp_diff_max"] < 1e-4
    assert gap["probs_pearson_corr"] > 0.999999


def test_each_token_has_the_number_that_it_was_drawn_from_where_text_or_a_sibling_ends_a_call_as_well():
    def program(seed):
        thread = yield Open([TOKENIZER.bos_id, 5 + seed])
        yield Decode(thread, (), stop_strings=StopStrings(("1",), TOKENIZER.token_bytes))

    (*calls,) = (call for rollout in _draw(_config(top_k=40, top_p=0.8), 12, program) for call in rollout.calls)
    assert {call.stop.reason for call in calls} >= {StopReason.STRING}
    for call in calls:
        assert len(call.kept) == len(call.tokens)
        assert 1 <= call.kept.min() <= call.kept.max() <= 40
        assert len(trim(call, call.clock_start + 1).kept) == 1
    assert all(call.kept is None for rollout in _draw(CONFIG, 2) for call in rollout.calls)


def test_rules_that_cut_nothing_off_draw_the_same_tokens():
    """Through the other path: a CPU's own draw is not used for a truncated policy."""
    plain, all_tokens = _draw(CONFIG, 8), _draw(_config(top_k=CONFIG.model.vocab_size), 8)
    assert truncation_of(_config(top_k=CONFIG.model.vocab_size).rollout).cuts
    for one, other in zip(plain, all_tokens, strict=True):
        np.testing.assert_array_equal(one.calls[0].tokens, other.calls[0].tokens)
        np.testing.assert_allclose(one.calls[0].logprobs, other.calls[0].logprobs, atol=1e-5)


def test_one_token_leaves_no_choice():
    for one, greedy in zip(_draw(_config(top_k=1), 6), _draw(_config(temperature=0.0), 6), strict=True):
        np.testing.assert_array_equal(one.calls[0].tokens, greedy.calls[0].tokens)
        np.testing.assert_allclose(one.calls[0].logprobs, 0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("top_k", -1, r"rollout\.top_k=-1 must be at least 0"),
        ("top_p", 0.0, r"rollout\.top_p=0\.0 must lie in \[0\.01, 1\]"),
        ("top_p", 1.5, r"rollout\.top_p=1\.5 must lie in"),
        ("min_p", -0.1, r"rollout\.min_p=-0\.1 must lie in \[0, 1\]"),
        ("top_p", float("nan"), r"rollout\.top_p=nan"),
        ("top_k", 0.5, r"rollout\.top_k=0\.5: wrong type"),
    ],
)
def test_rules_out_of_range_are_refused(field, value, message):
    config = grpo.get_config("smoke")
    with config.unlocked(), config.rollout.ignore_type():
        config.rollout[field] = value
    with pytest.raises(ConfigError, match=message):
        from_config_dict(config)


@pytest.mark.parametrize("rule", [{"top_k": 8}, {"top_p": 0.6}, {"min_p": 0.2}], ids=str)
def test_a_rule_and_constrained_spawns_are_refused_together(rule):
    config = grpo.get_config("smoke")
    config.rollout.update(constrain_spawns=True, **rule)
    with pytest.raises(ConfigError, match=f"rollout.{next(iter(rule))}=.* and rollout.constrain_spawns=True"):
        from_config_dict(config)


def test_a_drawn_token_beyond_the_cut_of_new_weights_has_a_finite_ratio():
    config = _config(top_k=2)
    rollouts = _draw(config, 6)
    moved = jax.tree.map(lambda w: w + 0.3 * jax.random.normal(jax.random.key(w.size), w.shape), _params())
    mesh = make_mesh(config.mesh)
    updater = Updater(config, mesh, TOKENIZER)
    scored = [Scored(None, r, True, 1.0, 1.0, np.ones(len(r.calls))) for r in rollouts]
    batches = updater.microbatches(training_sequences(config.grpo, scored, None, branches=False))
    state = create_state(mesh, config.model, updater.optimizer, moved)
    _, metrics, old = updater.update(state, batches, state.params)
    for batch, old_BT in zip(batches, old, strict=True):
        learnt_BT = np.asarray(batch["policy_weight"]) != 0
        assert np.asarray(old_BT)[learnt_BT].min() > -100
    assert all(np.isfinite(float(value)) for value in metrics.values())
