"""The decode benchmark's figures: what a step must cost at least, and what is measured."""

import dataclasses
import json

import pytest

from apr_jax.bench import decode
from apr_jax.bench.decode_report import peers_table, write_plot
from apr_jax.bench.roofline import Limits, StepCost, measure_limits
from apr_jax.config import ConfigError
from apr_jax.config_dict import from_config_dict
from apr_jax.model.params import init_params, num_params
from configs.grpo import get_config
from tests.engine.helpers import MODEL, make_mesh

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def config():
    values = get_config("smoke")
    values.mesh.data = 2
    return from_config_dict(values)


@pytest.fixture(scope="module")
def figures(config):
    lengths = decode.Lengths(prompt=20, new=96)
    return decode.benchmark_decode(config, init_params(config.model, 0), (1, 4), lengths)


def test_a_step_costs_its_weights_and_its_caches():
    tied = dataclasses.replace(MODEL, tie_embeddings=True)
    cost, none = StepCost.of(tied, lanes=3, context=10), StepCost.of(tied, lanes=3, context=0)
    params = num_params(tied).total
    assert none.bytes == 4 * params
    assert cost.bytes - none.bytes == 3 * 10 * 2 * 2 * (2 * 16) * 4  # layers, keys and values, K * H, float32
    norms = (2 * tied.num_layers + 1) * tied.embed_dim
    assert none.flops == pytest.approx(3 * 2 * params, abs=3 * 2 * norms)
    assert cost.flops - none.flops == 3 * 10 * 4 * 2 * (4 * 16)  # layers, N * H
    untied = StepCost.of(MODEL, lanes=3, context=0)
    assert untied.bytes == none.bytes, "of an embedding of its own only some rows are read"
    assert cost.seconds(Limits(1.0, 1e30)) == cost.bytes
    assert cost.seconds(Limits(1e30, 1.0)) == cost.flops


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_limits_are_rates_of_this_machine(dtype):
    limits = measure_limits(make_mesh(2), dtype)
    assert 1e8 < limits.bytes_per_second < 1e14
    assert 1e9 < limits.flops_per_second < 1e16
    assert limits.better(Limits(1.0, 1e30)) == Limits(limits.bytes_per_second, 1e30)


def test_figures(config, figures):
    json.dumps(figures)
    assert list(figures["lanes"]) == ["1", "4"]
    assert figures["lanes"]["1"]["data_shards"] == 1, "two shards don't divide one lane"
    assert figures["lanes"]["4"]["data_shards"] == config.mesh.data == 2
    assert figures["recompiles_after_warmup"] == 0
    for lanes, row in figures["lanes"].items():
        assert row["tokens_per_second"] == pytest.approx(int(lanes) / row["ms_per_step"] * 1e3)
        assert row["context"] == 20 + (32 + 96) / 2
        assert row["roofline_share"] == pytest.approx(row["roofline_ms"] / row["ms_per_step"])
        assert 0 < row["roofline_share"] < 1
    shown = decode.table(figures)
    assert all(f"\n{lanes:>5} " in shown for lanes in ("1", "4"))


def test_lengths_that_cannot_be_measured_are_refused(config):
    with pytest.raises(ConfigError, match=r"exceed model\.max_seq_len=512"):
        decode.Lengths(prompt=500, new=96).check(config)
    with pytest.raises(ConfigError, match="at least twice"):
        decode.Lengths(prompt=5, new=63).check(config)


def test_table_and_picture_show_every_peer(figures, tmp_path):
    peers = {
        "hf": {
            "name": "hf",
            "lanes": {"4": {"tokens_per_second": 100.0}},
            "modes": {"dynamic": {"4": {"tokens_per_second": 20.0}}, "static": {"4": {"tokens_per_second": 100.0}}},
            "same_model": True,
            "regret": {"dynamic": 0.0, "static": 0.0},
        },
        "tunix": {
            "lanes": {"1": {"tokens_per_second": 5.0}},
            "modes": {"sampler": {"1": {"tokens_per_second": 5.0}}},
            "same_model": False,
            "regret": {"sampler": 2.0},
        },
        "vllm": {"error": "not installed: no wheel"},
    }
    again = {"1": {"tokens_per_second": 11.0}, "4": {"tokens_per_second": 44.0}}
    all_figures = figures | {"peers": peers, "workload": {"lanes": [1, 4]}, "lanes_after_peers": again}
    ours = figures["lanes"]["4"]["tokens_per_second"]
    lines = {line[:20].rstrip(): line for line in peers_table(all_figures).splitlines()}
    assert f"100.0 ({ours / 100:.2f}x)" in lines["hf static"]
    assert f"20.0 ({ours / 20:.2f}x)" in lines["hf dynamic"]
    assert lines["apr_jax, after peers"].split()[-2:] == ["11.0", "44.0"]
    assert (
        "another model: its tokens are less likely than the best of ours by (nats) sampler 2" in lines["tunix sampler"]
    )
    assert "not installed: no wheel" in lines["vllm"]
    write_plot(tmp_path / "decode.svg", all_figures)
    picture = (tmp_path / "decode.svg").read_text()
    assert picture.count("<path") > 10
