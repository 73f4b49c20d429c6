"""GRPO: its gradient from the definition, invariances, resume, and that reward rises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apr_jax.data.tokenizer import load_tokenizer
from apr_jax.engine.engine import Engine
from apr_jax.engine.threads import Call, Decode, Open, Rollout, RolloutKey, Stop, StopReason
from apr_jax.engine.work_counters import Work
from apr_jax.files import read_jsonl
from apr_jax.kernels import cpu_kernels
from apr_jax.model import sampling
from apr_jax.model.params import graphdef, init_params
from apr_jax.model.views.training import training_rows
from apr_jax.parallel.mesh import make_mesh
from apr_jax.reasoning import METHODS
from apr_jax.reasoning.base import Outcome
from apr_jax.reasoning.settings import banned_tokens
from apr_jax.stopping import StoppedError, StopSignal
from apr_jax.tasks import TASKS
from apr_jax.tasks.base import Verdict
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.countdown.task import Countdown
from apr_jax.train.grpo import train_grpo
from apr_jax.train.rl.sample import Sampler, Scored
from apr_jax.train.rl.sequences import training_sequences
from apr_jax.train.rl.update import Updater, microbatch_sizes
from apr_jax.train.state import create_state
from tests.train.small import on_mesh, open_phase, small_config

pytestmark = pytest.mark.heavy

TOKENIZER = load_tokenizer("builtin")
CONFIG = small_config(
    **{
        "rollout.temperature": 0.8,
        "grpo.group_size": 4,
        "grpo.inner_updates": 1,
        "grpo.kl_coef": 0.05,
        "grpo.optimizer.clip_norm": 0.0,
        "grpo.optimizer.b1": 0.5,
    }
)
BANNED = banned_tokens(TOKENIZER, CONFIG.model.vocab_size)


def made_up_rollouts(seed=0, chained=False):
    """Two groups of made-up rollouts; the second group has no signal.

    `chained`: each has a thread of three calls, the second from within the first one's text, the third from the
    second's end, and then a call of a child.
    """
    rng = np.random.default_rng(seed)
    allowed = np.setdiff1d(np.arange(CONFIG.model.vocab_size), BANNED)

    def draw(count):
        return rng.choice(allowed, count).astype(np.int32)

    def call(path, context=None, count=None):
        context = draw(rng.integers(1, 20)) if context is None else context
        tokens = draw(rng.integers(1, 30) if count is None else count)
        logprobs = rng.normal(-5, 1, len(tokens)).astype(np.float32)
        return Call(path, context, tokens, logprobs, Stop(StopReason.MAX_STEPS, None), 0, 0.0, 0.0)

    def calls():
        if not chained:
            return tuple(call((0, c)) for c in range(rng.integers(1, 4)))
        first = call((), draw(34), 8)
        second = call((), np.concatenate([first.context, first.tokens[:4], draw(5)]), 6)
        third = call((), np.concatenate([second.context, second.tokens, draw(3)]), 5)
        return first, second, third, call((0, 0))

    outcome = Outcome(answer=None, status="no_solution", reason="no_solution")
    made = [Rollout(RolloutKey(i // 4, i % 4), outcome, calls(), 0, 0.0, Work()) for i in range(8)]
    rewards, advantages = (1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0), (1.0, -1.0, -1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    return [
        Scored(None, rollout, reward > 0, reward, advantage, np.ones(len(rollout.calls)))
        for rollout, reward, advantage in zip(made, rewards, advantages, strict=True)
    ]


def sequences_of(config, scored):
    """A sequence a call."""
    return training_sequences(config.grpo, scored, None, branches=False)


def _moved(config, params, seed):
    noise = jax.tree.map(lambda p: 0.05 * jax.random.normal(jax.random.key(seed + p.size), p.shape), params)
    return jax.tree.map(jnp.add, params, noise)


def _update(config, sequences, reference=True):
    """Metrics and gradient of one update from given sequences."""
    mesh = make_mesh(config.mesh)
    updater = Updater(config, mesh, TOKENIZER)
    params = init_params(config.model, 0)
    state = create_state(mesh, config.model, updater.optimizer, params)
    behind = create_state(mesh, config.model, updater.optimizer, _moved(config, params, 1)).params
    batches = updater.microbatches(sequences)
    state, metrics, old = updater.update(state, batches, behind if reference else None)
    moments = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(state.opt_state)}
    scale = 1 - config.grpo.optimizer.b1
    grads = {name: np.asarray(x) / scale for name, x in moments.items() if ".mu" in name}
    assert grads
    return {name: float(value) for name, value in metrics.items()}, grads, batches, old


def _by_definition(config, scored):
    """L = 1/N sum_calls [1/n_r mean_t(-ratio A) + beta mean_t(k3)], each call on its own, at ratio 1."""
    structure, params = graphdef(config.model), init_params(config.model, 0)
    reference = _moved(config, params, 1)
    banned = jnp.zeros(config.model.vocab_size, bool).at[jnp.asarray(BANNED)].set(True)
    calls = [(i, call) for i, each in enumerate(scored) for call in each.rollout.calls]

    def logprobs(params, whole, length):
        model = nnx.merge(structure, params)
        hidden, _ = model(whole, training_rows(config.model, jnp.arange(64)))
        scores = sampling.log_probs(model.logits(hidden), config.rollout.temperature, banned)
        return jnp.take_along_axis(scores[:-1], whole[1:, None], axis=1)[:, 0]

    @jax.jit
    def loss(params, whole_CT, generated_CT, advantage_C, calls_C):
        new_CT = jax.vmap(logprobs, (None, 0, None))(params, whole_CT, None)
        gap_CT = jax.vmap(logprobs, (None, 0, None))(reference, whole_CT, None) - new_CT
        ratio_CT = jnp.exp(new_CT - jax.lax.stop_gradient(new_CT))
        counts_C = generated_CT.sum(1)
        policy_C = (-ratio_CT * advantage_C[:, None] * generated_CT).sum(1) / counts_C
        k3_C = jnp.where(generated_CT, jnp.exp(gap_CT) - gap_CT - 1, 0).sum(1) / counts_C
        return jnp.mean(policy_C / calls_C + config.grpo.kl_coef * k3_C)

    wholes = [np.concatenate([call.context, call.tokens]) for _, call in calls]
    arguments = (
        np.stack([np.pad(whole, (0, 64 - len(whole))) for whole in wholes]),
        np.stack(
            [
                (np.arange(1, 64) >= len(call.context)) & (np.arange(1, 64) < len(whole))
                for (_, call), whole in zip(calls, wholes, strict=True)
            ]
        ),
        np.asarray([scored[i].advantage for i, _ in calls], np.float32),
        np.asarray([len(scored[i].rollout.calls) for i, _ in calls], np.float32),
    )
    value, grads = jax.value_and_grad(loss)(params, *map(jnp.asarray, arguments))
    return float(value), jax.tree.leaves(grads)


def test_update_follows_the_definition():
    scored = made_up_rollouts()
    metrics, grads, _, _ = _update(CONFIG, sequences_of(CONFIG, scored))
    loss, expected = _by_definition(CONFIG, scored)
    np.testing.assert_allclose(metrics["loss"], loss, atol=1e-6)
    for actual, grad in zip(grads.values(), expected, strict=True):
        np.testing.assert_allclose(actual, grad, atol=1e-5)
    assert metrics["clip_fraction"] == 0
    assert metrics["kl"] > 0


@pytest.mark.parametrize(
    ("rows", "full", "shards", "sizes"),
    [
        (24, 8, 2, [8, 8, 8]),
        (22, 8, 2, [8, 8, 4, 2]),
        (2, 8, 2, [2]),
        (5, 8, 1, [4, 1]),
        (10, 6, 2, [6, 2, 2]),
        (7, 1, 1, [1] * 7),
        (12, 12, 4, [12]),
        (8, 12, 4, [4, 4]),
    ],
)
def test_what_remains_goes_into_halves(rows, full, shards, sizes):
    assert microbatch_sizes(rows, full, shards) == sizes


@pytest.mark.parametrize("change", ["rows", "order"])
def test_same_update_however_the_batch_is_cut(change):
    sequences = sequences_of(CONFIG, made_up_rollouts())
    expected, expected_grads, _, _ = _update(CONFIG, sequences)
    config = CONFIG
    if change == "rows":
        config = dataclasses.replace(CONFIG, grpo=dataclasses.replace(CONFIG.grpo, rows_per_microbatch=1))
    else:
        sequences = [sequences[i] for i in np.random.default_rng(0).permutation(len(sequences))]
    metrics, grads, batches, _ = _update(config, sequences)
    assert len(batches) > 1 or change != "rows"
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, atol=1e-5, err_msg=name)
    for name, grad in expected_grads.items():
        np.testing.assert_allclose(grads[name], grad, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["dr_grpo", "dapo", "gspo", "cispo"])
def test_every_objective_updates_alike_however_the_batch_is_cut(name):
    """Two inner updates, so that ratios leave 1, with truncated importance weights."""
    changes = {"objective": name, "inner_updates": 2, "importance_cap": 1.5, "clip_ratio_high": 0.28}
    optimizer = dataclasses.replace(CONFIG.grpo.optimizer, learning_rate=0.01)
    config = dataclasses.replace(CONFIG, grpo=dataclasses.replace(CONFIG.grpo, optimizer=optimizer, **changes))
    sequences = sequences_of(config, made_up_rollouts())
    expected, expected_grads, _, _ = _update(config, sequences)
    cut = dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, rows_per_microbatch=8))
    metrics, grads, _, _ = _update(on_mesh(cut, data=2, fsdp=2), sequences[::-1])
    assert expected["policy_loss"] != 0
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
    for name, grad in expected_grads.items():
        np.testing.assert_allclose(grads[name], grad, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", ["grpo", "gspo"])
@pytest.mark.parametrize("impl", ["cpu", "xla"])
def test_what_calls_have_in_common_is_computed_once(name, impl):
    """The same gradient, metrics and old log-probabilities of every generated token as with each call on its own."""
    if impl == "cpu" and cpu_kernels("cpu") is None:
        pytest.skip("no C++ compiler here")
    changes = {"objective": name, "inner_updates": 2, "importance_cap": 1.5}
    model = dataclasses.replace(CONFIG.model, attention=impl, head_dim=16)
    config = dataclasses.replace(CONFIG, model=model, grpo=dataclasses.replace(CONFIG.grpo, **changes))
    scored = made_up_rollouts(chained=True)
    apart = sequences_of(config, scored)
    together = Updater(config, make_mesh(config.mesh), TOKENIZER).sequences(scored)
    assert (len(apart), len(together)) == (32, 16)
    assert sum(len(s["tokens"]) for s in together) < 0.6 * sum(len(s["tokens"]) for s in apart)
    expected, expected_grads, batches, old = _update(config, apart)
    metrics, grads, shared_batches, shared_old = _update(config, together)
    for field, value in expected.items():
        np.testing.assert_allclose(metrics[field], value, rtol=1e-4, atol=1e-5, err_msg=field)
    for field, grad in expected_grads.items():
        np.testing.assert_allclose(grads[field], grad, rtol=1e-3, atol=1e-5, err_msg=field)

    def scores(batches, old):
        """Of each generated token, which its logged log-probability tells from all others, the trainer's."""
        pairs = {}
        for batch, old_BT in zip(batches, old, strict=True):
            drawn_BT = np.asarray(batch["policy_weight"]) > 0
            logged, trained = np.asarray(batch["rollout_logprob"])[drawn_BT], np.asarray(old_BT)[drawn_BT]
            pairs |= dict(zip(logged.tolist(), trained.tolist(), strict=True))
        return [pairs[logged] for logged in sorted(pairs)]

    mine, alone = scores(shared_batches, shared_old), scores(batches, old)
    assert len(mine) == sum(len(call.tokens) for each in scored for call in each.rollout.calls)
    np.testing.assert_allclose(mine, alone, atol=1e-5)


