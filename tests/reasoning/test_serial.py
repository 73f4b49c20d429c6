"""SoS+ as a program, and the registry."""

import pytest

from apr_jax.config_dict import from_config_dict
from apr_jax.engine.threads import RolloutKey
from apr_jax.reasoning import METHODS
from apr_jax.reasoning.programs import make_program
from apr_jax.reasoning.serial import serial
from apr_jax.reasoning.settings import banned_tokens, make_settings
from apr_jax.tasks.countdown.rules import Problem
from apr_jax.tasks.dialect import CALL_END
from configs.grpo import get_config
from tests.reasoning.fixtures import (
    REFERENCE,
    SMALL,
    TOKENIZER,
    Replay,
    TextScript,
    call_tokens,
    demonstrations,
    settings,
)
from tests.reasoning.scripted_engine import ScriptedEngine


@pytest.mark.parametrize("task", [SMALL, REFERENCE], ids=["small", "reference"])
def test_rebuilds_demonstrations_token_by_token(task):
    solved = 0
    for demo in demonstrations(task, "serial", 20):
        (rollout,) = ScriptedEngine(Replay([demo])).run([(RolloutKey(0, 0), serial(demo.problem, settings()))])
        ((context, written),) = [(call.context.tolist(), call.tokens.tolist()) for call in rollout.calls]
        assert (tuple(context), tuple(written)) == call_tokens(demo.calls[0])
        assert rollout.result.answer == demo.answer
        assert rollout.result.status == ("answered" if demo.answer else "no_solution")
        assert (rollout.result.num_spawns, rollout.result.num_children) == (0, 0)
        assert rollout.sequential_tokens == len(written)
        solved += demo.correct
    assert 0 < solved < 20


def test_token_budget_stands_in_the_prompt():
    (demo,) = demonstrations(SMALL, "serial", 1, budget=True)
    budget = int(demo.calls[0].context.split()[2])
    (rollout,) = ScriptedEngine(Replay([demo])).run([(RolloutKey(0, 0), serial(demo.problem, settings(budget=budget)))])
    assert rollout.result.answer == demo.answer


@pytest.mark.parametrize(("engine", "reason"), [({"max_steps": 5}, "max_steps"), ({"max_seq_len": 15}, "context_full")])
def test_cut_off(engine, reason):
    script = TextScript({(): ["No solution found.\n" * 20]})
    (rollout,) = ScriptedEngine(script, **engine).run([(RolloutKey(0, 0), serial(Problem((2, 3), 5), settings()))])
    assert (rollout.result.answer, rollout.result.status, rollout.result.reason) == (None, "truncated", reason)


def test_registry_makes_fresh_programs_and_names_its_choices():
    assert set(METHODS) >= {"adaptive", "serial"}
    problem = Problem((2, 3), 5)
    assert make_program("serial", problem, settings()) is not make_program("serial", problem, settings())
    with pytest.raises(ValueError, match=", ".join(sorted(METHODS))):
        make_program("parallel", problem, settings())


def test_a_conditioned_policy_is_always_told_a_budget():
    plain, conditioned = get_config(), get_config()
    conditioned.data.condition_on_budget = True
    assert make_settings(from_config_dict(plain), TOKENIZER).budget is None
    assert make_settings(from_config_dict(conditioned), TOKENIZER).budget == conditioned.rollout.max_children
    assert make_settings(from_config_dict(conditioned), TOKENIZER, budget=3).budget == 3
    assert make_settings(from_config_dict(conditioned), TOKENIZER).max_tokens is None
    assert make_settings(from_config_dict(conditioned), TOKENIZER, max_tokens=99).max_tokens == 99
    conditioned.data.method = "serial"
    conditioned.model.max_seq_len = conditioned.sft.row_len = conditioned.grpo.row_len = 1000
    assert make_settings(from_config_dict(conditioned), TOKENIZER).budget == 1024


@pytest.mark.parametrize("trained", ["adaptive", "serial", "pasta"])
def test_it_is_told_what_the_method_counts_that_it_is_decoded_with(trained):
    config = get_config()
    config.data.update(condition_on_budget=True, method=trained)
    config.model.max_seq_len = config.sft.row_len = config.grpo.row_len = 1000
    config = from_config_dict(config)
    children = config.rollout.max_children
    budgets = {"serial": 1024, "cons@8:serial": 1024, "adaptive": children, "pasta": children}
    budgets["pass@2:cons@3:pasta"] = children
    budgets |= dict.fromkeys(("direct", "best@4:direct", "hogwild", "tree_of_thoughts"))
    assert {method: make_settings(config, TOKENIZER, method).budget for method in budgets} == budgets
    assert make_settings(config, TOKENIZER).budget == budgets[trained]


def test_banned_tokens_are_what_no_thread_may_write():
    banned = banned_tokens(TOKENIZER, TOKENIZER.vocab_size + 2)
    assert set(banned) == {
        TOKENIZER.pad_id,
        TOKENIZER.bos_id,
        *TOKENIZER.join_ids,
        TOKENIZER.vocab_size,
        TOKENIZER.vocab_size + 1,
    }
    assert list(banned) == sorted(banned)
    for allowed in (TOKENIZER.eos_id, TOKENIZER.mark_id(CALL_END)):
        assert allowed not in banned
