"""`rollout.constrain_spawns` end to end: adaptive programs on the engine, then the trainer's scores of what they drew.

A random model never writes a Generated Node line. So the built-in tokenizer is given a few more tokens that are whole
lines, and of the others nearly all are banned.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apr_jax.data.tokenizer import BuiltinTokenizer
from apr_jax.engine.engine import Engine
from apr_jax.engine.threads import RolloutKey
from apr_jax.model.params import graphdef, init_params
from apr_jax.model.views.training import training_rows
from apr_jax.parallel.mesh import make_mesh
from apr_jax.reasoning import adaptive
from apr_jax.reasoning.programs import make_program
from apr_jax.reasoning.settings import make_settings, spawn_gate
from apr_jax.tasks.countdown import trace
from apr_jax.tasks.countdown.adaptive import ADAPTIVE, render_spawn
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.dialect import CALL_BEGIN, CALL_END, SpawnCall
from apr_jax.train.rl import update
from apr_jax.train.rl.sample import Scored
from apr_jax.train.rl.sequences import training_sequences
from apr_jax.train.rl.step_metrics import gap_metrics
from apr_jax.train.state import create_state
from tests.train.small import on_mesh, small_config

pytestmark = pytest.mark.heavy

LINES = (
    "Generated Node #0,0: 24:[4, 5] Operation: 3+2=5\n",
    "Generated Node #0,1: 24:[4, 6] Operation: 2*3=6\n",
    "Generated Node #0,1: 24:[4, 1] Operation: 3-2=1\n",  # with the one before: ambiguous
    "Generated Node #0,0,1: 24:[9] Operation: 4+5=9\n",  # final
    "Generated Node #0,0,2: 24:[1, 5] Operation: 4-3=1\n",
    "Generated Node #0,2: 24:[5, 7] Operation: 3+4=7\n",
)
PROBLEM = Problem((2, 3, 4), 24)


class LineTokenizer(BuiltinTokenizer):
    """The built-in tokenizer, whose ids go on with LINES. It encodes as ever."""

    def __init__(self):
        super().__init__()
        self._texts = [*self._texts, *LINES]
        self._bytes = [text.encode() for text in self._texts]
        self.vocab_size += len(LINES)


TOKENIZER = LineTokenizer()
CALL_BEGIN_ID, CALL_END_ID = TOKENIZER.mark_id(CALL_BEGIN), TOKENIZER.mark_id(CALL_END)
FIRST_LINE = TOKENIZER.vocab_size - len(LINES)
CONFIG = small_config(
    **{
        "model.vocab_size": 352,
        "rollout.constrain_spawns": True,
        "rollout.max_children": 2,
        "rollout.max_depth": 2,
        "rollout.max_spawns": 2,
        "rollout.max_steps": 64,
        "rollout.max_total_children": 1000,
        "rollout.temperature": 1.0,
        "grpo.group_size": 8,
        "grpo.inner_updates": 1,
        "grpo.optimizer.clip_norm": 0.0,
        "grpo.optimizer.b1": 0.5,
    }
)
FREE = sorted(
    {
        CALL_BEGIN_ID,
        TOKENIZER.eos_id,
        *TOKENIZER.encode(trace.NO_SOLUTION),
        *TOKENIZER.encode(","),
        *range(FIRST_LINE, TOKENIZER.vocab_size),
    }
)
BANNED = tuple(sorted(set(range(CONFIG.model.vocab_size)) - {*FREE, CALL_END_ID}))


@pytest.fixture(scope="module")
def drawn():
    """Scored rollouts, with rewards made up so that every call has an advantage; and the weights."""
    with pytest.MonkeyPatch.context() as patch:
        yield _draw(patch)


def _draw(patch):
    patch.setattr(update, "banned_tokens", lambda tokenizer, vocab_size: BANNED)
    params = init_params(CONFIG.model, 3)
    gate = spawn_gate(CONFIG, TOKENIZER)
    mesh = make_mesh(CONFIG.mesh)
    engine = Engine(CONFIG.model, CONFIG.engine, CONFIG.rollout, mesh, params=params, banned_tokens=BANNED, gate=gate)
    results = _run(engine, make_settings(CONFIG, TOKENIZER), 48)
    assert engine.stats.generated > sum(len(call.tokens) for result in results for call in result.calls), "none refused"
    scored = [
        Scored(PROBLEM, rollout, bool(index % 2), float(index % 2), (1.0, -1.0)[index % 2], np.ones(len(rollout.calls)))
        for index, rollout in enumerate(results)
    ]
    return scored, params, engine


def _run(engine, settings, count):
    programs = [(RolloutKey(0, sample), make_program("adaptive", PROBLEM, settings)) for sample in range(count)]
    return engine.run(programs, seed=0, temperature=1.0)


def test_no_spawn_is_malformed(drawn):
    scored, *_ = drawn
    outcomes = [each.rollout.result for each in scored]
    reasons = [reason for outcome in outcomes for reason in (outcome.reason, *outcome.child_reasons)]
    assert set(reasons) <= {"no_solution", "unfinished", "max_steps", "context_full"}
    assert sum(outcome.num_spawns for outcome in outcomes) > 15
    assert sum(outcome.num_children for outcome in outcomes) > 20
    paths = {call.path for each in scored for call in each.rollout.calls}
    assert max(map(len, paths)) == 4, "a child spawned, too"


def test_what_is_left_of_the_rollouts_children_limits_a_spawn(drawn):
    few = dataclasses.replace(make_settings(CONFIG, TOKENIZER), max_total_children=3)
    outcomes = [rollout.result for rollout in _run(drawn[2], few, 32)]
    reasons = {reason for outcome in outcomes for reason in (outcome.reason, *outcome.child_reasons)}
    assert reasons <= {"no_solution", "unfinished", "max_steps", "context_full"}
    assert 1 < max(outcome.num_children for outcome in outcomes) <= 3


def _allowed(tokens: list[int], begin: int | None, depth: int, spawns: int) -> set[int]:
    """What may follow, from the parser alone: by trying spawns."""
    settings = make_settings(CONFIG, TOKENIZER)

    def accepted(text, nodes):
        whole = text + render_spawn(nodes, depth + 1)
        return isinstance(adaptive.read_spawn(ADAPTIVE, whole, settings, depth, spawns, 1000), SpawnCall)

    universe = ["0", "0,0", "0,1", "0,2", "0,0,1", "0,0,2"]
    if begin is None:
        text = TOKENIZER.decode(tokens)
        opens = text.endswith("\n") and any(accepted(text, [node]) for node in universe)
        return set(FREE) - {CALL_BEGIN_ID} | ({CALL_BEGIN_ID} if opens else set())
    text, done = TOKENIZER.decode(tokens[:begin]), tokens[begin:]
    ways = [
        TOKENIZER.encode(render_spawn(nodes, depth + 1))
        for size in (1, 2, 3)
        for nodes in itertools.permutations(universe, size)
        if accepted(text, nodes)
    ]
    return {way[len(done)] for way in ways if way[: len(done)] == done}


@jax.jit
def _logits(params, tokens_T):
    model = nnx.merge(graphdef(CONFIG.model), params)
    hidden_TD, _ = model(tokens_T, training_rows(CONFIG.model, jnp.arange(tokens_T.shape[0])))
    return model.logits(hidden_TD)


def test_log_probabilities_are_those_over_what_the_parser_would_accept(drawn):
    scored, params, _ = drawn
    held, shut = 0, 0
    for each in scored[:32]:
        spawns = {}
        for call in each.rollout.calls:
            tokens, begin = call.context.tolist(), None
            whole = np.zeros(CONFIG.model.max_seq_len, np.int32)
            whole[: len(tokens) + len(call.tokens)] = [*tokens, *call.tokens.tolist()]
            logits_TV = np.asarray(_logits(params, whole), np.float64)
            for token, logprob in zip(call.tokens.tolist(), call.logprobs, strict=True):
                allowed = sorted(_allowed(tokens, begin, len(call.path) // 2, spawns.get(call.path, 0)))
                scores = logits_TV[len(tokens) - 1, allowed]
                expected = scores[allowed.index(token)] - np.log(np.exp(scores).sum())
                np.testing.assert_allclose(logprob, expected, atol=1e-5)
                held += begin is not None
                shut += CALL_BEGIN_ID not in allowed and tokens[-1] >= FIRST_LINE
                begin = len(tokens) if token == CALL_BEGIN_ID else begin
                tokens.append(token)
            spawns[call.path] = spawns.get(call.path, 0) + (begin is not None)
    assert held > 50
    assert shut > 20


def _update(config, scored, params, monkeypatch):
    """Metrics, gradients, and the gap between trainer and engine, of one update."""
    monkeypatch.setattr(update, "banned_tokens", lambda tokenizer, vocab_size: BANNED)
    mesh = make_mesh(config.mesh)
    updater = update.Updater(config, mesh, TOKENIZER)
    state = create_state(mesh, config.model, updater.optimizer, params)
    gate = spawn_gate(config, TOKENIZER)
    batches = updater.microbatches(training_sequences(config.grpo, scored, gate, branches=False))
    state, metrics, old = updater.update(state, batches, state.params)
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    grads = [np.asarray(leaf) for path, leaf in leaves if ".mu" in jax.tree_util.keystr(path)]
    return {name: float(value) for name, value in metrics.items()}, grads, gap_metrics(batches, old, 0.0)


@pytest.mark.parametrize("mesh", [{"data": 1}, {"data": 2, "fsdp": 2}], ids=["one", "four"])
def test_the_trainer_scores_the_masked_policy(drawn, monkeypatch, mesh):
    scored, params, _ = drawn
    copy = jax.tree.map(jnp.copy, params)
    metrics, grads, gap = _update(on_mesh(CONFIG, **mesh), scored, copy, monkeypatch)
    assert gap["logp_diff_max"] < 1e-5
    assert gap["probs_pearson_corr"] > 0.999999
    assert all(np.isfinite(grad).all() for grad in grads)
    assert all(np.abs(grad).max() > 0 for grad in grads)
    assert metrics["clip_fraction"] == 0


def test_without_its_masks_the_trainer_would_score_another_policy(drawn, monkeypatch):
    scored, params, _ = drawn
    off = dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, constrain_spawns=False))
    _, _, gap = _update(off, scored, jax.tree.map(jnp.copy, params), monkeypatch)
    assert gap["logp_diff_max"] > 0.1


def test_sequences_are_as_ever_without_the_option(drawn):
    scored, *_ = drawn
    gates = (None, spawn_gate(CONFIG, TOKENIZER))
    plain, held = (training_sequences(CONFIG.grpo, scored, gate, branches=False) for gate in gates)
    assert {"bans", "allowed"} == set(held[0]) - set(plain[0])
    for without, sequence in zip(plain, held, strict=True):
        assert sequence["allowed"].shape == (len(sequence["tokens"]), 5)
        listed = np.flatnonzero(sequence["allowed"].any(axis=1))
        for place in listed:
            assert sequence["targets"][place] + 1 in sequence["allowed"][place]
        for name, array in without.items():
            np.testing.assert_array_equal(array, sequence[name])