def test_leaving_out_calls_without_signal_changes_no_gradient():
    config = dataclasses.replace(CONFIG, grpo=dataclasses.replace(CONFIG.grpo, kl_coef=0.0))
    scored = made_up_rollouts()
    everything = sequences_of(CONFIG, scored)
    everything = [{**s, "kl_weight": np.zeros_like(s["kl_weight"])} for s in everything]
    kept = sequences_of(config, scored)
    assert len(kept) < len(everything)
    expected, expected_grads, _, _ = _update(config, everything, reference=False)
    metrics, grads, _, _ = _update(config, kept, reference=False)
    np.testing.assert_allclose(metrics["policy_loss"], expected["policy_loss"], atol=1e-6)
    for name, grad in expected_grads.items():
        np.testing.assert_allclose(grads[name], grad, atol=1e-6, err_msg=name)


def test_later_inner_updates_refer_to_the_first_policy():
    config = dataclasses.replace(
        CONFIG,
        grpo=dataclasses.replace(
            CONFIG.grpo,
            inner_updates=3,
            optimizer=dataclasses.replace(CONFIG.grpo.optimizer, learning_rate=0.02),
        ),
    )
    sequences = sequences_of(CONFIG, made_up_rollouts())
    _, _, _, first = _update(CONFIG, sequences)
    metrics, _, _, old = _update(config, sequences)
    jax.tree.map(np.testing.assert_array_equal, old, first)
    assert metrics["clip_fraction"] > 0  # the ratio moved away from 1


