"""The decode benchmark's figures: what a step must cost at least, and what is measured."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.bench import decode
from apr_jax.bench.datasheets import PEAKS, peaks_of
from apr_jax.bench.decode_report import peers_table, write_plot
from apr_jax.bench.roofline import Limits, StepCost, apply_to_vector, measure_limits, multiply, sum_rows
from apr_jax.config import ConfigError
from apr_jax.config_dict import from_config_dict
from apr_jax.model.params import init_params, num_params
from apr_jax.parallel.fit import fit
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


@pytest.fixture(scope="module")
def accelerator():
    """The effort of accelerators, on the CPU's devices."""
    return decode.Effort(
        lanes=(64, 128), peer_lanes=(64,), new=640, steps_per_visit=16, uncounted=0, passes=1, seconds=0.05
    )


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


def test_every_turn_of_a_loop_is_taken():
    ones = jnp.ones((1, 64, 32))
    np.testing.assert_array_equal(sum_rows(3, ones), np.full((1, 64), 32.0))
    np.testing.assert_array_equal(apply_to_vector(3, ones), np.full((1, 64), 32.0))
    square = jax.random.normal(jax.random.key(0), (1, 8, 8))
    np.testing.assert_allclose(multiply(3, square)[0], np.linalg.matrix_power(np.asarray(square[0]), 4), rtol=1e-3)
    for program, argument in ((sum_rows, ones), (apply_to_vector, ones), (multiply, square)):
        loop, once = (program.lower(turns, argument).compile().as_text() for turns in (5, 1))
        assert " while(" in loop
        assert " while(" not in once, "one turn is no loop"


def test_each_of_eight_data_shards_reads_weights_of_its_own(config, accelerator, monkeypatch):
    monkeypatch.setattr(decode, "measure_limits", lambda mesh, dtype: Limits(1e9 * mesh.size, 1e12 * mesh.size))
    lengths = decode.Lengths(prompt=8, new=64)
    on_eight = fit(config, dataclasses.replace(config.mesh, data=8))
    figures = decode.benchmark_decode(on_eight, init_params(config.model, 0), (4, 16), lengths, accelerator)
    whole, one = figures["lanes"]["16"], figures["lanes"]["4"]
    assert (whole["data_shards"], whole["devices"]) == (8, 8)
    assert (one["data_shards"], one["devices"]) == (1, 1), "eight shards don't divide four lanes"
    for row, shards, lanes in ((whole, 8, 16), (one, 1, 4)):
        own = StepCost.of(config.model, lanes // shards, row["context"])
        assert (row["bytes_per_step"], row["flops_per_step"]) == (shards * own.bytes, shards * own.flops)
        assert row["tokens_per_second_per_device"] == row["tokens_per_second"] / shards
        assert row["roofline_ms"] == pytest.approx(max(shards * own.bytes / 8e9, shards * own.flops / 8e12) * 1e3)
    assert "/device" in decode.table(figures)


def test_devices_are_found_in_the_datasheets(config, figures, monkeypatch):
    assert figures["datasheet"] is None
    assert "datasheet" not in decode.table(figures)
    assert peaks_of("NVIDIA H100 80GB HBM3") is PEAKS["h100"]
    assert peaks_of("TPU v5 lite") is PEAKS["v5e"]
    assert peaks_of("TPU v6 lite") is PEAKS["v6e"]
    kinds = [kind for peaks in PEAKS.values() for kind in peaks.kinds]
    assert len(kinds) == len(set(kinds))
    assert all(peaks.source.startswith("https://") for peaks in PEAKS.values())
    monkeypatch.setattr(decode, "peaks_of", lambda kind: PEAKS["v5e"])
    sheet = decode.datasheet(make_mesh(2))
    assert sheet == Limits(2 * 819e9, 2 * 197e12)
    row = {"data_shards": 2, "devices": 2, "tokens_per_second": 8.0, "ms_per_step": 1.0, "context": 10.0}
    shares = decode._shares(config, 8, row, Limits(1e9, 1e12), sheet, make_mesh(2))
    assert shares["datasheet_share"] == pytest.approx(shares["bytes_per_step"] / (2 * 819e9) * 1e3)
    shown = decode.table({**figures, "datasheet": dataclasses.asdict(sheet), "lanes": {"8": row | shares}})
    assert "by the datasheet: 1,638.0 GB/s" in shown
    assert shown.count("share") == 2


@pytest.mark.parametrize(("context", "longest"), [(400, 4_096), (2_048, 4_096), (400, 512), (60, 512)])
def test_a_lane_holds_its_context_on_average(config, accelerator, context, longest):
    model = dataclasses.replace(config.model, max_seq_len=longest)
    lengths = decode.Lengths.around(context, model, accelerator)
    lengths.check(model, accelerator)
    first, last = lengths.prompt + 16, lengths.prompt + lengths.new  # when the first visit is over, and at the end
    assert abs((first + last) / 2 - context) <= 1
    assert lengths.new == 640 or lengths.prompt <= 2 or last >= longest - 1, "as many as fit"
    with pytest.raises(ConfigError, match=r"model\.max_seq_len=512"):
        decode.Lengths.around(505, dataclasses.replace(model, max_seq_len=512), accelerator)


@pytest.mark.parametrize(("longest", "contexts"), [(4_096, [400, 2_048]), (512, [400]), (300, [150])])
def test_accelerators_are_measured_at_what_they_serve(config, longest, contexts):
    gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    mesh = types.SimpleNamespace(devices=np.array([gpu] * 8, object), shape={"data": 8, "fsdp": 1, "tensor": 1}, size=8)
    effort = decode.Effort.on(mesh, config)
    assert (effort.lanes[0], effort.lanes[-1]) == (8 * 64, 8 * 1_024)
    assert set(effort.peer_lanes) <= set(effort.lanes)
    assert effort.seconds == 2.0
    model = dataclasses.replace(config.model, max_seq_len=longest)
    lengths = decode.lengths_to_measure(model, mesh, effort, None, None)
    for each, context in zip(lengths, contexts, strict=True):
        each.check(model, effort)
        assert abs(each.prompt + (effort.steps_per_visit + each.new) / 2 - context) <= 1
    assert decode.datasheet(mesh) == Limits(8 * 4.8e12, 8 * 989.4e12)


def test_lanes_that_do_not_fit_are_left_out_or_refused(config, monkeypatch):
    monkeypatch.setattr("apr_jax.engine.memory.memory_limit", lambda mesh: 8_000_000)
    mesh, said = make_mesh(2), []
    effort, lengths = decode.Effort.on(mesh, config), decode.Lengths(prompt=400, new=96)
    fitting = decode.lanes_to_measure(config, {}, mesh, None, lengths, effort, said.append)
    assert 0 < len(fitting) < len(effort.lanes)
    assert said[0].startswith(f"leaving out {effort.lanes[len(fitting)]} lanes of 496 tokens: the engine does not fit")
    with pytest.raises(ConfigError, match="does not fit"):
        decode.lanes_to_measure(config, {}, mesh, (1, 10_000), lengths, effort, said.append)


def test_figures(config, figures):
    json.dumps(figures)
    assert figures["kernel"].split(".")[0] in ("kernels", "model")
    assert figures["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
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
    effort = decode.Effort.on(make_mesh(2), config)
    with pytest.raises(ConfigError, match=r"exceed model\.max_seq_len=512"):
        decode.Lengths(prompt=500, new=96).check(config.model, effort)
    with pytest.raises(ConfigError, match="at least twice"):
        decode.Lengths(prompt=5, new=63).check(config.model, effort)


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
