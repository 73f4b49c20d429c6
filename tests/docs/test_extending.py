"""docs/extending.md runs, section by section."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.files import read_jsonl
from apr_jax.train.rl.objective import OBJECTIVES, choose_objective
from tests.docs.pages import run_page
from tests.train.rl.test_objective import tokens_of
from tests.train.small import small_config, small_config_dict


def test_an_rl_objective(tmp_path, monkeypatch):
    settings = small_config_dict(str(tmp_path / "data"))
    settings.sft.num_steps, settings.grpo.num_steps, settings.evaluation.num_problems = 1, 1, 1
    monkeypatch.setattr("configs.grpo.get_config", lambda variant: settings)
    monkeypatch.setattr("apr_jax.train.rl.objective.OBJECTIVES", OBJECTIVES.copy())
    monkeypatch.chdir(tmp_path)
    run_page("extending.md", "An RL objective")
    records = read_jsonl(tmp_path / "runs" / "rloo" / "metrics.jsonl")
    assert [record["phase"] for record in records] == ["sft", "grpo"]

    grpo = small_config(**{"grpo.objective": "rloo", "grpo.group_size": 3, "grpo.kl_coef": 0.0}).grpo
    rloo = choose_objective(grpo)
    assert rloo.advantages(grpo, [1.0, 0.0, 0.5]) == pytest.approx([0.75, -0.75, 0.0])
    tokens = tokens_of([[2.0, -1.0, 0.0]], [[0.5, 0.5, 0.0]], [[0.0, 0.0, 0.0]])

    def loss(logprob_BT):
        return rloo.terms(grpo, dataclasses.replace(tokens, logprob_BT=logprob_BT)).loss

    value, grad = jax.value_and_grad(loss)(jnp.log(jnp.asarray([[0.5, 0.25, 0.0]])))
    np.testing.assert_allclose(value, -0.5 * (2 * np.log(0.5) - np.log(0.25)), rtol=1e-6)
    np.testing.assert_allclose(grad, [[-1.0, 0.5, 0.0]], rtol=1e-6)