def _guess(problem, settings):
    """A program of one token, whose answer is that token."""
    thread = yield Open((settings.tokenizer.bos_id, 5 + problem.target % 2))
    yield Decode(thread, (settings.tokenizer.eos_id,))
    return Outcome(answer=str(thread.tokens[-1]), status="answered", reason="")


def _is_even(answer, problem):
    return Verdict(int(answer) % 2 == 0, "")


PROBLEMS = [Problem((1, 2), target) for target in range(2, 10)]


@pytest.fixture
def bandit(monkeypatch):
    """GRPO on a task of one-token programs, rewarded for even tokens: (workdir, signal, program) -> final policy."""
    base = small_config(
        **{
            "rollout.max_steps": 1,
            "grpo.num_steps": 10,
            "grpo.prompts_per_step": 2,
            "grpo.group_size": 8,
            "grpo.inner_updates": 2,
            "grpo.optimizer.learning_rate": 0.02,
            "grpo.checkpoint_every": 4,
        }
    )
    mesh = make_mesh(base.mesh)
    params = init_params(base.model, 0)
    engine = Engine(base.model, base.engine, base.rollout, mesh, params=params, banned_tokens=BANNED)

    def train(workdir, stop=None, program=_guess, **grpo):
        class Bandit(Countdown):
            verify = staticmethod(_is_even)

        monkeypatch.setitem(TASKS, "countdown", Bandit())
        monkeypatch.setitem(METHODS, "adaptive", dataclasses.replace(METHODS["adaptive"], program=program))
        config = dataclasses.replace(base, grpo=dataclasses.replace(base.grpo, **grpo))
        with open_phase(workdir, "grpo", config, stop) as phase:
            sampler = Sampler(config, engine, PROBLEMS, PROBLEMS[:2], TOKENIZER)
            return train_grpo(config, mesh, phase, sampler, params)

    return train


class _StopAtCall(StopSignal):
    """As if a signal came at the n-th call of `_count`."""

    def __init__(self, number):
        super().__init__()
        self._left = number

    def _count(self):
        self._left -= 1
        self.requested = self._left == 0


class StopInRollouts(_StopAtCall):
    """As if a signal came while the rollouts of the n-th run of the engine were decoded."""

    def interrupting(self):
        self._count()
        return super().interrupting()


class StopWhenAsked(_StopAtCall):
    """As if a signal came before the loop asked for the n-th time, between steps, whether to stop."""

    def agreed(self):
        self._count()
        return super().agreed()


def test_reward_rises_and_resumed_equals_uninterrupted(bandit, tmp_path):
    expected = bandit(tmp_path / "whole")
    records = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    assert len(records) == 10
    assert np.mean([r["accuracy"] for r in records[:2]]) < 0.8
    assert np.mean([r["accuracy"] for r in records[-2:]]) > 0.9
    assert all(record["logp_diff_max"] < 1e-4 for record in records)
    assert all(record["probs_pearson_corr"] > 0.9999 for record in records)
    kept = {int(path.stem): read_jsonl(path) for path in (tmp_path / "whole" / "grpo_rollouts").iterdir()}
    assert set(kept) == {4, 8, 10}  # with the regular checkpoints

    with pytest.raises(StoppedError):
        bandit(tmp_path / "parts", StopInRollouts(7))  # after step 6, between checkpoints
    actual = bandit(tmp_path / "parts")
    assert (tmp_path / "parts" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    for step, records in kept.items():
        again = read_jsonl(tmp_path / "parts" / "grpo_rollouts" / f"{step}.jsonl")
        tokens = [[[call["tokens"] for call in record["calls"]] for record in of] for of in (records, again)]
        assert tokens[0] == tokens[1]


def test_with_overlap_every_other_step_learns_from_the_policy_of_the_step_before(bandit, tmp_path):
    overlap = {"overlap": 1, "importance_cap": 2.0}
    expected = bandit(tmp_path / "whole", **overlap)
    records = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 11))
    assert [record["step"] for record in records if "validation_accuracy" in record] == [1, 3, 5, 7, 9]
    assert np.mean([r["accuracy"] for r in records[-2:]]) > 0.9
    # The trainer's policy has moved on from the engine's by one step, in every other step.
    assert all(record["logp_diff_max"] < 1e-4 for record in records[::2])
    assert all(record["logp_diff_max"] > 1e-3 for record in records[1::2])
    times = read_jsonl(tmp_path / "whole" / "timings.jsonl")
    assert all(record["rollout_seconds"] > 0 for record in times)
    assert [r["rollout_tokens_per_second"] for r in times[::2]] == [r["rollout_tokens_per_second"] for r in times[1::2]]

    for signals in (StopInRollouts(3), StopWhenAsked(3)):  # in and after the rollouts of the third pair
        parts = tmp_path / type(signals).__name__
        with pytest.raises(StoppedError):
            bandit(parts, signals, **overlap)
        assert len(read_jsonl(parts / "metrics.jsonl")) in (4, 6)
        actual = bandit(parts, **overlap)
        assert (parts / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
        jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_a_bug_in_a_program_stops_the_run(bandit, tmp_path):
    def broken(problem, settings):
        yield Open((settings.tokenizer.bos_id,))
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        bandit(tmp_path, program=broken)


def test_a_step_and_a_validation_show_their_rollouts(bandit, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("apr_jax.progress._LINE_SECONDS", 0.0)
    monkeypatch.setattr("apr_jax.progress._QUIET_SECONDS", 0.0)
    bandit(tmp_path, num_steps=2, checkpoint_every=1, validate_every=2)
    shown = capsys.readouterr().err
    assert "GRPO: 0/2 step" in shown
    assert "rollouts 16/16" in shown  # two groups of eight
    assert "validated 2/2" in shown
